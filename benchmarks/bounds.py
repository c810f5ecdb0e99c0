"""What the kernels promise, held against a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cases import TIMES, Case, LinearCase
from contenders import SWEEP, SWEEP_SHAPE
from linear_contenders import CHUNKED, LIGER, PRODUCTS, UNFUSED, chunk_tokens
from linear_contenders import OURS as LINEAR
from results import CaseResult, Result
from timing import BACKWARD, FORWARD, TOTAL
from vocab_parallel_rank import HELD, MEGATRON, OURS
from vocab_parallel_rank import INPLACE as SHARD_INPLACE

INPLACE = "gated_ce_inplace"
FUSED = "gated_ce_fused"
FUSED_INPLACE = "gated_ce_fused_inplace"
OPERATORS = SWEEP[20]
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


def times_copy(name: str, phase: str) -> Measure:
    """Time over the time of a copy."""
    return lambda result: result.ratio(name, "copy", phase)


def times_reading(name: str, phase: str) -> Measure:
    """Time over the time of reading the logits, at the bandwidth of a copy: half of its time."""

    def ratio(result: CaseResult) -> float | None:
        copies = result.ratio(name, "copy", phase)
        return None if copies is None else 2 * copies

    return ratio


def times_faster(name: str, other: str) -> Measure:
    """How many times as fast as another, forward and backward."""
    return lambda result: result.ratio(other, name)


def times_other(name: str, other: str) -> Measure:
    """Time over that of another, forward and backward."""
    return lambda result: result.ratio(name, other)


def cost_of_k(k: int, phase: str) -> Measure:
    """The time with k over that with 2, the least that there is, of the operators alone."""
    return lambda result: result.quotient((SWEEP[k], phase), (SWEEP[2], phase))


def rows_beyond(name: str, gradients: int) -> Measure:
    """Peak memory beyond the inputs and so many gradients, in rows of the logits."""

    def rows(result: CaseResult) -> float | None:
        peak = result.peak(name)
        if peak is None:
            return None
        logits_bytes = result.case.logits_bytes
        return max(peak - gradients * logits_bytes, 0) * result.case.num_rows / logits_bytes

    return rows


def peak_of_logits(name: str) -> Measure:
    """Peak memory beyond the inputs, over the size of the logits."""

    def ratio(result: CaseResult) -> float | None:
        peak = result.peak(name)
        return None if peak is None else peak / result.case.logits_bytes

    return ratio


def gain_over_one_thread(result: CaseResult) -> float | None:
    """How much faster all threads are than one, forward and backward."""
    return result.utilisation.get(INPLACE, {}).get("gain_over_one_thread")


def disagreement(result: CaseResult) -> float | None:
    """How far our own losses and gradients are from the eager ones, the worst of all."""
    names = ("gated_ce", INPLACE, FUSED, FUSED_INPLACE, "single_pass")
    found = [d for name in names if (d := result.disagreement(name, "eager")) is not None]
    return max(found, default=None)


def cpu_bounds() -> tuple[Bound, ...]:
    """What is promised on a CPU."""
    large = Case(512, 151_936, "float32")
    large_bfloat16 = Case(512, 151_936, "bfloat16")
    few_rows = Case(4, 151_936, "float32")
    return (
        Bound(large, "forward / copy", times_copy("gated_ce", FORWARD), 1.2),
        Bound(large, "forward and in-place backward / copy", times_copy(INPLACE, TOTAL), 2.0),
        *(
            Bound(case, f"{other_title} / {title}", times_faster(name, other), limit, at_least=True)
            for case, other, other_title, limit in (
                (large, "eager", "eager EAFT", 12),
                (large, "cross_entropy", "`F.cross_entropy`", 5),
                (large_bfloat16, "eager", "eager EAFT", 10),
            )
            for name, title in ((INPLACE, "`gated_ce` in place"), ("gated_ce", "`gated_ce`"))
        ),
        Bound(None, "peak beyond the gradient", rows_beyond("gated_ce", 1), 1, unit=" rows"),
        Bound(None, "peak in place", rows_beyond(INPLACE, 0), 1, unit=" rows"),
        Bound(few_rows, "one thread / all threads", gain_over_one_thread, 1.5, at_least=True),
    )


def cuda_bounds() -> tuple[Bound, ...]:
    """What is promised on a GPU: stated for an H100, and relative to its own copy on any other.

    There is no plain cross-entropy among the operators: K = 2, the least that they take, stands in.
    """
    large = Case(*SWEEP_SHAPE, "bfloat16")
    single_pass = "`gated_ce_forward_with_grad`"
    ours = ((OPERATORS, "operator"), ("gated_ce", "`gated_ce`"))
    return (
        *(
            Bound(large, f"{title}, forward / reading", times_reading(name, FORWARD), 1.05)
            for name, title in ours
        ),
        *(
            Bound(large, f"{title}, backward / copy", times_copy(name, BACKWARD), 1.08)
            for name, title in ours
        ),
        Bound(large, f"{single_pass} / copy", times_copy("single_pass", TOTAL), 1.15),
        *(
            Bound(large, f"K = {k} / K = 2, {title}", cost_of_k(k, phase), limit)
            for k, limit in ((20, 1.05), (64, 1.25))
            for phase, title in ((FORWARD, "forward"), (TOTAL, "forward and backward"))
        ),
        *(
            Bound(
                large, f"{other_title} / {title}", times_faster(name, other), limit, at_least=True
            )
            for other, other_title, limit in (
                ("liger", "Liger-Kernel without a gate", 1.5),
                ("eager", "eager EAFT", 10),
            )
            for name, title in (
                ("gated_ce", "`gated_ce`"),
                (INPLACE, "`gated_ce` in place"),
                (FUSED, "`gated_ce` with the gradient in forward"),
                (FUSED_INPLACE, "the same in place"),
            )
        ),
        # The allocator rounds up; a float32 copy, or one more gradient, would be far beyond.
        *(
            Bound(large, f"peak of {title} / logits", peak_of_logits(name), limit)
            for name, title, limit in (
                ("gated_ce", "`gated_ce`", 1.01),
                (INPLACE, "`gated_ce` in place", 0.01),
                (FUSED, "`gated_ce` with the gradient in forward", 1.01),
                (FUSED_INPLACE, "the same in place", 0.01),
                ("single_pass", single_pass, 1.01),
            )
        ),
        Bound(None, "loss and gradient norm, off from eager EAFT", disagreement, 0.005, unit=""),
    )


def vocab_parallel_bounds(result: Result) -> tuple[Bound, ...]:
    """What is promised where processes share the vocabulary, in every case that is not small."""
    cases = [of_case for of_case in result.cases if of_case.case.logits_bytes >= LARGE_BYTES]
    ours = ((OURS, f"`{OURS}`"), (SHARD_INPLACE, "the same in place"))

    def held_of_logits(name: str) -> Measure:
        def ratio(of_case: CaseResult) -> float | None:
            held = of_case.peak(name, HELD) if of_case in cases else None
            if held is None:
                return None
            return held * int(result.machine["processes"]) / of_case.case.logits_bytes

        return ratio

    return (
        *(
            Bound(
                of_case.case,
                f"Megatron-Core / {title}, forward and backward",
                times_faster(name, MEGATRON),
                3,
                at_least=True,
            )
            for of_case in cases
            for name, title in ours
        ),
        *(
            # Less than a softmax of any dtype would be.
            Bound(None, f"kept by {title} for the backward / logits", held_of_logits(name), 0.01)
            for name, title in ours
        ),
    )


def beyond_gradients(result: CaseResult, name: str) -> int | None:
    """Peak memory beyond the inputs and all gradients that were wanted."""
    peak = result.peak(name)
    return None if peak is None else max(peak - result.case.input_bytes, 0)


def peak_over(name: str, other: str) -> Measure:
    """Peak memory beyond inputs and gradients, over that of another."""

    def ratio(result: CaseResult) -> float | None:
        mine, theirs = (beyond_gradients(result, each) for each in (name, other))
        return None if mine is None or not theirs else mine / theirs

    return ratio


def peak_in_chunks(name: str, device: str) -> Measure:
    """Peak memory beyond inputs and gradients, over the logits of a chunk; not of small cases."""

    def ratio(result: CaseResult) -> float | None:
        case, peak = result.case, beyond_gradients(result, name)
        if peak is None or case.logits_bytes < LARGE_BYTES:
            return None
        return peak * case.num_rows / (chunk_tokens(case, device) * case.logits_bytes)

    return ratio


def linear_bounds(device: str) -> tuple[Bound, ...]:
    """What is promised where the output layer is part of the loss."""
    title, peak = f"`{LINEAR}`", "peak beyond inputs and gradients"
    in_chunks = Bound(None, f"{peak} / a chunk's logits", peak_in_chunks(LINEAR, device), 1.2)
    if device == "cpu":
        heads = [LinearCase(4096, 49_152, dtype, 576) for dtype in ("float32", "bfloat16")]
        unfused = "`gated_ce` of all logits"
        return (
            *(
                Bound(head, f"{title} / {unfused}", times_other(LINEAR, UNFUSED), 1.0)
                for head in heads
            ),
            *(
                Bound(head, f"{peak} / that of {unfused}", peak_over(LINEAR, UNFUSED), 0.15)
                for head in heads
            ),
            in_chunks,
        )
    large = LinearCase(8192, 151_936, "bfloat16", 4096)
    return (
        Bound(large, f"{title} / three bare products", times_other(LINEAR, PRODUCTS), 1.15),
        *(
            Bound(large, f"{other_title} / {title}", times_faster(LINEAR, other), 1, at_least=True)
            for other, other_title in (
                (LIGER, "Liger-Kernel without a gate"),
                (CHUNKED, "eager EAFT in chunks"),
            )
        ),
        in_chunks,
    )


BOUNDS = {"cpu": cpu_bounds(), "cuda": cuda_bounds()}
LINEAR_BOUNDS = {device: linear_bounds(device) for device in BOUNDS}


def bounds_of(result: Result) -> tuple[Bound, ...]:
    """What is promised about what the result measured."""
    if "processes" in result.machine:
        return vocab_parallel_bounds(result)
    is_linear = any(isinstance(of_case.case, LinearCase) for of_case in result.cases)
    return (LINEAR_BOUNDS if is_linear else BOUNDS)[result.machine["device"]]


def evaluate(result: Result) -> list[tuple[Bound, float]]:
    """Each bound that the result speaks about, with the measured value."""
    measured = [(bound, bound.measured(result)) for bound in bounds_of(result)]
    return [(bound, value) for bound, value in measured if value is not None]


def unmeasured(result: Result) -> list[Bound]:
    """The bounds that the result says nothing about."""
    return [bound for bound in bounds_of(result) if bound.measured(result) is None]


def as_json(result: Result) -> list[dict[str, Any]]:
    """Every bound, for the result file; those that were not measured have no value."""
    entries = []
    for bound in bounds_of(result):
        value = bound.measured(result)
        entries.append(
            {
                "case": str(bound.case) if bound.case else "all cases",
                "promise": bound.promise,
                "at_least" if bound.at_least else "at_most": bound.limit,
                "value": value,
                "held": None if value is None else bound.holds(value),
            }
        )
    return entries
