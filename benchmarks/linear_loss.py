"""Benchmark of linear_gated_ce: output layer and loss together, beside the bare matrix products.

    python benchmarks/linear_loss.py                  on the CPU, a quarter of an hour on two cores
    python benchmarks/linear_loss.py --device cuda    on the current GPU, with its peers there
    python benchmarks/linear_loss.py --quick          one small shape, a smoke test

A shape is tokens x hidden x vocabulary. Before anything is timed, losses and gradients are compared
with those of another contender that computes the same; one that is off is left out. Writes
<machine>-linear.json with every single time, and <machine>-linear.md made from it; readme_tables.py
puts the figures into docs/benchmarks.md. Ends as run.py does: with 1 if one of our own contenders
failed, and with 3 if the device was lost.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import bounds
import torch
from cases import TIMES, Case, LinearCase, Rotation
from contenders import Contender, Runner
from device import Device
from linear_contenders import LINEAR_CONTENDERS, PRODUCTS, SAME, chunk_tokens
from measure import IGNORE_EVERY, blame, start, time_all
from memory import measure_peaks, peak_once
from progress import Entry, Progress, describe_error, for_each
from report import (
    MIB,
    MISSING,
    bounds_not_measured,
    bounds_table,
    by_case,
    failures,
    machine_line,
    mebibytes,
    median,
    number,
    table,
)
from results import CaseResult, Result
from run import Benchmark, execute, parse
from schedule import Schedule
from timing import BACKWARD, FORWARD
from torch import Tensor

SUFFIX = "-linear"
EXAMPLE = "4096x576x49152"
# The heads of SmolLM2-135M and of Qwen3-0.6B; a call of the first takes seconds on two cores.
SHAPES = {
    "cpu": ((4096, 576, 49_152), (384, 1024, 151_936)),
    "cuda": ((8192, 4096, 151_936), (8192, 2048, 32_000)),
}
QUICK_SHAPES = ((96, 32, 1_024),)
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
REPEATS = {"cpu": 7, "cuda": 20}
# The check of losses and gradients is one more call, and on a CPU one is enough.
WARM_UP = {"cpu": 0, "cuda": 1}
# Of the loss, and of the gradients' norms: 16-bit gradients are rounded where they are added up.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
COMPILATION_SECONDS = 25.0
# The parts of an outcome.
COMPARED = ("loss", "hidden_gradient", "weight_gradient")


def cases_in_order(arguments: argparse.Namespace) -> list[Case]:
    """What is measured."""
    return [
        LinearCase(num_rows, vocab_size, dtype, hidden_size)
        for num_rows, hidden_size, vocab_size in arguments.shapes
        for dtype in arguments.dtypes
    ]


def off(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    norms = [
        torch.linalg.vector_norm(each, dtype=torch.float32)
        for each in (actual - expected, expected)
    ]
    return float(norms[0] / norms[1])


def check_agreement(
    case: Case, runners: list[Runner], rotation: Rotation, device: Device, entry: Entry
) -> None:
    """Take out of the runners what computes something else than it should, or fails."""
    batch = rotation.full_turn()[0]
    expected: dict[str, Any] = {}
    found = {}
    # Those that others are compared with come first.
    for runner in sorted(runners, key=lambda runner: runner.contender.name in SAME):
        name = runner.contender.name
        reason = ""
        try:
            outcome: Any = runner.outcome(batch)
        except Exception as error:
            reason = describe_error(error)
        else:
            if name in SAME.values():
                expected[name] = outcome
            elif SAME.get(name) in expected:
                pairs = zip(outcome, expected[SAME[name]], strict=True)
                found[name] = dict(zip(COMPARED, itertools.starmap(off, pairs), strict=True))
                reason = disagreement(found[name], SAME[name], case)
            del outcome
        if reason:
            runners.remove(runner)
            blame(runner.contender, reason, device, entry)
    entry.add(agreement=found)


def disagreement(differences: dict[str, float], other: str, case: Case) -> str:
    """How far a contender is from another, "" if that is due to rounding."""
    # NaN is no agreement either.
    if all(difference <= TOLERANCE[case.dtype] for difference in differences.values()):
        return ""
    how_far = ", ".join(f"{what} {by:.2g}" for what, by in differences.items())
    return f"off from {other}: {how_far}"


def measure_linear(
    case: Case,
    contenders: list[Contender],
    device: Device,
    entry: Entry,
    schedule: Schedule,
    repeats: int,
    min_seconds: float,
) -> None:
    """One case, into its entry: agreement, time side by side, and peak memory."""
    torch.compiler.reset()
    device.release()
    names = _measure_here(case, contenders, device, entry, schedule, repeats, min_seconds)
    device.release()
    if device.type == "cpu":
        entry.add(peak_bytes=measure_peaks(case, names))


def _measure_here(
    case: Case,
    contenders: list[Contender],
    device: Device,
    entry: Entry,
    schedule: Schedule,
    repeats: int,
    min_seconds: float,
) -> list[str]:
    """What is measured in this process; whose times there are."""
    ignore_every = IGNORE_EVERY[device.type]
    rotation = Rotation(case, device.cache_bytes(), device.type, ignore_every=ignore_every)
    runners = start(contenders, rotation, device, entry, schedule, WARM_UP[device.type])
    check_agreement(case, runners, rotation, device, entry)

    seconds = time_all(runners, rotation, device, entry, schedule, repeats, min_seconds)
    if device.type == "cuda":
        peaks = for_each("peak", runners, entry, lambda each: peak_once(each, rotation, device))
        entry.add(peak_bytes=peaks)
    return list(seconds)


def chunk_table(result: Result) -> str:
    """How large a chunk is, and how large all logits would be."""
    head = ["", "logits, MiB", "tokens in a chunk", "its logits, MiB", "both gradients, MiB"]
    rows = []
    for of_case in result.cases:
        case = of_case.case
        tokens = chunk_tokens(case, result.machine["device"])
        of_chunk = tokens * case.logits_bytes / case.num_rows
        sizes = (case.logits_bytes, of_chunk, case.input_bytes)
        logits, chunk, gradients = (number(size / MIB) for size in sizes)
        rows.append([str(case), logits, f"{tokens:,}", chunk, gradients])
    return table(head, rows)


def summary(result: Result) -> str:
    """The tables for the page of benchmarks."""
    return "\n\n".join([machine_line(result), *summary_parts(result)])


def summary_parts(result: Result) -> list[str]:
    """Tables over all cases, each after a line that says what it is."""
    names = {name for case in result.cases for name in case.seconds}
    contenders = [c for c in LINEAR_CONTENDERS if c.name in names]

    def times_products(case: CaseResult, name: str) -> str:
        return number(case.ratio(name, PRODUCTS))

    def both_phases(case: CaseResult, name: str) -> str:
        if not case.spread(name, FORWARD):
            return MISSING
        return " + ".join(median(case, name, 1e3, phase) for phase in (FORWARD, BACKWARD))

    def beyond_gradients(case: CaseResult, name: str) -> str:
        peak = bounds.beyond_gradients(case, name)
        return number(None if peak is None else peak / MIB)

    parts = [
        f"Tokens {TIMES} hidden {TIMES} vocabulary; the loss, and the gradients of hidden and "
        "weight. The three bare products are those of a whole batch, with nothing between them. "
        "Eager EAFT in chunks computes the logits of a chunk once more for its backward; its "
        "chunks are those of `linear_gated_ce`:",
        chunk_table(result),
        "Forward and backward together, milliseconds (median, interleaved in one run):",
        by_case(result.cases, contenders, lambda case, name: median(case, name, 1e3)),
        f"The same, {TIMES} the three bare products:",
        by_case(result.cases, contenders, times_products),
        "Forward + backward, each by itself, milliseconds:",
        by_case(result.cases, contenders, both_phases),
        "Peak memory beyond the inputs, MiB (measured):",
        by_case(result.cases, contenders, mebibytes),
        "Peak memory beyond the inputs and both gradients, MiB (measured):",
        by_case(result.cases, contenders, beyond_gradients),
    ]
    if found := bounds_table(result):
        parts += ["What was promised, and what came out:", found]
    if missing := bounds_not_measured(result):
        parts.append(missing)
    return parts


def markdown(result: Result) -> str:
    """The whole report."""
    parts = ["# Benchmark of `linear_gated_ce`", machine_line(result)]
    parts += ["## In short", *summary_parts(result)]
    for case, failed in result.failed.items():
        if failed:
            parts += [f"## What failed at {case}", failures(failed)]
    return "\n\n".join(parts) + "\n"


def write_reports(progress: Progress) -> str:
    """The report, also written beside the result file."""
    result = Result(progress.raw)
    progress.raw["bounds"] = bounds.as_json(result)
    progress.write()
    report = markdown(result)
    progress.path.with_suffix(".md").write_text(report)
    return report


def main() -> int:
    """Measure, print and write."""
    arguments = parse(__doc__, "TxHxV", EXAMPLE, SHAPES, QUICK_SHAPES, REPEATS, DTYPES)
    benchmark = Benchmark(
        LINEAR_CONTENDERS,
        cases_in_order(arguments),
        measure_linear,
        write_reports,
        SUFFIX,
        COMPILATION_SECONDS,
    )
    return execute(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
