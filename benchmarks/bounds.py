"""What the kernels promise on a CPU, held against a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cases import TIMES, Case
from results import CaseResult, Result
from timing import FORWARD, TOTAL

INPLACE = "gated_ce_inplace"
LARGE = Case(512, 151_936, "float32")
LARGE_BFLOAT16 = Case(512, 151_936, "bfloat16")
FEW_ROWS = Case(4, 151_936, "float32")

Measure = Callable[[CaseResult], float | None]


@dataclass(frozen=True)
class Bound:
    """A promise: ``value`` is at most, or at least, ``limit``; without a case, for all of them."""

    case: Case | None
    promise: str
    value: Measure
    limit: float
    at_least: bool = False
    unit: str = TIMES

    def holds(self, measured: float) -> bool:
        """Whether the promise is kept."""
        return measured >= self.limit if self.at_least else measured <= self.limit

    def measured(self, result: Result) -> float | None:
        """The value, the worst of all cases; None if the result says nothing about it."""
        values = [self.value(r) for r in result.cases if self.case in (None, r.case)]
        known = [value for value in values if value is not None]
        worst = min if self.at_least else max
        return worst(known, default=None)


def times_copy(name: str, phase: str) -> Measure:
    """Time over the time of a copy."""
    return lambda result: result.ratio(name, "copy", phase)


def times_faster(name: str, other: str) -> Measure:
    """How many times as fast as another, forward and backward."""
    return lambda result: result.ratio(other, name)


def rows_beyond(name: str, gradients: int) -> Measure:
    """Peak memory beyond the inputs and so many gradients, in rows of the logits."""

    def rows(result: CaseResult) -> float | None:
        peak = result.peak(name)
        if peak is None:
            return None
        logits_bytes = result.case.logits_bytes
        return max(peak - gradients * logits_bytes, 0) * result.case.num_rows / logits_bytes

    return rows


def gain_over_one_thread(result: CaseResult) -> float | None:
    """How much faster all threads are than one, forward and backward."""
    return result.utilisation.get(INPLACE, {}).get("gain_over_one_thread")


BOUNDS = (
    Bound(LARGE, "forward / copy", times_copy("gated_ce", FORWARD), 1.2),
    Bound(LARGE, "forward and in-place backward / copy", times_copy(INPLACE, TOTAL), 2.0),
    *(
        Bound(case, f"{other_title} / {title}", times_faster(name, other), limit, at_least=True)
        for case, other, other_title, limit in (
            (LARGE, "eager", "eager EAFT", 12),
            (LARGE, "cross_entropy", "`F.cross_entropy`", 5),
            (LARGE_BFLOAT16, "eager", "eager EAFT", 10),
        )
        for name, title in ((INPLACE, "`gated_ce` in place"), ("gated_ce", "`gated_ce`"))
    ),
    Bound(None, "peak beyond the gradient", rows_beyond("gated_ce", 1), 1, unit=" rows"),
    Bound(None, "peak in place", rows_beyond(INPLACE, 0), 1, unit=" rows"),
    Bound(FEW_ROWS, "one thread / all threads", gain_over_one_thread, 1.5, at_least=True),
)


def evaluate(result: Result) -> list[tuple[Bound, float]]:
    """Each bound that the result speaks about, with the measured value."""
    measured = [(bound, bound.measured(result)) for bound in BOUNDS]
    return [(bound, value) for bound, value in measured if value is not None]
