"""Puts the figures of the newest result files into the pages; no figure is typed by hand.

    python benchmarks/readme_tables.py            writes README.md and docs/benchmarks.md
    python benchmarks/readme_tables.py --check    exits with 1 if that would change one

What stands between ``<!-- benchmark:cpu -->`` and ``<!-- /benchmark:cpu -->`` is replaced, and the
same for ``cuda`` once there is a result file of a GPU, for ``vocab_parallel`` once there is one of
vocab_parallel.py, for ``linear`` and ``linear_cuda`` once there are some of linear_loss.py, and for
``scaling`` and ``scaling_cuda`` once there are some of scaling.py, which plots.py draws. All of it
is in docs/benchmarks.md; the README has ``cpu`` and ``cuda`` in short.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import linear_loss
import scaling
import vocab_parallel
from harness.machine import FOLDER, ROOT
from reports import logits
from reports.pages import fill
from reports.results import Result
from reports.tables import bounds_table

Page = Callable[[Result], str]


class Block(NamedTuple):
    """A block of a page: whose files it shows, by how their names begin and end, and how."""

    prefix: str
    suffix: str
    summary: Page
    in_short: Page | None = None


BLOCKS = {
    "cpu": Block("cpu-", "", logits.summary, logits.in_short),
    "cuda": Block("cuda-", "", logits.summary, logits.in_short),
    vocab_parallel.BLOCK: Block("cpu-", vocab_parallel.SUFFIX, vocab_parallel.summary),
    "linear": Block("cpu-", linear_loss.SUFFIX, linear_loss.summary),
    "linear_cuda": Block("cuda-", linear_loss.SUFFIX, linear_loss.summary),
    "scaling": Block("cpu-", scaling.SUFFIX, scaling.summary),
    "scaling_cuda": Block("cuda-", scaling.SUFFIX, scaling.summary),
}
SUFFIXES = sorted({block.suffix for block in BLOCKS.values()}, key=len, reverse=True)
# What each page shows of a block; nothing, where that is None.
PAGES = {"docs/benchmarks.md": "summary", "README.md": "in_short"}


def newest(folder: Path) -> dict[str, Result]:
    found: dict[str, Any] = {}
    for name, block in BLOCKS.items():
        raws = [
            json.loads(path.read_text())
            for path in folder.glob(f"{block.prefix}*.json")
            if next(filter(path.stem.endswith, SUFFIXES)) == block.suffix
        ]
        if raws:
            found[name] = Result(max(raws, key=lambda raw: raw["machine"]["date"]))
    return found


def main() -> None:
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
        shown = {name: getattr(BLOCKS[name], form) for name in results}
        texts = {name: show(results[name]) for name, show in shown.items() if show}
        path = arguments.root / page
        new = text = path.read_text() if texts else ""
        for name, block in texts.items():
            new = fill(new, f"benchmark:{name}", block, page)
        if new != text and arguments.check:
            sys.exit(f"{path} does not show the newest result file")
        if new != text:
            path.write_text(new)


if __name__ == "__main__":
    main()
