"""Draws the newest results of scaling.py for docs/benchmarks.md; no point is set by hand.

    python benchmarks/plots.py            writes docs/scaling-<device>.png
    python benchmarks/plots.py --check    exits with 1 if one is not of the newest result

Needs matplotlib.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import scaling
from harness.machine import FOLDER, ROOT
from harness.timing import FORWARD, TOTAL
from matplotlib.figure import Figure
from PIL import Image
from readme_tables import newest
from reports.results import CaseResult, Result

INCHES = (11, 7.6)
DOTS_PER_INCH = 110
# Ours are blue, and drawn over the others; the copy is what they are measured by.
STYLES: dict[str, dict[str, Any]] = {
    "copy": {"color": "black", "linestyle": "--"},
    "gated_ce": {"color": "#4a90d9", "marker": "o", "zorder": 4},
    "gated_ce_inplace": {"color": "#1b4f8a", "marker": "s", "zorder": 5},
    "gated_ce_fused_inplace": {"color": "#0b2545", "marker": "D", "zorder": 6},
    "cross_entropy": {"color": "#8d99ae", "marker": "^"},
    "eager": {"color": "#e76f51", "marker": "v"},
    "liger": {"color": "#2a9d8f", "marker": "P"},
}
# A logarithmic scale has no zero, and less than a few pages is not measured.
LEAST_MIB = 0.01

Value = Callable[[CaseResult, str], float | None]


def gigabytes(of_case: CaseResult, name: str, phase: str) -> float | None:
    """Bandwidth in GB/s; that of a copy is of no vocabulary."""
    rate = scaling.bandwidth(of_case, name, phase)
    return None if rate is None or name == "copy" else rate / 1e9


def milliseconds(of_case: CaseResult, name: str) -> float | None:
    seconds = of_case.median(name)
    return seconds and 1e3 * seconds


def mebibytes(of_case: CaseResult, name: str) -> float | None:
    """Peak memory beyond the inputs; a copy has none."""
    peak = of_case.peak(name)
    return None if peak is None or name == "copy" else max(peak / 2**20, LEAST_MIB)


def draw(result: Result) -> Figure:
    """Bandwidth against the vocabulary; time and peak memory against the rows."""
    figure = Figure(INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    (forward, both), (time, memory) = axes = figure.subplots(2, 2)
    of_one_size, of_one_vocabulary = scaling.by_vocabulary(result), scaling.by_rows(result)
    phases = (forward, FORWARD, "Forward"), (both, TOTAL, "Forward and backward")
    for panel, phase, title in phases:
        plot(panel, result, of_one_size, "vocab_size", partial(gigabytes, phase=phase))
        # Of as many bytes in each case: what differs is the memory that they happen to have.
        copies = [r for of_case in of_one_size if (r := scaling.bandwidth(of_case, "copy", phase))]
        if copies:
            panel.axhline(statistics.median(copies) / 1e9, label="copy", **STYLES["copy"])
        panel.set(title=title, xlabel="vocabulary", ylabel="GB/s", xscale="log", ylim=(0, None))
    for panel, value, title, unit in (
        (time, milliseconds, "Forward and backward", "milliseconds"),
        (memory, mebibytes, "Peak memory beyond the inputs", "MiB"),
    ):
        plot(panel, result, of_one_vocabulary, "num_rows", value)
        panel.set(title=title, xlabel="rows", ylabel=unit, xscale="log", yscale="log")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    # Every contender has a time.
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    machine = result.machine
    dtypes = ", ".join(sorted({of_case.case.dtype for of_case in result.cases}))
    figure.suptitle(f"{machine['model']}, {dtypes}, torch {machine['torch']}")
    return figure


def plot(panel: Any, result: Result, cases: list[CaseResult], along: str, value: Value) -> None:
    for contender in result.contenders:
        points = [
            (getattr(of_case.case, along), found)
            for of_case in cases
            if (found := value(of_case, contender.name)) is not None
        ]
        if points:
            label = contender.title.replace("`", "")
            style = STYLES[contender.name]
            panel.plot(*zip(*points, strict=True), label=label, markersize=5, **style)


def stamp(result: Result) -> str:
    machine = result.machine
    return f"{machine['model']}, commit {machine['commit']}, {machine['date']}"


def main() -> None:
    """Draw or check the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if one is out of date")
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where docs/ is")
    arguments = parser.parse_args()
    found = [result for name, result in newest(arguments.results).items() if "scaling" in name]
    if not found:
        sys.exit(f"no result of scaling.py in {arguments.results}: run benchmarks/scaling.py first")
    for result in found:
        path = arguments.root / scaling.picture(result)
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(result).savefig(path, metadata={"Source": stamp(result)})
        elif not path.exists() or Image.open(path).info.get("Source") != stamp(result):
            sys.exit(f"{path} does not show the newest result: run benchmarks/plots.py")


if __name__ == "__main__":
    main()
