"""Benchmark of vocab_parallel_gated_ce beside Megatron-Core's cross-entropy, on the CPU.

    python benchmarks/vocab_parallel.py            some minutes on two cores
    python benchmarks/vocab_parallel.py --quick    one small shape, a smoke test

Processes of one thread share the vocabulary over gloo, on this machine. Writes
<machine>-vocab-parallel.json with every single time of every process; readme_tables.py puts the
figures into docs/benchmarks.md. Megatron-Core, which has no gate, takes part where it is installed:
pip install 'megatron-core'. Ends with 1 if a process fails, or is not done in time.
"""

import argparse
import os
import sys
from dataclasses import asdict
from typing import Any

from contenders.cases import DTYPES, Case
from contenders.shards import CONTENDERS, DISTRIBUTION, peer_version
from harness import lockstep
from harness.command import EXAMPLE, add_measured, parser_of, set_measured
from harness.device import MALLOC_ENVIRONMENT, Cpu
from harness.fresh_processes import measure_in
from harness.machine import describe, file_stem, load
from harness.progress import Progress
from harness.timing import HELD
from reports import tables
from reports.results import CaseResult, Result
from torch.distributed import TCPStore

from eaft_ext.cli.options import positive_int

SHAPES = ((512, 151_936), (2048, 50_304))
QUICK_SHAPES = ((64, 8_192),)
REPEATS = 15
SECONDS = 1800
SUFFIX = "-vocab-parallel"
HERE = "127.0.0.1"
# Its name in docs/benchmarks.md.
BLOCK = "vocab_parallel"

Chosen = list[tuple[Case, list[str]]]


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_measured(parser, "NxV", EXAMPLE, REPEATS)
    limit = f"when to give up, each for times and for memory (default {SECONDS})"
    parser.add_argument("--world-size", type=positive_int, default=2, help="processes (default 2)")
    parser.add_argument("--seconds", type=positive_int, default=SECONDS, help=limit)
    arguments = set_measured(parser.parse_args(), SHAPES, QUICK_SHAPES, DTYPES, REPEATS)
    for _, vocab_size in arguments.shapes:
        if vocab_size % arguments.world_size:
            parser.error(f"{arguments.world_size} processes cannot share {vocab_size} words evenly")
    return arguments


def launch(
    measure: Any, cases: Chosen, arguments: argparse.Namespace, **environment: str
) -> list[tuple[dict[str, Any], ...]]:
    """What all processes found, case by case. If one fails, all are ended, and so is this one."""
    # By this the processes find each other, as under torchrun.
    store = TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform.startswith("linux"):
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    request = lockstep.Request((HERE, store.port), cases, arguments)
    found, reason = measure_in(
        arguments.world_size, environment, lockstep.measure, measure, request, arguments.seconds
    )
    if reason:
        print(reason, file=sys.stderr)
        sys.exit(1)
    return list(zip(*found, strict=True))


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The entries of the result file."""
    names = [
        c.name
        for c in CONTENDERS
        if (peer_version() or not c.module) and not (arguments.quick and c.compiles)
    ]
    chosen: Chosen = [
        (Case(*size, dtype), names) for size in arguments.shapes for dtype in arguments.dtypes
    ]
    entries = []
    for (case, _), ranks in zip(
        chosen, launch(lockstep.measure_times, chosen, arguments), strict=True
    ):
        (failed, *_) = [found.pop("failed") for found in ranks]  # all found the same
        for name, reason in failed.items():
            print(f"{case} without {name}: {reason}", file=sys.stderr)
        entries.append({"case": asdict(case), "failed": failed, "ranks": ranks})
    timed = [
        (case, list(entry["ranks"][0]["seconds"]))
        for (case, _), entry in zip(chosen, entries, strict=True)
    ]
    memory = launch(lockstep.measure_memory, timed, arguments, **MALLOC_ENVIRONMENT)
    for entry, of_ranks in zip(entries, memory, strict=True):
        for rank, found in zip(entry["ranks"], of_ranks, strict=True):
            rank.update(found)
    return entries


def summary(result: Result) -> str:
    """The tables for the page of benchmarks."""

    def held(case: CaseResult, name: str) -> str:
        kept = ", ".join(case.kept.get(name, []))
        return tables.mebibytes(case, name, HELD) + (f" ({kept})" if kept else "")

    version = result.machine["megatron_core"]
    peer = (
        f"Megatron-Core {version} has no gate; like ours in place it overwrites float32 logits."
        if version
        else "Megatron-Core did not take part."
    )
    return tables.text(
        [
            tables.machine_line(result),
            f"{result.processes} processes with one thread each, over gloo, each with its "
            "part of the vocabulary; the slowest counts. Logits that are overwritten are restored "
            f"outside of what is timed. {peer}",
            *tables.times(result),
            *tables.each_phase(result),
            "Peak memory of a process beyond the inputs, MiB (measured):",
            tables.by_case(result, tables.mebibytes),
            "Held between forward and backward beyond the inputs, MiB (measured), and which "
            "tensors of the logits' size the graph keeps:",
            tables.by_case(result, held),
            *tables.promises(result),
        ]
    )


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    size, version = arguments.world_size, peer_version()
    if not version:
        how = f"pip install '{DISTRIBUTION}' brings"
        print(f"without Megatron-Core, which {how}: only our own is measured", file=sys.stderr)
    machine = {**describe(Cpu()), "threads": size, "processes": size, "megatron_core": version}
    raw = {"machine": machine, "repeats": arguments.repeats, "load_before": load()}
    raw["cases"] = measure_all(arguments)
    path = arguments.output / f"{file_stem(machine)}{SUFFIX}.json"
    Progress(path, raw).write()
    print(summary(Result(raw)))
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
