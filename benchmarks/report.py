"""Results as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable

from bounds import Bound, evaluate, unmeasured
from cases import TIMES
from contenders import CONTENDERS, SWEEP, Contender
from peers import PEERS
from results import CaseResult, Result
from timing import BACKWARD, FORWARD, GRAPH, LATENCY, PHASES, TOTAL

MISSING = "-"
MIB = 2**20
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


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; all but the first column are aligned to the right."""
    lines = [" | ".join(head)]
    lines.append(" | ".join(["---", *["---:"] * lines[0].count(" | ")]))
    lines.extend(" | ".join(row) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, no exponent; small figures no finer than a hundredth."""
    if value is None:
        return MISSING
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}{unit}"


def median(result: CaseResult, name: str, scale: float, phase: str = TOTAL) -> str:
    """The median of a contender's times in a phase, times a scale; or why there is none."""
    spread = result.spread(name, phase)
    if spread is None and name in result.failed and not result.spread(name):
        return result.failed[name].split(":")[0]
    return number(spread.median * scale if spread else None)


def quartiles(result: CaseResult, name: str, scale: float) -> str:
    """The least total and the quartiles around its median, times a scale."""
    spread = result.spread(name)
    if spread is None:
        return MISSING
    figures = (spread.minimum, spread.lower_quartile, spread.upper_quartile)
    return " / ".join(number(figure * scale) for figure in figures)


def mebibytes(result: CaseResult, name: str, phase: str = TOTAL) -> str:
    """Peak memory beyond the inputs."""
    peak = result.peak(name, phase)
    return number(peak / MIB if peak is not None else None)


def machine_line(result: Result) -> str:
    """Where, when and with what."""
    m = result.machine
    if m["device"] == "cpu":
        hardware = f"{m['threads']} threads on {m['cores']} cores ({m['cpu_capability']})"
    else:
        hardware = f"driver {m['driver']}, CUDA {m['cuda']}"
    commit = f", commit {m['commit']}" if m["commit"] else ""
    beside = [f"{PEERS[module]} {version}" for module, version in m.get("peers", {}).items()]
    return (
        f"{m['model']}, {hardware}, torch {m['torch']}, eaft_ext {m['eaft_ext']}{commit}, "
        + "".join(f"{peer}, " for peer in beside)
        + f"{m['date'][:10]}."
    )


def bounds_table(result: Result) -> str:
    """The promises and whether they were held."""

    def row(bound: Bound, measured: float) -> list[str]:
        return [
            f"{bound.case or 'all cases'}: {bound.promise}",
            f"{'≥' if bound.at_least else '≤'} {bound.limit:g}{bound.unit}",
            number(measured, bound.unit),
            "held" if bound.holds(measured) else "missed",
        ]

    rows = [row(bound, measured) for bound, measured in evaluate(result)]
    return table(["promise", "bound", "measured", ""], rows) if rows else ""


def bounds_not_measured(result: Result) -> str:
    """The promises that a GPU's result is silent about; "" if there are none, or nothing else."""
    missing = unmeasured(result)
    if result.machine["device"] == "cpu" or not missing or not evaluate(result):
        return ""
    return "Not measured: " + "; ".join(bound.promise for bound in missing) + "."


def case_table(result: CaseResult, device: str) -> str:
    """Everything about one case."""
    _, unit, scale = UNITS[device]
    head = ["", f"forward, {unit}", f"backward, {unit}", f"both, {unit}", "min / quartiles"]
    head += [f"both, {TIMES} copy", "eager ÷ this", "peak forward, MiB", "peak, MiB"]
    rows = [
        [
            contender.title,
            median(result, contender.name, scale, FORWARD),
            median(result, contender.name, scale, BACKWARD),
            median(result, contender.name, scale),
            quartiles(result, contender.name, scale),
            number(result.ratio(contender.name, "copy")),
            number(result.ratio("eager", contender.name) if contender.is_loss else None),
            mebibytes(result, contender.name, FORWARD),
            mebibytes(result, contender.name),
        ]
        for contender in result.contenders
    ]
    return table(head, rows)


def utilisation_table(result: CaseResult) -> str:
    """How busy the cores are."""
    rows = [
        [
            contender.title,
            f"{number(measured['cores_busy'])} of {measured['threads']}",
            number(measured["gain_over_one_thread"], TIMES),
        ]
        for contender in result.contenders
        if (measured := result.utilisation.get(contender.name))
    ]
    return table(["", "cores busy", "faster than one thread"], rows) if rows else ""


def launch_table(result: CaseResult, scale: float) -> str:
    """Few rows on a GPU, called in three ways; "" where that was not measured."""
    contenders = [c for c in result.contenders if result.spread(c.name, LATENCY)]
    rows = [
        [contender.title, *(median(result, contender.name, scale, phase) for phase in LAUNCHES)]
        for contender in contenders
    ]
    return table(["", *LAUNCHES.values()], rows) if rows else ""


def sweep_table(result: CaseResult, scale: float) -> str:
    """What k costs, by the operators alone; "" where that was not measured."""
    rows = [
        [
            f"K = {k}",
            *(median(result, name, scale, phase) for phase in (FORWARD, BACKWARD, TOTAL)),
            number(result.quotient((name, FORWARD), (SWEEP[2], FORWARD)), TIMES),
            number(result.quotient((name, TOTAL), (SWEEP[2], TOTAL)), TIMES),
        ]
        for k, name in SWEEP.items()
        if result.spread(name)
    ]
    head = ["", "forward", "backward", "both", "forward, of K = 2", "both, of K = 2"]
    return table(head, rows) if rows else ""


def failures(failed: dict[str, str]) -> str:
    """What has no times, and why."""
    return "\n".join(f"- without {name}: {reason}" for name, reason in failed.items())


def markdown(result: Result) -> str:
    """The whole report."""
    device = result.machine["device"]
    parts = [
        "# Benchmark of `gated_ce`",
        machine_line(result),
        "Medians of calls interleaved in one run, on inputs that are not in the cache. Forward is "
        "the call of the loss, backward is `.backward()` of the scalar it gives. Memory is the "
        f"measured peak beyond the inputs. {TIMES} copy: over the copy into existing memory.",
    ]
    if device != "cpu":
        parts += [ON_A_GPU, "## In short", *summary_parts(result)]
    for case in result.cases:
        logits = number(case.case.logits_bytes / MIB)
        rounds = max(spread.rounds for c in case.contenders if (spread := case.spread(c.name)))
        parts.append(f"## {case.case}")
        line = f"Logits of {logits} MiB, {rounds} rounds."
        if device != "cpu" and case.copy_bytes_per_second:
            line += f" The copy moves {case.copy_bytes_per_second / 1e12:.2f} TB/s."
        parts += [line, case_table(case, device)]
        if busy := utilisation_table(case):
            parts += ["Cores in use, forward and backward (`utilisation.py` says how):", busy]
    for failed_case, failed in result.failed.items():
        if failed:
            parts += [f"{failed_case}:", failures(failed)]
    if device == "cpu" and (bounds := bounds_table(result)):
        parts += ["## Promises", bounds]
    return "\n\n".join(parts) + "\n"


def by_case(
    cases: Iterable[CaseResult],
    contenders: list[Contender],
    cell: Callable[[CaseResult, str], str],
) -> str:
    """A row for each case, a column for each contender."""
    head = ["", *(c.title for c in contenders)]
    rows = [[str(case.case), *(cell(case, c.name) for c in contenders)] for case in cases]
    return table(head, rows)


def in_short(result: Result) -> str:
    """The largest vocabulary alone, for the README: a row for each loss."""
    unit, _, scale = UNITS[result.machine["device"]]
    in_order = sorted(result.cases, key=lambda case: (case.case.vocab_size, case.case.num_rows))
    largest = {case.case.dtype: case for case in in_order}
    names = {name for case in largest.values() for name in case.seconds}
    losses = [c for c in CONTENDERS if c.name in names and c.is_loss and c.shape is None]
    head = [f"{case.case}, {what}" for case in largest.values() for what in (unit, "MiB")]
    rows = [
        [
            contender.title,
            *(
                cell
                for case in largest.values()
                for cell in (
                    median(case, contender.name, scale),
                    mebibytes(case, contender.name),
                )
            ),
        ]
        for contender in losses
    ]
    what = "Forward and backward together: median time, and measured peak memory beyond the inputs:"
    return "\n\n".join([machine_line(result), what, table(["", *head], rows)])


def summary(result: Result) -> str:
    """Tables over all cases, for the page of benchmarks."""
    return "\n\n".join([machine_line(result), *summary_parts(result)])


def summary_parts(result: Result) -> list[str]:
    """Tables over all cases, each after a line that says what it is."""
    device, cases = result.machine["device"], result.cases
    unit, _, scale = UNITS[device]
    names = {name for case in cases for name in case.seconds}
    contenders = [c for c in CONTENDERS if c.name in names and c.shape is None]
    parts = []
    if device != "cpu":
        with_forward = [c for c in contenders if c.runner.has_backward]
        parts += [
            f"Forward, {unit} (median, interleaved in one run):",
            by_case(
                result.cases, with_forward, lambda case, name: median(case, name, scale, FORWARD)
            ),
        ]
    parts += [
        f"Forward and backward together, {unit} (median, interleaved in one run):",
        by_case(cases, contenders, lambda case, name: median(case, name, scale)),
        "Peak memory beyond the inputs, MiB (measured):",
        by_case(cases, contenders, mebibytes),
    ]
    for case in cases:
        if sweep := sweep_table(case, scale):
            parts += [
                f"What K costs at {case.case}, {unit}, by the operators alone; K = 2, the least "
                "they take, stands in for plain cross-entropy:",
                sweep,
            ]
    for case in cases:
        if launches := launch_table(case, scale):
            parts += [f"Few rows, {case.case}, {unit}, forward and backward:", launches]
    if bounds := bounds_table(result):
        parts += ["What was promised, and what came out:", bounds]
    if missing := bounds_not_measured(result):
        parts.append(missing)
    return parts


def csv_text(result: Result) -> str:
    """One line for each case, contender and phase."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in result.cases:
        for contender in case.contenders:
            for phase in PHASES:
                spread = case.spread(contender.name, phase)
                if spread is None:
                    continue
                eager = case.spread("eager", phase) if contender.is_loss else None
                writer.writerow(
                    [
                        case.case.num_rows,
                        case.case.vocab_size,
                        case.case.dtype,
                        contender.name,
                        phase,
                        spread.rounds,
                        *(
                            f"{s:.9f}"
                            for s in (
                                spread.minimum,
                                spread.lower_quartile,
                                spread.median,
                                spread.upper_quartile,
                            )
                        ),
                        _ratio(case.ratio(contender.name, "copy", phase)),
                        _ratio(eager.median / spread.median if eager else None),
                        case.peak(contender.name, phase),
                    ]
                )
    return out.getvalue()


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
