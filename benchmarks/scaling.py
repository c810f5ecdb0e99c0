"""Benchmark of how gated_ce scales: with the vocabulary, and with the number of rows.

    python benchmarks/scaling.py                  on the CPU, about five minutes on two cores
    python benchmarks/scaling.py --device cuda    on the current GPU, with its peers there
    python benchmarks/scaling.py --quick          two small shapes, a smoke test

Logits of one size have ever more columns, then logits of one vocabulary ever more rows. Writes
<machine>-scaling.json with every single time, and <machine>-scaling.md made from it; plots.py draws
it. Ends as run.py does: with 1 if one of our own contenders failed, and with 3 if the device was
lost.
"""

import sys
from functools import partial
from pathlib import Path

from contenders.cases import TIMES
from contenders.logits import CONTENDERS
from harness.benchmark import Benchmark
from harness.timing import FORWARD, TOTAL
from reports import tables
from reports.results import CaseResult, Result
from reports.tables import by_case, number

SUFFIX = "-scaling"
VOCABULARY = 151_936
# 50,257 is odd: its rows begin anywhere.
VOCABULARIES = (4_096, 8_192, 16_384, 32_000, 50_257, 65_536, 128_256, VOCABULARY, 262_144)
# Of the logits whose vocabulary grows: far beyond the cache.
ELEMENTS = {"cpu": 2**25, "cuda": 2**30}
ROWS = {
    "cpu": (16, 32, 64, 128, 256, 512, 1024),
    "cuda": (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384),
}
QUICK_SHAPES = ((64, 8_192), (16, VOCABULARY))
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}
REPEATS = {"cpu": 7, "cuda": 15}
# What compiles does so anew for each shape, and is left to run.py.
PEERS = ("cross_entropy", "eager", "liger")
NAMES = ("copy", "gated_ce", "gated_ce_inplace", "gated_ce_fused_inplace", *PEERS)
SCALING_CONTENDERS = tuple(c for c in CONTENDERS if c.name in NAMES)

# How often each phase moves the logits' bytes at the least, in two passes: a read, and then a read
# and a write of the gradient. A copy reads and writes.
PASSES = {FORWARD: 1, TOTAL: 3}
COPY_PASSES = 2
# These have no forward of their own.
GRADIENT_IN_FORWARD = ("gated_ce_fused_inplace", "liger")


def shapes(device: str) -> tuple[tuple[int, int], ...]:
    of_one_size = [(ELEMENTS[device] // words, words) for words in VOCABULARIES]
    of_one_vocabulary = [(rows, VOCABULARY) for rows in ROWS[device]]
    return tuple(dict.fromkeys([*of_one_size, *of_one_vocabulary]))


SHAPES = {device: shapes(device) for device in ELEMENTS}


def by_vocabulary(result: Result) -> list[CaseResult]:
    elements = ELEMENTS[result.device]
    found = [r for r in result.cases if r.case.num_rows == elements // r.case.vocab_size]
    return sorted(found, key=lambda of_case: of_case.case.vocab_size)


def by_rows(result: Result) -> list[CaseResult]:
    found = [r for r in result.cases if r.case.vocab_size == VOCABULARY]
    return sorted(found, key=lambda of_case: of_case.case.num_rows)


def bandwidth(of_case: CaseResult, name: str, phase: str) -> float | None:
    """Bytes a second: those that must be moved in two passes, over the time."""
    is_copy = name == "copy"
    seconds = of_case.median(name, TOTAL if is_copy else phase)
    if seconds is None or (phase == FORWARD and name in GRADIENT_IN_FORWARD):
        return None
    return (COPY_PASSES if is_copy else PASSES[phase]) * of_case.case.logits_bytes / seconds


def gigabytes(of_case: CaseResult, name: str, phase: str) -> str:
    rate = bandwidth(of_case, name, phase)
    return number(None if rate is None else rate / 1e9)


def picture(result: Result) -> str:
    """Where plots.py puts what it draws of a result, from the root of the repository."""
    return f"docs/scaling-{result.device}.png"


def summary(result: Result) -> str:
    """The picture, for the page of benchmarks, which is beside it."""
    sizes = {number(of_case.case.logits_bytes / 2**20) for of_case in by_vocabulary(result)}
    return tables.text(
        [
            tables.machine_line(result),
            f"![Bandwidth against the vocabulary, time and memory against the rows]"
            f"({Path(picture(result)).name})",
            f"*Above: logits of {' or '.join(sorted(sizes))} MiB with ever larger vocabularies; "
            "GB/s is what two passes must move (one read forward; one read and one write backward) "
            f"over the time; dashed, that of a copy. Below: {VOCABULARY:,} words, and ever more "
            "rows.*",
        ]
    )


def markdown(result: Result) -> str:
    parts = ["# Benchmark of how `gated_ce` scales", tables.machine_line(result), "## In short"]
    if found := by_vocabulary(result):
        for phase, passes in PASSES.items():
            what = "Forward" if phase == FORWARD else "Forward and backward, in two passes"
            parts += [
                f"{what}, GB/s of the {passes} {TIMES} logits that must be moved (the copy: "
                f"{COPY_PASSES} {TIMES}):",
                by_case(result, partial(gigabytes, phase=phase), cases=found),
            ]
    if found := by_rows(result):
        parts += tables.times(result, cases=found) + tables.memory(result, cases=found)
    return tables.text(parts + tables.failures(result))


def main() -> int:
    # It promises nothing.
    report = partial(tables.write_report, markdown=markdown, has_bounds=False)
    benchmark = Benchmark(SCALING_CONTENDERS, SHAPES, QUICK_SHAPES, REPEATS, report, DTYPES, SUFFIX)
    return benchmark.execute(__doc__)


if __name__ == "__main__":
    sys.exit(main())
