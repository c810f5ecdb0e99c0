"""Puts what the result files say into docs/paper.md and the README, and draws the plots."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.machine import FOLDER, ROOT
from PIL import Image
from reports.pages import fill

from . import dropping, fidelity, frontiers, knowledge, muted, plots, regions, report, step
from .study import ARMS

PAGE, README = "docs/paper.md", "README.md"
Block = Callable[[Any], str]
BLOCKS: dict[str, dict[str, Block]] = {
    fidelity.FILE: {"fidelity": report.fidelity, "costs": report.costs},
    regions.FILE: {"regions": report.regions},
    dropping.FILE: {"dropping": report.dropping},
    muted.FILE: {"muted": report.muted},
    step.FILE: {"step": report.step},
    knowledge.FILE: {"knowledge": report.knowledge},
    frontiers.FILE: {
        "study": report.study,
        "verdict": report.sentences,
        "precision": report.precision,
        "rates": report.rates,
        "beyond": report.beyond,
        "edits": report.edits,
        **{f"ends-{arm}": lambda results, arm=arm: report.ends(results, arm) for arm in ARMS},
        **{
            f"verdicts-{arm}": lambda results, arm=arm: report.verdicts(results, arm)
            for arm in ARMS
        },
    },
}
PLOTS = {
    frontiers.FILE: ("docs/paper-frontiers.png", plots.frontiers),
    regions.FILE: ("docs/paper-regions.png", plots.regions),
    muted.FILE: ("docs/paper-muted.png", plots.muted),
}
"""Each has in it of which result it is, so that an old one is found out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where docs/ is")
    parser.add_argument("--check", action="store_true", help="exit with 1 if one would change")


def run(arguments: argparse.Namespace) -> int:
    """Write, or check, both pages and the plots."""
    found = {
        name: json.loads((arguments.results / name).read_text())
        for name in BLOCKS
        if (arguments.results / name).exists()
    }
    for page in (PAGE, README):
        path = arguments.root / page
        new = text = path.read_text()
        for file, blocks in BLOCKS.items():
            for name, block in blocks.items():
                if page == PAGE or name == "verdict":
                    shown = block(found[file]) if file in found else report.NOTHING
                    new = fill(new, f"paper:{name}", shown, page)
        if new != text and arguments.check:
            sys.exit(f"{path} does not show {', '.join(found)}")
        if new != text:
            path.write_text(new)
    for file, (picture, draw) in PLOTS.items():
        if file not in found:
            continue
        path, stamp = arguments.root / picture, plots.stamp(found[file])
        if not arguments.check:
            draw(found[file]).savefig(path, metadata={plots.STAMP: stamp})
        elif not path.exists() or Image.open(path).info.get(plots.STAMP) != stamp:
            sys.exit(f"{path} is not of {file}")
    return 0
