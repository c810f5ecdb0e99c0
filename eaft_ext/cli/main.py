"""Entry point of the command ``eaft-ext``: parses the arguments and hands over to a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from eaft_ext.cli import bench, info, plugin
from eaft_ext.cli.demo import command as demo
from eaft_ext.cli.errors import FAILURE, INTERRUPTED, CommandError
from eaft_ext.cli.inspect import command as inspect

COMMANDS: tuple[tuple[str, Any, str], ...] = (
    ("info", info, "print versions, devices and how this copy was built (for a bug report)"),
    ("demo", demo, "fine-tune a small language model with plain cross-entropy and with EAFT"),
    ("inspect", inspect, "show which tokens of a text EAFT mutes, as a model sees them"),
    (
        "bench",
        bench,
        "time, and on a GPU memory, of the loss on this machine, beside PyTorch's own",
    ),
    ("plugin", plugin, "print the path of the file by which a training stack loads the loss"),
)
"""Their names, modules with ``add_arguments`` and ``run``, and what they do."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="eaft-ext",
        description="Entropy-adaptive fine-tuning: token-gated cross-entropy for PyTorch.",
    )
    version = f"eaft-ext {info.installed_version()}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    for name, command, summary in COMMANDS:
        description = f"{summary[0].upper()}{summary[1:]}."
        subparser = commands.add_parser(name, help=summary, description=description)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, program=subparser.prog)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except CommandError as error:
        print(f"{arguments.program}: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("eaft-ext: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
