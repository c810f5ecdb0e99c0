"""Result files, and the figures that are read from them."""

import statistics
from typing import Any

from contenders import shards
from contenders.cases import LinearCase, case_of
from contenders.contender import Contender
from contenders.linear import LINEAR_CONTENDERS
from contenders.logits import CONTENDERS
from harness.timing import TOTAL


def slowest(of_ranks: list[Any]) -> Any:
    """The largest figure of all processes, one by one."""
    first = of_ranks[0]
    if isinstance(first, dict):
        return {key: slowest([each[key] for each in of_ranks]) for key in first}
    if isinstance(first, list):
        return [slowest(list(figures)) for figures in zip(*of_ranks, strict=True)]
    return max(of_ranks)


class CaseResult:
    """One case of a result file.

    Where processes shared it, a sample's time is that of the slowest one, memory of the largest.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        ranks = raw.get("ranks", [])
        shared = {"kept": ranks[0].get("kept", {})} if ranks else {}
        for what in ("seconds", "peak_bytes") if ranks else ():
            shared[what] = slowest([rank.get(what, {}) for rank in ranks])
        found = {**raw, **shared}
        self.case = case_of(raw["case"])
        self.seconds: dict[str, dict[str, list[float]]] = found.get("seconds", {})
        self.peak_bytes: dict[str, dict[str, int]] = found.get("peak_bytes", {})
        self.utilisation: dict[str, dict[str, Any]] = found.get("utilisation", {})
        self.agreement: dict[str, dict[str, float]] = found.get("agreement", {})
        self.failed: dict[str, str] = found.get("failed", {})
        self.kept: dict[str, list[str]] = found.get("kept", {})
        self.copy_bytes_per_second: float | None = found.get("copy_bytes_per_second")

    def times(self, name: str, phase: str = TOTAL) -> list[float]:
        """Those of a contender in a phase, none where it has none."""
        return self.seconds.get(name, {}).get(phase, [])

    def median(self, name: str, phase: str = TOTAL) -> float | None:
        times = self.times(name, phase)
        return statistics.median(times) if times else None

    def ratio(self, above: str, below: str, phase: str = TOTAL, of: str = TOTAL) -> float | None:
        """The median of one contender in a phase over that of another, by default its total."""
        numerator, denominator = self.median(above, phase), self.median(below, of)
        return numerator / denominator if numerator and denominator else None

    def peak(self, name: str, phase: str = TOTAL) -> int | None:
        """Peak bytes beyond the inputs, None where they were not measured."""
        return self.peak_bytes.get(name, {}).get(phase)

    def beyond_gradients(self, name: str) -> int | None:
        """Peak bytes beyond the inputs and all gradients that were wanted."""
        peak = self.peak(name)
        return None if peak is None else max(peak - self.case.input_bytes, 0)


class Result:
    """A result file."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.machine: dict[str, Any] = raw["machine"]
        everything = [CaseResult(case) for case in raw["cases"]]
        self.cases = [of_case for of_case in everything if of_case.seconds]
        self.failed = {of_case.case: of_case.failed for of_case in everything}

    @property
    def device(self) -> str:
        return str(self.machine["device"])

    @property
    def processes(self) -> int:
        """Those that shared the vocabulary; 0 if it was not shared."""
        return int(self.machine.get("processes", 0))

    @property
    def contenders(self) -> list[Contender]:
        names = {name for of_case in self.cases for name in of_case.seconds}
        known = shards.CONTENDERS if self.processes else CONTENDERS
        if any(isinstance(of_case.case, LinearCase) for of_case in self.cases):
            known = LINEAR_CONTENDERS
        return [contender for contender in known if contender.name in names]
