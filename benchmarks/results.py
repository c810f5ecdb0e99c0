"""Result files, and the figures that are read from them."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case
from contenders import CONTENDERS
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
        self.case = Case(**raw["case"])
        self.seconds: dict[str, dict[str, list[float]]] = raw["seconds"]
        self.peak_bytes: dict[str, dict[str, int]] = raw["peak_bytes"]
        self.utilisation: dict[str, dict[str, Any]] = raw["utilisation"]
        self.contenders = [c for c in CONTENDERS if c.name in self.seconds]

    def spread(self, name: str, phase: str = TOTAL) -> Spread | None:
        """The times of a contender in a phase, None where it has none."""
        times = self.seconds.get(name, {}).get(phase)
        return Spread.of(times) if times else None

    def ratio(self, numerator: str, denominator: str, phase: str = TOTAL) -> float | None:
        """The median of ``numerator`` in a phase over the median total of ``denominator``."""
        above, below = self.spread(numerator, phase), self.spread(denominator)
        return above.median / below.median if above and below else None

    def peak(self, name: str, phase: str = TOTAL) -> int | None:
        """Peak bytes beyond the inputs, None where they were not measured."""
        return self.peak_bytes.get(name, {}).get(phase)


class Result:
    """A result file."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.machine: dict[str, Any] = raw["machine"]
        self.cases = [CaseResult(case) for case in raw["cases"]]

    @classmethod
    def newest(cls, device: str, folder: Path = FOLDER) -> Result | None:
        """The result with the latest date of all on this device, None if there is none."""
        found = [cls(json.loads(path.read_text())) for path in folder.glob(f"{device}-*.json")]
        return max(found, key=lambda result: result.machine["date"], default=None)

    def find(self, case: Case) -> CaseResult | None:
        """The result of a case."""
        return next((result for result in self.cases if result.case == case), None)
