"""The report of run.py: of losses of logits."""

from __future__ import annotations

import csv
import io
from dataclasses import astuple

from contenders.cases import TIMES
from contenders.contender import Contender
from contenders.logits import SWEEP
from harness.timing import BACKWARD, FORWARD, GRAPH, LATENCY, PHASES, TOTAL

from .results import CaseResult, Result
from .tables import (
    MEMORY,
    MIB,
    MISSING,
    both,
    bounds_table,
    by_case,
    failures,
    machine_line,
    mebibytes,
    median,
    number,
    promises,
    table,
    text,
)

ON_A_GPU = (
    "Calls are queued ahead of the device: launching them is not part of their time, unless they "
    "wait for the device, as Liger-Kernel does, which also computes its gradient in the forward. "
    "Logits that are overwritten are restored outside of what is timed. One label in 1,024 is "
    "ignored."
)
# Three ways to call a forward and a backward on few rows.
LAUNCHES = {TOTAL: "queued", LATENCY: "on an idle device", GRAPH: "in a CUDA graph"}
# What times are given in, and how many of it are a second.
UNITS = {"cpu": ("milliseconds", "ms", 1e3), "cuda": ("microseconds", "µs", 1e6)}
COLUMNS = (
    *("num_rows", "vocab_size", "dtype", "contender", "phase", "rounds"),
    *("min_s", "lower_quartile_s", "median_s", "upper_quartile_s"),
    *("ratio_to_copy", "eager_ratio", "peak_bytes"),
)


def quartiles(result: CaseResult, name: str, scale: float) -> str:
    """The least total and the quartiles around its median, times a scale."""
    spread = result.spread(name)
    if spread is None:
        return MISSING
    figures = (spread.minimum, spread.lower_quartile, spread.upper_quartile)
    return " / ".join(number(figure * scale) for figure in figures)


def case_table(result: CaseResult, contenders: list[Contender], device: str) -> str:
    """Everything about one case."""
    _, unit, scale = UNITS[device]
    head = ["", f"forward, {unit}", f"backward, {unit}", f"both, {unit}", "min / quartiles"]
    head += [f"both, {TIMES} copy", "eager ÷ this", "peak forward, MiB", "peak, MiB"]
    rows = [
        [
            contender.title,
            *(median(result, name, scale, phase) for phase in (FORWARD, BACKWARD, TOTAL)),
            quartiles(result, name, scale),
            number(result.ratio(name, "copy")),
            number(result.ratio("eager", name) if contender.runner.is_loss else None),
            mebibytes(result, name, FORWARD),
            mebibytes(result, name),
        ]
        for contender in contenders
        if (name := contender.name) in result.seconds
    ]
    return table(head, rows)


def utilisation_table(result: CaseResult, contenders: list[Contender]) -> str:
    """How busy the cores are; "" where that was not measured."""
    rows = [
        [
            contender.title,
            f"{number(measured['cores_busy'])} of {measured['threads']}",
            number(measured["gain_over_one_thread"], TIMES),
        ]
        for contender in contenders
        if (measured := result.utilisation.get(contender.name))
    ]
    return table(["", "cores busy", "faster than one thread"], rows) if rows else ""


def launch_table(result: CaseResult, contenders: list[Contender], scale: float) -> str:
    """Few rows on a GPU, called in three ways; "" where that was not measured."""
    rows = [
        [contender.title, *(median(result, contender.name, scale, phase) for phase in LAUNCHES)]
        for contender in contenders
        if result.spread(contender.name, LATENCY)
    ]
    return table(["", *LAUNCHES.values()], rows) if rows else ""


def sweep_table(result: CaseResult, scale: float) -> str:
    """What k costs, by the operators alone; "" where that was not measured."""
    rows = [
        [
            f"K = {k}",
            *(median(result, name, scale, phase) for phase in (FORWARD, BACKWARD, TOTAL)),
            *(
                number(result.ratio(name, SWEEP[2], phase, phase), TIMES)
                for phase in (FORWARD, TOTAL)
            ),
        ]
        for k, name in SWEEP.items()
        if result.spread(name)
    ]
    head = ["", "forward", "backward", "both", "forward, of K = 2", "both, of K = 2"]
    return table(head, rows) if rows else ""


def markdown(result: Result) -> str:
    """The whole report."""
    on_gpu = result.device != "cpu"
    parts = [
        "# Benchmark of `gated_ce`",
        machine_line(result),
        "Medians of calls interleaved in one run, on inputs that are not in the cache. Forward is "
        "the call of the loss, backward is `.backward()` of the scalar it gives. Memory is the "
        f"measured peak beyond the inputs. {TIMES} copy: over the copy into existing memory.",
    ]
    if on_gpu:
        parts += [ON_A_GPU, "## In short", *summary_parts(result)]
    for case in result.cases:
        rounds = max(spread.rounds for name in case.seconds if (spread := case.spread(name)))
        line = f"Logits of {number(case.case.logits_bytes / MIB)} MiB, {rounds} rounds."
        if on_gpu and case.copy_bytes_per_second:
            line += f" The copy moves {case.copy_bytes_per_second / 1e12:.2f} TB/s."
        parts += [f"## {case.case}", line, case_table(case, result.contenders, result.device)]
        if busy := utilisation_table(case, result.contenders):
            parts += ["Cores in use, forward and backward (`utilisation.py` says how):", busy]
    parts += failures(result, "{}:")
    if not on_gpu and (found := bounds_table(result)):
        parts += ["## Promises", found]
    return text(parts) + "\n"


def in_short(result: Result) -> str:
    """The largest vocabulary alone, for the README: a row for each loss."""
    unit, _, scale = UNITS[result.device]
    in_order = sorted(result.cases, key=lambda case: (case.case.vocab_size, case.case.num_rows))
    largest = {case.case.dtype: case for case in in_order}.values()
    rows = [
        [
            contender.title,
            *(
                cell
                for case in largest
                for cell in (median(case, contender.name, scale), mebibytes(case, contender.name))
            ),
        ]
        for contender in result.contenders
        if contender.runner.is_loss
        and contender.shape is None
        and any(contender.name in case.seconds for case in largest)
    ]
    head = ["", *(f"{case.case}, {what}" for case in largest for what in (unit, "MiB"))]
    what = "Forward and backward together: median time, and measured peak memory beyond the inputs:"
    return text([machine_line(result), what, table(head, rows)])


def summary(result: Result) -> str:
    """Tables over all cases, for the page of benchmarks."""
    return text([machine_line(result), *summary_parts(result)])


def summary_parts(result: Result) -> list[str]:
    """Tables over all cases, each after a line that says what it is."""
    unit, _, scale = UNITS[result.device]
    contenders = [c for c in result.contenders if c.shape is None]
    parts = []
    if result.device != "cpu":
        with_forward = [c for c in contenders if c.runner.has_backward]
        parts += [
            f"Forward, {unit} (median, interleaved in one run):",
            by_case(result, lambda case, name: median(case, name, scale, FORWARD), with_forward),
        ]
    parts += [
        both(unit),
        by_case(result, lambda case, name: median(case, name, scale), contenders),
        MEMORY,
        by_case(result, mebibytes, contenders),
    ]
    for case in result.cases:
        if sweep := sweep_table(case, scale):
            parts += [
                f"What K costs at {case.case}, {unit}, by the operators alone; K = 2, the least "
                "they take, stands in for plain cross-entropy:",
                sweep,
            ]
    for case in result.cases:
        if launches := launch_table(case, result.contenders, scale):
            parts += [f"Few rows, {case.case}, {unit}, forward and backward:", launches]
    return parts + promises(result)


def csv_text(result: Result) -> str:
    """One line for each case, contender and phase."""

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in result.cases:
        for contender in result.contenders:
            for phase in PHASES:
                name = contender.name
                if (spread := case.spread(name, phase)) is None:
                    continue
                rounds, *seconds = astuple(spread)
                eager = (
                    case.ratio("eager", name, phase, phase) if contender.runner.is_loss else None
                )
                writer.writerow(
                    [
                        *(*astuple(case.case), name, phase, rounds),
                        *(f"{figure:.9f}" for figure in seconds),
                        *(ratio(case.ratio(name, "copy", phase)), ratio(eager)),
                        case.peak(name, phase),
                    ]
                )
    return out.getvalue()
