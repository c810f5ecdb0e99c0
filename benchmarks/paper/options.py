"""The options that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from harness.machine import FOLDER

from . import texts
from .study import PRESETS


def add_study(parser: argparse.ArgumentParser, file: str) -> None:
    """Add those of a command that trains: how much, on what, which model, and where to."""
    parser.add_argument(
        "--preset", choices=PRESETS, default="small", help="how much (default: %(default)s)"
    )
    add_data(parser, (texts.TRAIN, texts.TARGET, texts.DRIFT))
    add_model(parser, file)


def add_data(parser: argparse.ArgumentParser, files: Iterable[str]) -> None:
    """Add the folder of the data sets."""
    words = f"folder of {', '.join(files)}"
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help=words)


def add_model(parser: argparse.ArgumentParser, file: str) -> None:
    """Add the model, and the folder of the result file."""
    parser.add_argument(
        "--model", help="transformers model folder or hub name (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--output", type=Path, default=FOLDER, metavar="DIR", help=f"folder of {file}"
    )
