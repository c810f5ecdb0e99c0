"""Result files, and the figures that are read from them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case, case_of
from linear_contenders import contenders_of
from timing import TOTAL

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Spread:
    """Single times in seconds, summed up."""

    rounds: int
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """Sum up at least one time."""
        quartiles = statistics.quantiles(times, method="inclusive") if len(times) > 1 else times * 3
        return cls(len(times), min(times), *quartiles)


class CaseResult:
    """One case of a result file."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.case = case_of(raw["case"])
        self.seconds: dict[str, dict[str, list[float]]] = raw.get("seconds", {})
        self.peak_bytes: dict[str, dict[str, int]] = raw.get("peak_bytes", {})
        self.utilisation: dict[str, dict[str, Any]] = raw.get("utilisation", {})
        self.agreement: dict[str, dict[str, float]] = raw.get("agreement", {})
        self.failed: dict[str, str] = raw.get("failed", {})
        self.copy_bytes_per_second: float | None = raw.get("copy_bytes_per_second")
        self.contenders = [c for c in contenders_of(self.case) if c.name in self.seconds]

    def spread(self, name: str, phase: str = TOTAL) -> Spread | None:
        """The times of a contender in a phase, None where it has none."""
        times = self.seconds.get(name, {}).get(phase)
        return Spread.of(times) if times else None

    def ratio(self, numerator: str, denominator: str, phase: str = TOTAL) -> float | None:
        """The median of ``numerator`` in a phase over the median total of ``denominator``."""
        return self.quotient((numerator, phase), (denominator, TOTAL))

    def quotient(self, above: tuple[str, str], below: tuple[str, str]) -> float | None:
        """The median of one contender and phase over that of another."""
        numerator, denominator = self.spread(*above), self.spread(*below)
        return numerator.median / denominator.median if numerator and denominator else None

    def peak(self, name: str, phase: str = TOTAL) -> int | None:
        """Peak bytes beyond the inputs, None where they were not measured."""
        return self.peak_bytes.get(name, {}).get(phase)

    def disagreement(self, name: str, other: str) -> float | None:
        """The largest difference of loss and gradient norm, relative to those of another."""
        mine, theirs = self.agreement.get(name), self.agreement.get(other)
        if not (mine and theirs):
            return None
        differences = [abs(mine[key] - theirs[key]) / abs(theirs[key] or 1) for key in theirs]
        # NaN is no agreement, and max() would let it pass.
        return math.inf if any(math.isnan(d) for d in differences) else max(differences)


class Result:
    """A result file."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.machine: dict[str, Any] = raw["machine"]
        self.cases = [CaseResult(case) for case in raw["cases"] if case.get("seconds")]
        self.failed = {case_of(case["case"]): case.get("failed", {}) for case in raw["cases"]}

    def find(self, case: Case) -> CaseResult | None:
        """The result of a case."""
        return next((result for result in self.cases if result.case == case), None)
