"""Benchmark of linear_gated_ce: output layer and loss together, beside the bare matrix products.

    python benchmarks/linear_loss.py                  on the CPU, a quarter of an hour on two cores
    python benchmarks/linear_loss.py --device cuda    on the current GPU, with its peers there
    python benchmarks/linear_loss.py --quick          one small shape, a smoke test

A shape is tokens x hidden x vocabulary. Before anything is timed, losses and gradients are compared
with those of another contender that computes the same; one that is off is left out. Writes
<machine>-linear.json with every single time, and <machine>-linear.md made from it; readme_tables.py
puts the figures into docs/benchmarks.md. Ends as run.py does: with 1 if one of our own contenders
failed, and with 3 if the device was lost.
"""

import sys
from functools import partial

from contenders.cases import TIMES, Case, LinearCase
from contenders.linear import LINEAR_CONTENDERS, PRODUCTS, SAME, chunk_tokens
from harness.benchmark import Benchmark
from harness.measure import How
from reports import tables
from reports.results import CaseResult, Result
from reports.tables import by_case, number

SUFFIX = "-linear"
# The heads of SmolLM2-135M and of Qwen3-0.6B; a call of the first takes seconds on two cores.
SHAPES = {
    "cpu": ((4096, 576, 49_152), (384, 1024, 151_936)),
    "cuda": ((8192, 4096, 151_936), (8192, 2048, 32_000)),
}
QUICK_SHAPES = ((96, 32, 1_024),)
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
REPEATS = {"cpu": 7, "cuda": 20}
# The check of losses and gradients is one more call, and on a CPU one is enough.
WARM_UP = {"cpu": 0, "cuda": 1}
# Of the loss, and of the gradients' norms: 16-bit gradients are rounded where they are added up.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
COMPILATION_SECONDS = 25.0


def make_case(shape: tuple[int, ...], dtype: str) -> Case:
    num_rows, hidden_size, vocab_size = shape
    return LinearCase(num_rows, vocab_size, dtype, hidden_size)


def chunk_table(result: Result) -> str:
    """How large a chunk is, and how large all logits would be."""
    head = ["", "logits, MiB", "tokens in a chunk", "its logits, MiB", "both gradients, MiB"]
    rows = []
    for of_case in result.cases:
        case = of_case.case
        tokens = chunk_tokens(case, result.device)
        of_chunk = tokens * case.logits_bytes / case.num_rows
        sizes = (case.logits_bytes, of_chunk, case.input_bytes)
        logits, chunk, gradients = (number(size / tables.MIB) for size in sizes)
        rows.append([str(case), logits, f"{tokens:,}", chunk, gradients])
    return tables.table(head, rows)


def summary(result: Result) -> str:
    return tables.text([tables.machine_line(result), *summary_parts(result)])


def summary_parts(result: Result) -> list[str]:
    def times_products(case: CaseResult, name: str) -> str:
        return number(case.ratio(name, PRODUCTS))

    def beyond_gradients(case: CaseResult, name: str) -> str:
        peak = case.beyond_gradients(name)
        return number(None if peak is None else peak / tables.MIB)

    return [
        f"Tokens {TIMES} hidden {TIMES} vocabulary; the loss, and the gradients of hidden and "
        "weight. The three bare products are those of a whole batch, with nothing between them. "
        "Eager EAFT in chunks computes the logits of a chunk once more for its backward; its "
        "chunks are those of `linear_gated_ce`:",
        chunk_table(result),
        *tables.times(result),
        f"The same, {TIMES} the three bare products:",
        by_case(result, times_products),
        *tables.each_phase(result),
        *tables.memory(result),
        "Peak memory beyond the inputs and both gradients, MiB (measured):",
        by_case(result, beyond_gradients),
        *tables.promises(result),
    ]


def markdown(result: Result) -> str:
    parts = ["# Benchmark of `linear_gated_ce`", tables.machine_line(result)]
    parts += ["## In short", *summary_parts(result), *tables.failures(result)]
    return tables.text(parts)


def main() -> int:
    benchmark = Benchmark(
        LINEAR_CONTENDERS,
        SHAPES,
        QUICK_SHAPES,
        REPEATS,
        partial(tables.write_report, markdown=markdown),
        DTYPES,
        SUFFIX,
        "TxHxV",
        "4096x576x49152",
        make_case,
        How(SAME, TOLERANCE, WARM_UP),
        COMPILATION_SECONDS,
    )
    return benchmark.execute(__doc__)


if __name__ == "__main__":
    sys.exit(main())
