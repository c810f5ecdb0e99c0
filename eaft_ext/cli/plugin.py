"""``eaft-ext plugin``: where the file lies that a training stack loads by its path."""

from __future__ import annotations

import argparse
from pathlib import Path

PLUGINS = {"ms-swift": Path("ms_swift", "eaft_plugin.py")}
"""Of each training stack, in the folder of the plugins."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``eaft-ext plugin``."""
    parser.add_argument("stack", choices=list(PLUGINS), help="the training stack")


def run(arguments: argparse.Namespace) -> int:
    """Print the path."""
    print(Path(__file__).parents[1] / "plugins" / PLUGINS[arguments.stack])
    return 0
