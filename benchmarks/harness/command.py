"""What the command lines of the benchmarks have in common."""

import argparse
import re
from functools import partial
from pathlib import Path
from typing import Any

from contenders.cases import DTYPES

from eaft_ext.cli.options import positive_int

from .machine import FOLDER

EXAMPLE = "512x151936"


def parser_of(text: str | None) -> argparse.ArgumentParser:
    summary, _, details = (text or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_measured(parser: argparse.ArgumentParser, form: str, example: str, repeats: Any) -> None:
    """Add what is measured, and where it is written to; a shape has a form, such as NxV."""
    add, shape = parser.add_argument, partial(sizes, example=example)
    like = f"such as {example}, any number"
    add("--shapes", type=shape, nargs="+", metavar=form, help=like)
    add("--dtypes", nargs="+", choices=DTYPES)
    add("--repeats", type=positive_int, help=f"rounds of each case (default {repeats})")
    add("--quick", action="store_true", help="one small shape, few rounds, without torch.compile")
    add("--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results")


def set_measured(
    arguments: argparse.Namespace, shapes: Any, quick_shapes: Any, dtypes: Any, repeats: int
) -> argparse.Namespace:
    """What the command line did not say."""
    arguments.shapes = arguments.shapes or (quick_shapes if arguments.quick else shapes)
    arguments.dtypes = arguments.dtypes or dtypes
    arguments.repeats = arguments.repeats or (3 if arguments.quick else repeats)
    return arguments


def sizes(text: str, example: str) -> tuple[int, ...]:
    if not re.fullmatch(re.sub(r"\d+", r"[1-9]\\d*", example), text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like {example}")
    return tuple(map(int, text.split("x")))
