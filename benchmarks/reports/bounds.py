"""What the kernels promise, held against a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from contenders import shards
from contenders.cases import TIMES, Case, LinearCase
from contenders.linear import CHUNKED, LIGER, PRODUCTS, UNFUSED, chunk_tokens
from contenders.linear import OURS as LINEAR
from contenders.logits import SWEEP, SWEEP_SHAPE
from harness.timing import BACKWARD, FORWARD, TOTAL

from .results import CaseResult, Result

OURS = "gated_ce"
INPLACE = "gated_ce_inplace"
FUSED = "gated_ce_fused"
FUSED_INPLACE = "gated_ce_fused_inplace"
SINGLE_PASS = "single_pass"
TITLES = {
    OURS: "`gated_ce`",
    INPLACE: "`gated_ce` in place",
    FUSED: "`gated_ce` with the gradient in forward",
    FUSED_INPLACE: "the same in place",
    SINGLE_PASS: "`gated_ce_forward_with_grad`",
}
# With smaller logits, processes that share them mostly wait for each other, and a few pages count.
LARGE_BYTES = 2**26

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


def time_over(
    name: str, other: str, phase: str = TOTAL, of: str = TOTAL, times: float = 1
) -> Measure:
    """Time in a phase over that of another, and so many times that."""

    def measure(result: CaseResult) -> float | None:
        ratio = result.ratio(name, other, phase, of)
        return None if ratio is None else times * ratio

    return measure


def memory_over(
    name: str,
    unit: Callable[[CaseResult], float | None],
    beyond: Callable[[Case], float] = lambda case: 0,
    phase: str = TOTAL,
) -> Measure:
    """Memory beyond the inputs and more, in a unit; without one, the case says nothing."""

    def measure(result: CaseResult) -> float | None:
        peak, size = result.peak(name, phase), unit(result)
        return None if peak is None or not size else max(peak - beyond(result.case), 0) / size

    return measure


def rows_beyond(name: str, gradients: int) -> Measure:
    """Peak memory beyond the inputs and so many gradients, in rows of the logits."""
    return memory_over(
        name,
        lambda result: result.case.logits_bytes / result.case.num_rows,
        lambda case: gradients * case.logits_bytes,
    )


def gain_over_one_thread(result: CaseResult) -> float | None:
    """How much faster all threads are than one, forward and backward."""
    return result.utilisation.get(INPLACE, {}).get("gain_over_one_thread")


def disagreement(result: CaseResult) -> float | None:
    """How far our own losses and gradients are from the eager ones, the worst of all."""
    found = [d for name in TITLES if (d := result.disagreement(name, "eager")) is not None]
    return max(found, default=None)


def faster(case: Case, name: str, title: str, other: str, other_title: str, by: float) -> Bound:
    """How many times as fast as another, forward and backward."""
    promise = f"{other_title} / {title}"
    return Bound(case, promise, time_over(other, name), by, at_least=True)


def cpu_bounds() -> tuple[Bound, ...]:
    """What is promised on a CPU."""
    large = Case(512, 151_936, "float32")
    large_bfloat16 = Case(512, 151_936, "bfloat16")
    few_rows = Case(4, 151_936, "float32")
    return (
        Bound(large, "forward / copy", time_over(OURS, "copy", FORWARD), 1.2),
        Bound(large, "forward and in-place backward / copy", time_over(INPLACE, "copy"), 2.0),
        *(
            faster(case, name, TITLES[name], other, other_title, by)
            for case, other, other_title, by in (
                (large, "eager", "eager EAFT", 12),
                (large, "cross_entropy", "`F.cross_entropy`", 5),
                (large_bfloat16, "eager", "eager EAFT", 10),
            )
            for name in (INPLACE, OURS)
        ),
        Bound(None, "peak beyond the gradient", rows_beyond(OURS, 1), 1, unit=" rows"),
        Bound(None, "peak in place", rows_beyond(INPLACE, 0), 1, unit=" rows"),
        Bound(few_rows, "one thread / all threads", gain_over_one_thread, 1.5, at_least=True),
    )


def cuda_bounds() -> tuple[Bound, ...]:
    """What is promised on a GPU: stated for an H100, and relative to its own copy on any other.

    A copy takes twice the time of reading. There is no plain cross-entropy among the operators:
    K = 2, the least that they take, stands in.
    """
    large = Case(*SWEEP_SHAPE, "bfloat16")
    ours = ((SWEEP[20], "operator"), (OURS, TITLES[OURS]))
    phases = ((FORWARD, "forward"), (TOTAL, "forward and backward"))
    # The allocator rounds up; a float32 copy, or one more gradient, would be far beyond.
    peaks = {OURS: 1.01, INPLACE: 0.01, FUSED: 1.01, FUSED_INPLACE: 0.01, SINGLE_PASS: 1.01}
    return (
        *(
            Bound(
                large,
                f"{title}, forward / reading",
                time_over(name, "copy", FORWARD, times=2),
                1.05,
            )
            for name, title in ours
        ),
        *(
            Bound(large, f"{title}, backward / copy", time_over(name, "copy", BACKWARD), 1.08)
            for name, title in ours
        ),
        Bound(large, f"{TITLES[SINGLE_PASS]} / copy", time_over(SINGLE_PASS, "copy"), 1.15),
        *(
            Bound(
                large,
                f"K = {k} / K = 2, {title}",
                time_over(SWEEP[k], SWEEP[2], phase, phase),
                limit,
            )
            for k, limit in ((20, 1.05), (64, 1.25))
            for phase, title in phases
        ),
        *(
            faster(large, name, TITLES[name], other, other_title, by)
            for other, other_title, by in (
                ("liger", "Liger-Kernel without a gate", 1.5),
                ("eager", "eager EAFT", 10),
            )
            for name in (OURS, INPLACE, FUSED, FUSED_INPLACE)
        ),
        *(
            Bound(
                large,
                f"peak of {TITLES[name]} / logits",
                memory_over(name, lambda result: result.case.logits_bytes),
                limit,
            )
            for name, limit in peaks.items()
        ),
        Bound(None, "loss and gradient norm, off from eager EAFT", disagreement, 0.005, unit=""),
    )


def vocab_parallel_bounds(result: Result) -> tuple[Bound, ...]:
    """What is promised where processes share the vocabulary, in every case that is not small."""
    cases = [r.case for r in result.cases if r.case.logits_bytes >= LARGE_BYTES]
    ours = ((shards.OURS, f"`{shards.OURS}`"), (shards.INPLACE, "the same in place"))

    def of_a_process(of_case: CaseResult) -> float | None:
        case = of_case.case
        return case.logits_bytes / result.processes if case in cases else None

    return (
        *(
            faster(
                case,
                name,
                f"{title}, forward and backward",
                shards.MEGATRON,
                "Megatron-Core",
                3,
            )
            for case in cases
            for name, title in ours
        ),
        *(
            # Less than a softmax of any dtype would be.
            Bound(
                None,
                f"kept by {title} for the backward / logits",
                memory_over(name, of_a_process, phase=shards.HELD),
                0.01,
            )
            for name, title in ours
        ),
    )


def linear_bounds(device: str) -> tuple[Bound, ...]:
    """What is promised where the output layer is part of the loss."""
    title, peak = f"`{LINEAR}`", "peak beyond inputs and gradients"

    def chunk_bytes(result: CaseResult) -> float | None:
        case = result.case
        if case.logits_bytes < LARGE_BYTES:
            return None
        return chunk_tokens(case, device) * case.logits_bytes / case.num_rows

    def peak_in(unit: Callable[[CaseResult], float | None]) -> Measure:
        return memory_over(LINEAR, unit, lambda case: case.input_bytes)

    in_chunks = Bound(None, f"{peak} / a chunk's logits", peak_in(chunk_bytes), 1.2)
    if device == "cpu":
        heads = [LinearCase(4096, 49_152, dtype, 576) for dtype in ("float32", "bfloat16")]
        unfused = "`gated_ce` of all logits"
        of_unfused = peak_in(lambda result: result.beyond_gradients(UNFUSED))
        return (
            *(Bound(h, f"{title} / {unfused}", time_over(LINEAR, UNFUSED), 1.0) for h in heads),
            *(Bound(h, f"{peak} / that of {unfused}", of_unfused, 0.15) for h in heads),
            in_chunks,
        )
    large = LinearCase(8192, 151_936, "bfloat16", 4096)
    return (
        Bound(large, f"{title} / three bare products", time_over(LINEAR, PRODUCTS), 1.15),
        faster(large, LINEAR, title, LIGER, "Liger-Kernel without a gate", 1),
        faster(large, LINEAR, title, CHUNKED, "eager EAFT in chunks", 1),
        in_chunks,
    )


BOUNDS = {"cpu": cpu_bounds(), "cuda": cuda_bounds()}
LINEAR_BOUNDS = {device: linear_bounds(device) for device in BOUNDS}


def bounds_of(result: Result) -> tuple[Bound, ...]:
    """What is promised about what the result measured."""
    if result.processes:
        return vocab_parallel_bounds(result)
    is_linear = any(isinstance(of_case.case, LinearCase) for of_case in result.cases)
    return (LINEAR_BOUNDS if is_linear else BOUNDS)[result.device]


def evaluate(result: Result) -> list[tuple[Bound, float]]:
    """Each bound that the result speaks about, with the measured value."""
    measured = [(bound, bound.measured(result)) for bound in bounds_of(result)]
    return [(bound, value) for bound, value in measured if value is not None]


def unmeasured(result: Result) -> list[Bound]:
    """The bounds that the result says nothing about."""
    return [bound for bound in bounds_of(result) if bound.measured(result) is None]


def as_json(result: Result) -> list[dict[str, Any]]:
    """Every bound, for the result file; those that were not measured have no value."""
    return [
        {
            "case": str(bound.case) if bound.case else "all cases",
            "promise": bound.promise,
            "at_least" if bound.at_least else "at_most": bound.limit,
            "value": (value := bound.measured(result)),
            "held": None if value is None else bound.holds(value),
        }
        for bound in bounds_of(result)
    ]
