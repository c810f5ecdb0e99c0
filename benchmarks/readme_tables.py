"""Puts the figures of the newest result files into the README; no figure is typed by hand.

    python benchmarks/readme_tables.py            writes README.md
    python benchmarks/readme_tables.py --check    exits with 1 if that would change it

What stands between ``<!-- benchmark:cpu -->`` and ``<!-- /benchmark:cpu -->`` is replaced, and the
same for ``cuda`` once there is a result file of a GPU, and for ``vocab_parallel`` once there is one
of vocab_parallel.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import vocab_parallel
from cases import SHAPES
from machine import ROOT
from report import bounds_table, summary
from results import FOLDER, Result


def newest(folder: Path) -> dict[str, Result]:
    """The result with the latest date for each block of the README."""
    found: dict[str, Result] = {}
    for device in SHAPES:
        for path in folder.glob(f"{device}-*.json"):
            raw = json.loads(path.read_text())
            is_shared = path.stem.endswith(vocab_parallel.SUFFIX)
            name = vocab_parallel.BLOCK if is_shared else device
            if name not in found or found[name].machine["date"] < raw["machine"]["date"]:
                found[name] = vocab_parallel.read(raw) if is_shared else Result(raw)
    return found


def fill(text: str, name: str, block: str) -> str:
    """The text with its block of a name replaced."""
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        sys.exit(f"the README has no block from {begin} to {end}")
    return f"{before}{begin}\n{block}\n{end}{after}"


def main() -> None:
    """Write or check the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if it would change")
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    arguments = parser.parse_args()
    results = newest(arguments.results)
    if not results:
        sys.exit(f"no result file in {arguments.results}: run benchmarks/run.py first")
    new = text = arguments.readme.read_text()
    for name, result in results.items():
        print(bounds_table(result))
        summarise = vocab_parallel.summary if name == vocab_parallel.BLOCK else summary
        new = fill(new, name, summarise(result))
    if arguments.check:
        if new != text:
            sys.exit(f"{arguments.readme} does not show the newest result file")
    elif new != text:
        arguments.readme.write_text(new)


if __name__ == "__main__":
    main()
