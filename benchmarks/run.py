"""Benchmarks of gated_ce: time side by side, peak memory, on a CPU also the cores in use.

    python benchmarks/run.py                    on the CPU, about four minutes on two cores
    python benchmarks/run.py --device cuda      on the current GPU, with the peers installed there
    python benchmarks/run.py --quick            one small shape, a smoke test

Writes <machine>.json with every single time, and <machine>.csv and <machine>.md made from it, anew
after each case. Ends with 1 if one of our own contenders failed, and with 3 if the device was lost:
the same command with --resume then goes on.
"""

from __future__ import annotations

import sys

from contenders.logits import CONTENDERS, SHAPES
from harness.benchmark import Benchmark
from harness.progress import Progress
from reports.logits import csv_text, markdown
from reports.results import Result
from reports.tables import write_report

QUICK_SHAPES = ((64, 8_192),)
REPEATS = {"cpu": 15, "cuda": 30}


def write_reports(progress: Progress) -> str:
    """The report, also written beside the result file, with a table of all figures."""
    report = write_report(progress, markdown)
    progress.path.with_suffix(".csv").write_text(csv_text(Result(progress.raw)))
    return report


def main() -> int:
    """Measure, print and write."""
    benchmark = Benchmark(CONTENDERS, SHAPES, QUICK_SHAPES, REPEATS, write_reports)
    return benchmark.execute(__doc__)


if __name__ == "__main__":
    sys.exit(main())
