"""Benchmarks of gated_ce: time side by side, peak memory, on a CPU also the cores in use.

    python benchmarks/run.py                    on the CPU, about four minutes on two cores
    python benchmarks/run.py --device cuda      on the current GPU, with the peers installed there
    python benchmarks/run.py --quick            one small shape, a smoke test

Writes <machine>.json with every single time, and <machine>.md made from it, anew after each case.
Ends with 1 if one of our own contenders failed, and with 3 if the device was lost: the same command
with --resume then goes on.
"""

import sys
from functools import partial

from contenders.logits import CONTENDERS, SHAPES
from harness.benchmark import Benchmark
from reports.logits import markdown
from reports.tables import write_report

QUICK_SHAPES = ((64, 8_192),)
REPEATS = {"cpu": 15, "cuda": 30}


def main() -> int:
    report = partial(write_report, markdown=markdown)
    return Benchmark(CONTENDERS, SHAPES, QUICK_SHAPES, REPEATS, report).execute(__doc__)


if __name__ == "__main__":
    sys.exit(main())
