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
from collections.abc import Mapping
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
from reports.results import CaseResult, Result
from reports.tables import (
    EACH_PHASE,
    both,
    by_case,
    each_phase,
    machine_line,
    mebibytes,
    median,
    promises,
    text,
)
from torch.distributed import TCPStore

from eaft_ext.cli.options import positive_int

SHAPES = ((512, 151_936), (2048, 50_304))
QUICK_SHAPES = ((64, 8_192),)
REPEATS = 15
SECONDS = 1800
SUFFIX = "-vocab-parallel"
# Its name in docs/benchmarks.md.
BLOCK = "vocab_parallel"
WITHOUT_PEER = (
    f"without Megatron-Core, which pip install '{DISTRIBUTION}' brings: only our own is measured"
)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_measured(parser, "NxV", EXAMPLE, REPEATS)
    add = parser.add_argument
    add("--world-size", type=positive_int, default=2, help="processes (default 2)")
    add(
        "--seconds",
        type=positive_int,
        default=SECONDS,
        help=f"when to give up, each for times and for memory (default {SECONDS})",
    )
    arguments = parser.parse_args()
    set_measured(arguments, SHAPES, QUICK_SHAPES, DTYPES, REPEATS)
    for _, vocab_size in arguments.shapes:
        if vocab_size % arguments.world_size:
            parser.error(f"{arguments.world_size} processes cannot share {vocab_size} words evenly")
    return arguments


def launch(
    measure: Any,
    cases: list[tuple[Case, list[str]]],
    arguments: argparse.Namespace,
    environment: Mapping[str, str],
) -> list[tuple[dict[str, Any], ...]]:
    """What all processes found, case by case. If one fails, all are ended, and so is this one."""
    # By this the processes find each other, as under torchrun.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}
    size, seconds = arguments.world_size, arguments.seconds
    request = lockstep.Request(
        size, store.port, seconds, arguments.repeats, not arguments.quick, cases
    )
    answers, reason = measure_in(
        size,
        {
            **loopback,
            **os.environ,
            **environment,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        lockstep.measure,
        measure,
        request,
        seconds=seconds,
    )
    if reason:
        print(reason, file=sys.stderr)
        sys.exit(1)
    return list(zip(*answers, strict=True))


def measure_all(cases: list[Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    names = [
        c.name
        for c in CONTENDERS
        if (peer_version() or not c.module) and not (arguments.quick and c.compiles)
    ]
    entries = []
    times = launch(lockstep.measure_times, [(case, names) for case in cases], arguments, {})
    for case, ranks in zip(cases, times, strict=True):
        # All found the same.
        (failed, *_) = [found.pop("failed") for found in ranks]
        for name, reason in failed.items():
            print(f"{case} without {name}: {reason}", file=sys.stderr)
        entries.append({"case": asdict(case), "failed": failed, "ranks": ranks})
    timed = [
        (case, list(entry["ranks"][0]["seconds"]))
        for case, entry in zip(cases, entries, strict=True)
    ]
    memory = launch(lockstep.measure_memory, timed, arguments, MALLOC_ENVIRONMENT)
    for entry, of_ranks in zip(entries, memory, strict=True):
        for rank, found in zip(entry["ranks"], of_ranks, strict=True):
            rank.update(found)
    return entries


def summary(result: Result) -> str:
    def held(case: CaseResult, name: str) -> str:
        tensors = ", ".join(case.kept.get(name, []))
        return mebibytes(case, name, HELD) + (f" ({tensors})" if tensors else "")

    version = result.machine["megatron_core"]
    peer = (
        f"Megatron-Core {version} has no gate; like ours in place it overwrites float32 logits."
        if version
        else "Megatron-Core did not take part."
    )
    return text(
        [
            machine_line(result),
            f"{result.processes} processes with one thread each, over gloo, each with its "
            "part of the vocabulary; the slowest counts. Logits that are overwritten are restored "
            f"outside of what is timed. {peer}",
            both(),
            by_case(result, median),
            EACH_PHASE,
            by_case(result, each_phase),
            "Peak memory of a process beyond the inputs, MiB (measured):",
            by_case(result, mebibytes),
            "Held between forward and backward beyond the inputs, MiB (measured), and which "
            "tensors of the logits' size the graph keeps:",
            by_case(result, held),
            *promises(result),
        ]
    )


def main() -> None:
    arguments = parse()
    machine = {
        **describe(Cpu()),
        "threads": arguments.world_size,
        "processes": arguments.world_size,
        "megatron_core": peer_version(),
    }
    if not machine["megatron_core"]:
        print(WITHOUT_PEER, file=sys.stderr)
    raw = {"machine": machine, "repeats": arguments.repeats, "load_before": load()}
    cases = [Case(*size, dtype) for size in arguments.shapes for dtype in arguments.dtypes]
    raw["cases"] = measure_all(cases, arguments)
    path = arguments.output / f"{file_stem(machine)}{SUFFIX}.json"
    Progress(path, raw).write()
    print(summary(Result(raw)))
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
