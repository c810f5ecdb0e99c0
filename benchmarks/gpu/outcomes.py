"""What compute-sanitizer looks for, and what its logs and pytest's say, also if cut short."""

import re
from collections import Counter
from dataclasses import dataclass
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

ERROR_STATUS = 9
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
RACES = re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
WRONG = re.compile(r"cases, (\d+) wrong results")
# The mangled names of our kernels have the namespace in them. Other libraries' kernels, cuBLAS's
# above all, have more barriers than a tool can follow.
OURS = ("--kernel-name", "kernel_substring=eaft_ext")
# Those that bring rows by bulk copies, in gated_ce_forward_with_grad.cuh.
STAGED = "kernel_substring=_staged_"
# In a block. The compiler cannot tell how many a loop makes, and where the tool has to guess, it is
# said to guess too few. kMaxStagedTiles of staged_span.cuh is 19.
BARRIERS = ("--num-cuda-barriers", "64")


@dataclass(frozen=True)
class Watch:
    """A run of a tool on sanitize.py; one that does not count is told of, and fails nothing."""

    tool: str
    options: tuple[str, ...] = ()
    counts: bool = True

    def command(self, program: str, port: int) -> list[str]:
        status = ("--print-limit", "20", "--error-exitcode", str(ERROR_STATUS))
        return [program, "--tool", self.tool, *status, "--port", str(port), *self.options]


WATCHES = {
    # Calls that may fail are checked by who calls: a launch that is tried, say.
    "memcheck": Watch("memcheck", ("--padding", "64", "--report-api-errors", "no")),
    "racecheck": Watch("racecheck", (*OURS, "--kernel-name-exclude", STAGED, *BARRIERS)),
    # The tool is said to take what a bulk copy writes for a race with who has waited for it in a
    # loop; its release notes list mends of that up to 2026.3.
    "racecheck of bulk copies": Watch("racecheck", ("--kernel-name", STAGED, *BARRIERS), False),
    "synccheck": Watch("synccheck", (*OURS, *BARRIERS)),
    "initcheck": Watch("initcheck"),
}


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
        "passed_on_cuda": sum(s == "PASSED" and bool(ON_CUDA.search(name)) for name, s in tests),
        "failed_tests": failed[:MOST_NAMES],
        "complete": bool(totals),
    }


def sanitizer(log: str) -> dict[str, Any]:
    """How many errors and warnings a tool reports; None where it did not come to its summary."""
    summary, wrong = RACES.search(log) or SUMMARY.search(log), WRONG.search(log)
    errors, warnings = (*map(int, summary.groups()), 0)[:2] if summary else (None, 0)
    wrong_results = int(wrong[1]) if wrong else None
    return {"errors": errors, "warnings": warnings, "wrong_results": wrong_results}
