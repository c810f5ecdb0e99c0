"""What the library was tried with, and what it survived: properties, faults, fuzzers, long runs.

    python benchmarks/robustness.py                     runs all, an hour and a half
    python benchmarks/robustness.py --only soak         a part, beside what is known of the others
    python benchmarks/robustness.py --examples 2000     calls of each property (default 1000)
    python benchmarks/robustness.py --fuzz 60           seconds of each fuzzer (default 1200)
    python benchmarks/robustness.py --write             puts the table into docs/robustness.md
    python benchmarks/robustness.py --check             exits with 1 if that would change the page

It runs tests/fuzz and tests/faults, tests/faults/soak.py and .ci/sanitize, and counts what ran. The
counts are in benchmarks/results/robustness.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from harness.command import parser_of
from harness.device import open_device
from harness.machine import FOLDER, ROOT, commit, describe
from reports.pages import fill
from reports.tables import number, table

RESULT = FOLDER / "robustness.json"
PAGE = ROOT / "docs" / "robustness.md"
EXAMPLES, STEPS, FUZZ_SECONDS = 1000, 20_000, 1200
SOAK = ROOT / "tests" / "faults" / "soak.py"
MIB = 2**20

# Parts of the file, in the order of the page: what is counted of each.
ROWS = {
    "properties": "property examples",
    "faults": "injected faults survived",
    "soak": "steps of the longest training",
    "sanitizers": "fuzzers' inputs, with sanitizers",
}
KINDS = {
    "test_no_memory": "no memory, at every allocation of every call",
    "test_processes": "a process dies, raises, is late or differs",
    "test_threads_and_forks": "threads, forks, workers, the end of the interpreter",
    "test_signals": "signals and Ctrl-C",
    "test_downloads": "interrupted downloads, caches that refuse",
}


def _pytest(*arguments: object, **environment: str) -> tuple[bool, ElementTree.Element]:
    """Run it; whether all passed, and its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | environment)
        return done.returncode == 0, ElementTree.parse(report).getroot()


def _failed(report: ElementTree.Element) -> list[str]:
    """The tests that did not pass."""
    wrong = ("failure", "error")
    return [
        case.get("name", "")
        for case in report.iter("testcase")
        if any(case.find(kind) is not None for kind in wrong)
    ]


def properties(asked: Namespace) -> dict[str, Any]:
    """Every property of tests/fuzz, with so many drawn calls."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        given = {"EAFT_EXT_FUZZ_EXAMPLES": str(asked.examples)}
        _, report = _pytest("tests/fuzz", EAFT_EXT_FUZZ_COUNTS=str(counts), **given)
        tried: dict[str, int] = json.loads(counts.read_text())
    return {"count": sum(tried.values()), "of_each": tried, "failed": _failed(report)}


def faults(_: Namespace) -> dict[str, Any]:
    """Every fault of tests/faults; of the memory, each allocation that failed."""
    _, report = _pytest("tests/faults", "--slow", f"--ignore={SOAK.with_name('test_soak.py')}")
    failed = _failed(report)
    counts: Counter[str] = Counter()
    for case in report.iter("testcase"):
        kind = case.get("classname", "").rpartition(".")[2]
        told = case.find("./properties/property[@name='faults']")
        if case.get("name") not in failed and case.find("skipped") is None:
            counts[kind] += 1 if told is None else int(told.get("value", "0"))
    return {"count": sum(counts.values()), "of_each": dict(counts), "failed": failed}


def soak(asked: Namespace) -> dict[str, Any]:
    """A long training, in a process of its own."""
    done = subprocess.run([sys.executable, SOAK, str(asked.steps)], capture_output=True, text=True)
    if not done.stdout:
        sys.exit(done.stderr)
    found = json.loads(done.stdout)
    return {
        "count": asked.steps,
        "failed": list(filter(None, done.stderr.splitlines())),
        "found": found,
    }


def sanitizers(asked: Namespace) -> dict[str, Any]:
    """The C++ under sanitizers, of which the fuzzers take the time."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [ROOT / ".ci" / "sanitize", "--seconds", asked.fuzz, "--output", output]
        subprocess.run(list(map(str, command)), check=False)
        parts = json.loads(output.read_text())["parts"]
    return {
        "count": sum(part["count"] for part in parts if part["what"] in ("inputs", "calls")),
        "of_each": parts,
        "failed": [part["part"] for part in parts if part["reports"]],
    }


PARTS = {"properties": properties, "faults": faults, "soak": soak, "sanitizers": sanitizers}


def _measured(name: str, asked: Namespace) -> dict[str, Any]:
    tried, begun = commit(), time.monotonic()  # before it can change
    found = PARTS[name](asked)
    return found | {
        "seconds": round(time.monotonic() - begun, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": tried,
    }


def _stored() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def _store(name: str, part: dict[str, Any]) -> None:
    """Beside what is there by now, of programs that run at the same time."""
    raw = _stored() | {"machine": describe(open_device("cpu")), name: part}
    unfinished = RESULT.with_suffix(".part")
    unfinished.write_text(json.dumps(raw, indent=1) + "\n")
    unfinished.replace(RESULT)


def _details(name: str, part: dict[str, Any]) -> str:
    if name == "properties":
        return f"{len(part['of_each'])} properties"
    if name == "faults":
        return "; ".join(f"{KINDS[kind]}: {n:,}" for kind, n in part["of_each"].items())
    if name == "soak":
        found = part["found"]
        steps = ", ".join(map(str, found["step_us"]))
        grown = (found["bytes"][-1] - found["bytes"][0]) / MIB
        return (
            f"memory {grown:+.2f} MiB after the first tenth, handles "
            f"{found['handles'][0]} → {found['handles'][-1]}, threads {found['threads'][0]} → "
            f"{found['threads'][-1]}, µs of processor time a step in each tenth: {steps}"
        )
    return "; ".join(
        f"{one['part']}: {one['count']:,} {one['what']}"
        + (f", {one['edges']:,} edges covered" if "edges" in one else "")
        for one in part["of_each"]
    )


def summary(raw: dict[str, Any]) -> str:
    """The table of the page."""
    machine = raw["machine"]
    rows = [
        [
            title,
            f"{raw[name]['count']:,}",
            f"{len(raw[name]['failed'])}",
            number(raw[name]["seconds"] / 60),
            f"{raw[name]['commit']}, {raw[name]['date'][:10]}",
            _details(name, raw[name]),
        ]
        for name, title in ROWS.items()
        if name in raw
    ]
    head = ["", "how many", "failed", "minutes", "commit", "of which"]
    where = f"{machine['model']}, {machine['cores']} cores, torch {machine['torch']}."
    return f"{where}\n\n{table(head, rows)}"


def main() -> int:
    """Run, write or check."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=[*PARTS])
    parser.add_argument("--examples", type=int, default=EXAMPLES, metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of the training")
    parser.add_argument("--fuzz", type=float, default=FUZZ_SECONDS, metavar="S", help="seconds")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/robustness.md")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="put the table into the page")
    group.add_argument("--check", action="store_true", help="exit with 1 if that would change it")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        for name in arguments.only:
            _store(name, _measured(name, arguments))
        raw = _stored()
        print(summary(raw))
        return 1 if any(raw[name]["failed"] for name in arguments.only) else 0
    text = arguments.page.read_text()
    new = fill(text, "robustness", summary(_stored()), arguments.page.name)
    if arguments.write:
        arguments.page.write_text(new)
    elif new != text:
        sys.exit(f"{arguments.page} does not show the result file: --write does that")
    return 0


if __name__ == "__main__":
    sys.exit(main())
