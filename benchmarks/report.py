"""Results as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from bounds import Bound, evaluate
from cases import TIMES
from contenders import CONTENDERS
from results import CaseResult, Result
from timing import BACKWARD, FORWARD, TOTAL

MISSING = "-"
MIB = 2**20
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


def milliseconds(result: CaseResult, name: str, phase: str = TOTAL) -> str:
    """The median of a contender's times in a phase."""
    spread = result.spread(name, phase)
    return number(spread.median * 1e3 if spread else None)


def quartiles(result: CaseResult, name: str) -> str:
    """The least total and the quartiles around its median."""
    spread = result.spread(name)
    if spread is None:
        return MISSING
    figures = (spread.minimum, spread.lower_quartile, spread.upper_quartile)
    return " / ".join(number(figure * 1e3) for figure in figures)


def mebibytes(result: CaseResult, name: str, phase: str = TOTAL) -> str:
    """Peak memory beyond the inputs."""
    peak = result.peak(name, phase)
    return number(peak / MIB if peak is not None else None)


def machine_line(result: Result) -> str:
    """Where, when and with what."""
    m = result.machine
    commit = f", commit {m['commit']}" if m["commit"] else ""
    return (
        f"{m['model']}, {m['threads']} threads on {m['cores']} cores ({m['cpu_capability']}), "
        f"torch {m['torch']}, eaft_ext {m['eaft_ext']}{commit}, {m['date'][:10]}."
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


def case_table(result: CaseResult) -> str:
    """Everything about one case."""
    head = ["", "forward, ms", "backward, ms", "both, ms", "min / quartiles", f"both, {TIMES} copy"]
    head += ["eager ÷ this", "peak forward, MiB", "peak, MiB"]
    rows = [
        [
            contender.title,
            milliseconds(result, contender.name, FORWARD),
            milliseconds(result, contender.name, BACKWARD),
            milliseconds(result, contender.name),
            quartiles(result, contender.name),
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


def markdown(result: Result) -> str:
    """The whole report."""
    parts = [
        "# Benchmark of `gated_ce`",
        machine_line(result),
        "Medians of calls interleaved in one run, on inputs that are not in the cache. Forward is "
        "the call of the loss, backward is `.backward()` of the scalar it gives. Memory is the "
        f"measured peak beyond the inputs. {TIMES} copy: over the copy into existing memory.",
    ]
    for case in result.cases:
        logits = number(case.case.logits_bytes / MIB)
        rounds = max(spread.rounds for c in case.contenders if (spread := case.spread(c.name)))
        parts.append(f"## {case.case}")
        parts.append(f"Logits of {logits} MiB, {rounds} rounds.")
        parts.append(case_table(case))
        if busy := utilisation_table(case):
            parts += ["Cores in use, forward and backward (`utilisation.py` says how):", busy]
    if bounds := bounds_table(result):
        parts += ["## Promises", bounds]
    return "\n\n".join(parts) + "\n"


def summary(result: Result) -> str:
    """The short form for the README."""
    names = {name for case in result.cases for name in case.seconds}
    columns = [c for c in CONTENDERS if c.name in names]
    head = ["", *(c.title for c in columns)]
    times, peaks = [], []
    for case in result.cases:
        times.append([str(case.case), *(milliseconds(case, c.name) for c in columns)])
        peaks.append([str(case.case), *(mebibytes(case, c.name) for c in columns)])
    parts = [
        machine_line(result),
        "Forward and backward together, milliseconds (median, interleaved in one run):",
        table(head, times),
        "Peak memory beyond the inputs, MiB (measured):",
        table(head, peaks),
    ]
    if bounds := bounds_table(result):
        parts += ["What was promised, and what came out:", bounds]
    return "\n\n".join(parts)


def csv_text(result: Result) -> str:
    """One line for each case, contender and phase."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in result.cases:
        for contender in case.contenders:
            for phase in (FORWARD, BACKWARD, TOTAL):
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
