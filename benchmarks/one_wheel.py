"""One wheel under several releases of torch: which suites pass, and the table of docs/building.md.

    python benchmarks/one_wheel.py run eaft_ext-….whl torch-2.10/bin/python torch-2.13/bin/python
    python benchmarks/one_wheel.py page [--check]

Each interpreter is that of an environment of its own, with a torch, numpy, pytest and pytest-xdist.
The wheel is installed into it, and the suites run against what was installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness.device import open_device
from harness.machine import FOLDER, ROOT, commit, describe
from reports.pages import fill
from reports.tables import table

FILE = FOLDER / "one-wheel.json"
PAGE = ROOT / "docs" / "building.md"
SUITES = {
    "values": ["tests/loss/test_parity.py", "tests/loss/test_topk.py"],
    "operators": ["tests/loss/test_operators.py", "tests/loss/test_errors.py"],
    "autograd": ["tests/loss/test_autograd.py", "tests/loss/test_layouts.py"],
    "compile": ["tests/compiled"],
    "linear": ["tests/linear/test_linear.py", "tests/linear/test_linear_autograd.py"],
    "processes": ["tests/parallel/test_vocab_parallel_processes.py"],
}
TOLD = (
    "import json, sys, torch, eaft_ext; print(json.dumps({'torch': torch.__version__, "
    "'python': sys.version.split()[0], 'build': eaft_ext.build_info()}))"
)


def suite(python: Path, paths: list[str]) -> dict[str, Any]:
    """How many of its tests passed, failed and were skipped, and its seconds."""
    begun = time.monotonic()
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Not `python -m pytest`: the sources must not hide what is installed.
        command = [python.parent / "pytest", "-q", "-n", "2", "--dist", "loadfile"]
        command += [f"--junit-xml={report}", *paths]
        subprocess.run(command, cwd=ROOT, check=False)
        counts = ET.parse(report).getroot()[0].attrib
    number = {name: int(counts[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
        "seconds": round(time.monotonic() - begun, 1),
    }


def run(wheel: Path, pythons: list[Path]) -> None:
    """Every suite under every interpreter; of those that were run before, anew."""
    rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    results = {"machine": describe(open_device("cpu")), "rows": rows}
    for python in pythons:
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel]
        subprocess.run([python, *install], check=True)
        told = subprocess.run(
            [python, "-c", TOLD], cwd=wheel.parent, capture_output=True, text=True, check=True
        )
        row = {"wheel": wheel.name, "bytes": wheel.stat().st_size, "commit": commit()}
        row |= json.loads(told.stdout)
        row["suites"] = {name: suite(python, paths) for name, paths in SUITES.items()}
        print(row, flush=True)
        rows[:] = [other for other in rows if _key(other) != _key(row)] + [row]
        FILE.write_text(json.dumps(results, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[str, list[int], str]:
    """By which rows are known and sorted: 2.10 comes after 2.9."""
    release = [int(part) for part in row["torch"].split("+")[0].split(".")]
    return row["wheel"], release, row["torch"]


def block() -> str:
    """The table: rows are releases of torch, columns suites."""
    rows = sorted(json.loads(FILE.read_text())["rows"], key=_key)
    wheels = {
        row["wheel"]: f"`{row['wheel']}` ({row['bytes'] / 1e6:.1f} MB) was built with torch "
        f"{row['build']['torch_version']}."
        for row in rows
    }
    cells = [
        [row["wheel"].split("-")[1], row["torch"], *(_cell(row["suites"][name]) for name in SUITES)]
        for row in rows
    ]
    told = " ".join(wheels.values())
    return f"{told} Tests that passed:\n\n{table(['wheel', 'torch', *SUITES], cells)}"


def _cell(counts: dict[str, int]) -> str:
    failed = f", **{counts['failed']} failed**" if counts["failed"] else ""
    return f"{counts['passed']}{failed}"


def main() -> None:
    """Run, or write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="install the wheel and run the suites")
    runs.add_argument("wheel", type=Path)
    runs.add_argument("pythons", type=Path, nargs="+", metavar="PYTHON")
    page = commands.add_parser("page", help="put the table into docs/building.md")
    page.add_argument("--check", action="store_true", help="only say whether it is there")
    arguments = parser.parse_args()
    if arguments.command == "run":
        # Not resolved: the interpreter of a venv is a link.
        return run(arguments.wheel.resolve(), [path.absolute() for path in arguments.pythons])
    text = PAGE.read_text()
    new = fill(text, "one-wheel", block(), PAGE.name)
    if arguments.check:
        if new != text:
            sys.exit(f"{PAGE.name} is not what {FILE.name} makes it: run {parser.prog} page")
        return None
    PAGE.write_text(new)
    return None


if __name__ == "__main__":
    main()
