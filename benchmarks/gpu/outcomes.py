"""What the logs of pytest and compute-sanitizer say, also if they were cut short."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

STATUS = "PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS"
# A line of `pytest -v` for each test: with xdist, and without.
DISTRIBUTED = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({STATUS}) (\S+::.*?)\s*$", re.MULTILINE)
PLAIN = re.compile(rf"^(\S+::.*?) ({STATUS})(?: \(.*\))? +\[ *\d+%\]$", re.MULTILINE)
# The last line of pytest: "=== 1 failed, 20 passed, 3 skipped in 1.23s ===".
TOTALS = re.compile(r"^=+ (.*\d+ \w+.*) in [\d.]+s.* =+$", re.MULTILINE)
# Parameters of a test are joined with hyphens. The layering is that of files.
ON_CUDA = re.compile(r"^(?!.*test_layering).*\[(?:.*-)?cuda(?:-.*)?\]$")
MOST_NAMES = 40

SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
RACES = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
WRONG = re.compile(r"cases, (\d+) wrong results")


def suite(log: str) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, how many on CUDA, and which failed."""
    tests = [(name, status) for status, name in DISTRIBUTED.findall(log)] or PLAIN.findall(log)
    counts = Counter(status.lower() for _, status in tests)
    if totals := TOTALS.findall(log):
        counts = Counter({word: int(n) for n, word in re.findall(r"(\d+) ([a-z]+)", totals[-1])})
    failed = [name for name, status in tests if status in ("FAILED", "ERROR")]
    return {
        "passed": counts["passed"],
        "failed": counts["failed"],
        "errors": counts["error"] + counts["errors"],
        "skipped": counts["skipped"],
        "passed_on_cuda": sum(
            status == "PASSED" and ON_CUDA.search(name) is not None for name, status in tests
        ),
        "failed_tests": failed[:MOST_NAMES],
        "complete": bool(totals),
    }


def sanitizer(log: str) -> dict[str, Any]:
    """How many errors and warnings a tool reports; None where it did not come to its summary."""
    found: dict[str, Any] = {"errors": None, "warnings": 0, "wrong_results": None}
    if match := RACES.search(log):
        found["errors"], found["warnings"] = int(match[1]), int(match[2])
    elif match := SUMMARY.search(log):
        found["errors"] = int(match[1])
    if match := WRONG.search(log):
        found["wrong_results"] = int(match[1])
    return found
