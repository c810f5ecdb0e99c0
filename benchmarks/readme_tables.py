"""Puts the figures of the newest result files into the pages; no figure is typed by hand.

    python benchmarks/readme_tables.py            writes README.md and docs/benchmarks.md
    python benchmarks/readme_tables.py --check    exits with 1 if that would change one

What stands between ``<!-- benchmark:cpu -->`` and ``<!-- /benchmark:cpu -->`` is replaced, and the
same for ``cuda`` once there is a result file of a GPU, for ``vocab_parallel`` once there is one of
vocab_parallel.py, for ``linear`` and ``linear_cuda`` once there are some of linear_loss.py, and for
``scaling`` and ``scaling_cuda`` once there are some of scaling.py, which plots.py draws. All of it
is in docs/benchmarks.md; the README has ``cpu`` and ``cuda`` in short.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import linear_loss
import report
import scaling
import vocab_parallel
from machine import ROOT
from pages import fill
from report import bounds_table
from results import FOLDER, Result


@dataclass(frozen=True)
class Block:
    """A block of a page: whose files it shows, by how their names begin and end, and how."""

    prefix: str
    suffix: str
    read: Callable[[dict[str, Any]], Result]
    summary: Callable[[Result], str]
    in_short: Callable[[Result], str] | None = None


BLOCKS = {
    "cpu": Block("cpu-", "", Result, report.summary, report.in_short),
    "cuda": Block("cuda-", "", Result, report.summary, report.in_short),
    vocab_parallel.BLOCK: Block(
        "cpu-", vocab_parallel.SUFFIX, vocab_parallel.read, vocab_parallel.summary
    ),
    "linear": Block("cpu-", linear_loss.SUFFIX, Result, linear_loss.summary),
    "linear_cuda": Block("cuda-", linear_loss.SUFFIX, Result, linear_loss.summary),
    "scaling": Block("cpu-", scaling.SUFFIX, Result, scaling.summary),
    "scaling_cuda": Block("cuda-", scaling.SUFFIX, Result, scaling.summary),
}
SUFFIXES = sorted({block.suffix for block in BLOCKS.values()}, key=len, reverse=True)
PAGES: dict[str, Callable[[Block], Callable[[Result], str] | None]] = {
    "docs/benchmarks.md": lambda block: block.summary,
    "README.md": lambda block: block.in_short,
}
"""What each page shows of a block; nothing, where that is None."""


def newest(folder: Path) -> dict[str, Result]:
    """The result with the latest date for each block."""
    found: dict[str, Result] = {}
    for name, block in BLOCKS.items():
        for path in folder.glob(f"{block.prefix}*.json"):
            if next(filter(path.stem.endswith, SUFFIXES)) != block.suffix:
                continue  # of another benchmark
            raw = json.loads(path.read_text())
            if name not in found or found[name].machine["date"] < raw["machine"]["date"]:
                found[name] = block.read(raw)
    return found


def main() -> None:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if one would change")
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where README.md is")
    arguments = parser.parse_args()
    results = newest(arguments.results)
    if not results:
        sys.exit(f"no result file in {arguments.results}: run benchmarks/run.py first")
    for name, result in results.items():
        if BLOCKS[name].suffix != scaling.SUFFIX:  # which promises nothing
            print(bounds_table(result))
    for page, form in PAGES.items():
        shown = {name: form(BLOCKS[name]) for name in results}
        texts = {name: show(results[name]) for name, show in shown.items() if show is not None}
        if not texts:
            continue
        path = arguments.root / page
        new = text = path.read_text()
        for name, block in texts.items():
            new = fill(new, f"benchmark:{name}", block, page)
        if new == text:
            continue
        if arguments.check:
            sys.exit(f"{path} does not show the newest result file")
        path.write_text(new)


if __name__ == "__main__":
    main()
