"""Tables in Markdown, and what the reports of all benchmarks have in common."""

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

from contenders.contender import Contender
from contenders.peers import PEERS
from harness.progress import Progress
from harness.timing import BACKWARD, FORWARD, TOTAL

from . import bounds
from .bounds import Bound
from .results import CaseResult, Result

MISSING = "-"
MIB = 2**20


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; all but the first column are aligned to the right."""
    lines = [" | ".join(head)]
    lines.append(" | ".join(["---", *["---:"] * lines[0].count(" | ")]))
    lines.extend(" | ".join(row) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def by_case(
    result: Result,
    cell: Callable[[CaseResult, str], str],
    contenders: Sequence[Contender] | None = None,
    cases: Sequence[CaseResult] | None = None,
) -> str:
    """A row for each case, a column for each contender; unless told, for all that there are."""
    contenders = result.contenders if contenders is None else contenders
    rows = [
        [str(of_case.case), *(cell(of_case, c.name) for c in contenders)]
        for of_case in (result.cases if cases is None else cases)
    ]
    return table(["", *(c.title for c in contenders)], rows)


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, no exponent; small figures no finer than a hundredth."""
    if value is None:
        return MISSING
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}{unit}"


def median(result: CaseResult, name: str, scale: float = 1e3, phase: str = TOTAL) -> str:
    """The median of a contender's times in a phase, times a scale; or why there is none."""
    seconds = result.median(name, phase)
    if name in result.failed and not (seconds or result.times(name)):
        return result.failed[name].split(":")[0]
    return number(seconds and seconds * scale)


def each_phase(result: Result) -> list[str]:
    """Milliseconds of forward and backward, where they can be told apart."""

    def cell(of_case: CaseResult, name: str) -> str:
        if not of_case.times(name, FORWARD):
            return MISSING
        return " + ".join(median(of_case, name, phase=phase) for phase in (FORWARD, BACKWARD))

    return ["Forward + backward, each by itself, milliseconds:", by_case(result, cell)]


def times(
    result: Result, unit: str = "milliseconds", scale: float = 1e3, phase: str = TOTAL, **only: Any
) -> list[str]:
    """The medians in a phase; of some contenders or cases only, if so told."""
    what = "Forward" if phase == FORWARD else "Forward and backward together"
    cells = by_case(result, lambda of_case, name: median(of_case, name, scale, phase), **only)
    return [f"{what}, {unit} (median, interleaved in one run):", cells]


def memory(result: Result, **only: Any) -> list[str]:
    what = "Peak memory beyond the inputs, MiB (measured):"
    return [what, by_case(result, mebibytes, **only)]


def mebibytes(result: CaseResult, name: str, phase: str = TOTAL) -> str:
    peak = result.peak(name, phase)
    return number(peak / MIB if peak is not None else None)


def machine_line(result: Result) -> str:
    m = result.machine
    if result.device == "cpu":
        hardware = f"{m['threads']} threads on {m['cores']} cores ({m['cpu_capability']})"
    else:
        hardware = f"driver {m['driver']}, CUDA {m['cuda']}"
    commit = f", commit {m['commit']}" if m["commit"] else ""
    parts = [m["model"], hardware, f"torch {m['torch']}", f"eaft_ext {m['eaft_ext']}{commit}"]
    parts += [f"{PEERS[module]} {version}" for module, version in m.get("peers", {}).items()]
    return ", ".join([*parts, f"{m['date'][:10]}."])


def bounds_table(result: Result) -> str:
    def row(bound: Bound, measured: float) -> list[str]:
        limit = f"{'≥' if bound.at_least else '≤'} {bound.limit:g}{bound.unit}"
        verdict = "held" if bound.holds(measured) else "missed"
        promise = f"{bound.case or 'all cases'}: {bound.promise}"
        return [promise, limit, number(measured, bound.unit), verdict]

    rows = [row(*measured) for measured in bounds.evaluate(result)]
    return table(["promise", "bound", "measured", ""], rows) if rows else ""


def promises(result: Result) -> list[str]:
    """The same after a line that says so, and those that a GPU's result is silent about."""
    found = bounds_table(result)
    if not found:
        return []
    parts = ["What was promised, and what came out:", found]
    missing = "; ".join(bound.promise for bound in bounds.unmeasured(result))
    if missing and result.device != "cpu":
        parts.append(f"Not measured: {missing}.")
    return parts


def failures(result: Result, heading: str = "## What failed at {}") -> list[str]:
    parts = []
    for case, failed in filter(itemgetter(1), result.failed.items()):
        lines = [f"- without {name}: {reason}" for name, reason in failed.items()]
        parts += [heading.format(case), "\n".join(lines)]
    return parts


def text(parts: Iterable[str]) -> str:
    return "\n\n".join(parts)


def write_report(
    progress: Progress, markdown: Callable[[Result], str], has_bounds: bool = True
) -> str:
    """The report, also written beside the result file."""
    result = Result(progress.raw)
    if has_bounds:
        progress.raw["bounds"] = bounds.as_json(result)
    progress.write()
    report = f"{markdown(result)}\n"
    progress.path.with_suffix(".md").write_text(report)
    return report
