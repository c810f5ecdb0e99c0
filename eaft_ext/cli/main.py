"""Entry point of the command ``eaft-ext``: parses the arguments and hands over to a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eaft_ext.cli import info
from eaft_ext.cli.demo import command as demo

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it (128 + SIGINT)."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="eaft-ext",
        description="Entropy-adaptive fine-tuning: token-gated cross-entropy for PyTorch.",
    )
    version = f"eaft-ext {info.installed_version()}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    summary = "print versions, devices and how this copy was built (for a bug report)"
    subparser = commands.add_parser("info", help=summary, description=f"P{summary[1:]}.")
    info.add_arguments(subparser)
    subparser.set_defaults(run=info.run)

    summary = "fine-tune a small language model with plain cross-entropy and with EAFT"
    subparser = commands.add_parser(
        "demo",
        help=summary,
        description=f"F{summary[1:]}, and compare what it learns and what it forgets.",
    )
    demo.add_arguments(subparser)
    subparser.set_defaults(run=demo.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("eaft-ext: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
