"""The report of run.py: of losses of logits."""

import statistics

from contenders.cases import TIMES
from contenders.contender import Contender
from contenders.logits import SWEEP
from harness.timing import BACKWARD, FORWARD, GRAPH, LATENCY, TOTAL

from . import tables
from .results import CaseResult, Result
from .tables import MIB, mebibytes, median, number, table

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


def quartiles(result: CaseResult, name: str, scale: float) -> str:
    """The least total and the quartiles around its median, times a scale."""
    times = result.times(name)
    two = times * 2 if len(times) == 1 else times
    lower, _, upper = statistics.quantiles(two, method="inclusive")
    return " / ".join(number(figure * scale) for figure in (min(times), lower, upper))


def case_table(result: CaseResult, contenders: list[Contender], device: str) -> str:
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
            *(mebibytes(result, name, phase) for phase in (FORWARD, TOTAL)),
        ]
        for contender in contenders
        if (name := contender.name) in result.seconds
    ]
    return table(head, rows)


def utilisation_table(result: CaseResult, contenders: list[Contender]) -> str:
    """How busy the cores are; "", as of the tables below, where that was not measured."""
    rows = []
    for contender in contenders:
        if measured := result.utilisation.get(contender.name):
            busy = f"{number(measured['cores_busy'])} of {measured['threads']}"
            rows.append([contender.title, busy, number(measured["gain_over_one_thread"], TIMES)])
    return table(["", "cores busy", "faster than one thread"], rows) if rows else ""


def launch_table(result: CaseResult, contenders: list[Contender], scale: float) -> str:
    rows = [
        [contender.title, *(median(result, contender.name, scale, phase) for phase in LAUNCHES)]
        for contender in contenders
        if result.times(contender.name, LATENCY)
    ]
    return table(["", *LAUNCHES.values()], rows) if rows else ""


def sweep_table(result: CaseResult, scale: float) -> str:
    rows = []
    for k, name in SWEEP.items():
        if result.times(name):
            times = [median(result, name, scale, phase) for phase in (FORWARD, BACKWARD, TOTAL)]
            of_two = [result.ratio(name, SWEEP[2], phase, phase) for phase in (FORWARD, TOTAL)]
            rows.append([f"K = {k}", *times, *(number(ratio, TIMES) for ratio in of_two)])
    head = ["", "forward", "backward", "both", "forward, of K = 2", "both, of K = 2"]
    return table(head, rows) if rows else ""


def markdown(result: Result) -> str:
    on_gpu = result.device != "cpu"
    parts = [
        "# Benchmark of `gated_ce`",
        tables.machine_line(result),
        "Medians of calls interleaved in one run, on inputs that are not in the cache. Forward is "
        "the call of the loss, backward is `.backward()` of the scalar it gives. Memory is the "
        f"measured peak beyond the inputs. {TIMES} copy: over the copy into existing memory.",
    ]
    if on_gpu:
        parts += [ON_A_GPU, "## In short", *summary_parts(result)]
    for case in result.cases:
        rounds = max(len(case.times(name)) for name in case.seconds)
        line = f"Logits of {number(case.case.logits_bytes / MIB)} MiB, {rounds} rounds."
        if on_gpu and case.copy_bytes_per_second:
            line += f" The copy moves {case.copy_bytes_per_second / 1e12:.2f} TB/s."
        parts += [f"## {case.case}", line, case_table(case, result.contenders, result.device)]
        if busy := utilisation_table(case, result.contenders):
            parts += ["Cores in use, forward and backward (`utilisation.py` says how):", busy]
    parts += tables.failures(result, "{}:")
    if not on_gpu and (found := tables.bounds_table(result)):
        parts += ["## Promises", found]
    return tables.text(parts)


def in_short(result: Result) -> str:
    """The largest vocabulary alone, for the README: a row for each loss."""
    unit, _, scale = UNITS[result.device]
    in_order = sorted(result.cases, key=lambda case: (case.case.vocab_size, case.case.num_rows))
    largest = {case.case.dtype: case for case in in_order}.values()
    head, rows = [""], []
    for case in largest:
        head += [f"{case.case}, {unit}", f"{case.case}, MiB"]
    for contender in result.contenders:
        name, is_loss = contender.name, contender.runner.is_loss and contender.shape is None
        if is_loss and any(name in case.seconds for case in largest):
            rows.append([contender.title])
            for case in largest:
                rows[-1] += [median(case, name, scale), mebibytes(case, name)]
    what = "Forward and backward together: median time, and measured peak memory beyond the inputs:"
    return tables.text([tables.machine_line(result), what, table(head, rows)])


def summary(result: Result) -> str:
    return tables.text([tables.machine_line(result), *summary_parts(result)])


def summary_parts(result: Result) -> list[str]:
    unit, _, scale = UNITS[result.device]
    contenders = [c for c in result.contenders if c.shape is None]
    parts = []
    if result.device != "cpu":
        with_forward = [c for c in contenders if c.runner.has_backward]
        parts += tables.times(result, unit, scale, FORWARD, contenders=with_forward)
    parts += tables.times(result, unit, scale, contenders=contenders)
    parts += tables.memory(result, contenders=contenders)
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
    return parts + tables.promises(result)
