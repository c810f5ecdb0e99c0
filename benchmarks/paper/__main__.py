"""The claims of the paper, one command each."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paper import dropping, fidelity, frontiers, knowledge, muted, page, regions, step

COMMANDS = {
    "fidelity": fidelity,
    "frontiers": frontiers,
    "knowledge": knowledge,
    "regions": regions,
    "dropping": dropping,
    "muted": muted,
    "step": step,
    "page": page,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/paper", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
