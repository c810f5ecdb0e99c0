"""Benchmark of vocab_parallel_gated_ce beside Megatron-Core's cross-entropy, on the CPU.

    python benchmarks/vocab_parallel.py            some minutes on two cores
    python benchmarks/vocab_parallel.py --quick    one small shape, a smoke test

Processes of one thread share the vocabulary over gloo, on this machine. Writes
<machine>-vocab-parallel.json with every single time of every process; readme_tables.py puts the
figures into docs/benchmarks.md. Megatron-Core, which has no gate, takes part where it is installed:
pip install 'megatron-core'. Ends with 1 if a process fails, or is not done in time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import processes
from cases import DTYPES, Case
from device import MALLOC_ENVIRONMENT, Cpu
from machine import describe, file_stem, load
from progress import Progress
from report import bounds_table, by_case, machine_line, mebibytes, median
from results import FOLDER, CaseResult, Result
from run import REPEATS, positive, shape
from timing import BACKWARD, FORWARD, TOTAL
from torch.distributed import TCPStore
from vocab_parallel_rank import CONTENDERS, HELD, MEMORY, PEER, TIMES, Request

SHAPES = ((512, 151_936), (2048, 50_304))
QUICK_SHAPES = ((64, 8_192),)
SECONDS = 1800
SUFFIX = "-vocab-parallel"
# Its name in docs/benchmarks.md.
BLOCK = "vocab_parallel"
WORKER = Path(__file__).with_name("vocab_parallel_rank.py")
DISTRIBUTION = "megatron-core"
WITHOUT_PEER = (
    f"without Megatron-Core, which pip install '{DISTRIBUTION}' brings: only our own is measured"
)


def parse() -> argparse.Namespace:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world-size", type=positive, default=2, help="processes (default 2)")
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="NxV", help="tokens x vocabulary, any number"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--repeats", type=positive, help=f"rounds of each case (default {REPEATS['cpu']})"
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=SECONDS,
        help=f"when to give up, each for times and for memory (default {SECONDS})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one small shape, which stays in the cache, few rounds, without torch.compile",
    )
    parser.add_argument(
        "--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results"
    )
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    arguments.repeats = arguments.repeats or (3 if arguments.quick else REPEATS["cpu"])
    for _, vocab_size in arguments.shapes:
        if vocab_size % arguments.world_size:
            parser.error(f"{arguments.world_size} processes cannot share {vocab_size} words evenly")
    return arguments


def peer_version() -> str:
    """The version of Megatron-Core, "" where it is not installed; it is not imported."""
    try:
        if importlib.util.find_spec(PEER) is None:
            return ""
    except ModuleNotFoundError:  # of the package around it
        return ""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def launch(
    measure: str, cases: list[Case], names: list[list[str]], arguments: argparse.Namespace
) -> list[list[dict[str, Any]]]:
    """What each process answers, by case.

    If one fails, all are ended, and so is this one, which shows what they said.
    """
    # By this the processes find each other, as under torchrun.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}
    environment = {
        **loopback,
        **os.environ,
        **(MALLOC_ENVIRONMENT if measure == MEMORY else {}),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = range(arguments.world_size)
    print(f"{measure}, {len(ranks)} processes", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(arguments.world_size) as pool,
    ):
        requests = [
            Request(
                rank=rank,
                world_size=arguments.world_size,
                port=store.port,
                seconds=arguments.seconds,
                measure=measure,
                cases=[asdict(case) for case in cases],
                names=names,
                repeats=arguments.repeats,
                rotates=not arguments.quick,
                answer=str(Path(folder) / f"{rank}.json"),
            )
            for rank in ranks
        ]
        runs = [
            pool.submit(
                processes.run,
                [sys.executable, WORKER, request.to_json()],
                Path(folder) / f"{request.rank}.log",
                arguments.seconds,
                environment,
            )
            for request in requests
        ]
        try:
            succeeded = all(done.result().code == 0 for done in as_completed(runs))
        finally:
            processes.end_all()  # who waits for one that failed
        if not succeeded:
            for rank, done in enumerate(runs):
                print(f"process {rank} {done.result().outcome}:", file=sys.stderr)
                print(done.result().output, file=sys.stderr)
            sys.exit(1)
        return [json.loads(Path(request.answer).read_text()) for request in requests]


def measure_all(cases: list[Case], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The entries of the result file."""
    has_peer = bool(peer_version())
    names = [
        c.name
        for c in CONTENDERS
        if (has_peer or not c.module) and not (arguments.quick and c.compiles)
    ]
    times = launch(TIMES, cases, [names] * len(cases), arguments)
    entries = []
    for case, *of_ranks in zip(cases, *times, strict=True):
        first = of_ranks[0]
        for name, reason in first["failed"].items():
            print(f"{case} without {name}: {reason}", file=sys.stderr)
        entries.append(
            {
                "case": asdict(case),
                "failed": first["failed"],
                "ranks": [
                    {key: each[key] for key in ("seconds", "agreement")} for each in of_ranks
                ],
            }
        )
    timed = [list(entry["ranks"][0]["seconds"]) for entry in entries]
    for entry, *of_ranks in zip(entries, *launch(MEMORY, cases, timed, arguments), strict=True):
        for rank, found in zip(entry["ranks"], of_ranks, strict=True):
            rank.update(found)
    return entries


def slowest(of_ranks: list[Any]) -> Any:
    """The largest figure of all processes, one by one."""
    first = of_ranks[0]
    if isinstance(first, dict):
        return {key: slowest([each[key] for each in of_ranks]) for key in first}
    if isinstance(first, list):
        return [slowest(list(figures)) for figures in zip(*of_ranks, strict=True)]
    return max(of_ranks)


def read(raw: dict[str, Any]) -> Result:
    """A result file. A sample's time is that of the slowest process, memory that of the largest."""
    cases = [
        {
            **case,
            **{
                what: slowest([rank.get(what, {}) for rank in case["ranks"]])
                for what in ("seconds", "peak_bytes")
            },
        }
        for case in raw["cases"]
    ]
    return Result({**raw, "cases": cases})


def summary(result: Result) -> str:
    """The tables for the page of benchmarks."""
    names = {name for case in result.cases for name in case.seconds}
    contenders = [c for c in CONTENDERS if c.name in names]
    kept = {Case(**raw["case"]): raw["ranks"][0].get("kept", {}) for raw in result.raw["cases"]}

    def both_phases(case: CaseResult, name: str) -> str:
        return " + ".join(median(case, name, 1e3, phase) for phase in (FORWARD, BACKWARD))

    def held(case: CaseResult, name: str) -> str:
        tensors = ", ".join(kept[case.case].get(name, []))
        return mebibytes(case, name, HELD) + (f" ({tensors})" if tensors else "")

    version = result.machine["megatron_core"]
    peer = (
        f"Megatron-Core {version} has no gate; like ours in place it overwrites float32 logits."
        if version
        else "Megatron-Core did not take part."
    )
    parts = [
        machine_line(result),
        f"{result.machine['processes']} processes with one thread each, over gloo, each with its "
        "part of the vocabulary; the slowest counts. Logits that are overwritten are restored "
        f"outside of what is timed. {peer}",
        "Forward and backward together, milliseconds (median, interleaved in one run):",
        by_case(result.cases, contenders, lambda case, name: median(case, name, 1e3, TOTAL)),
        "Forward + backward, each by itself, milliseconds:",
        by_case(result.cases, contenders, both_phases),
        "Peak memory of a process beyond the inputs, MiB (measured):",
        by_case(result.cases, contenders, mebibytes),
        "Held between forward and backward beyond the inputs, MiB (measured), and which tensors of "
        "the logits' size the graph keeps:",
        by_case(result.cases, contenders, held),
    ]
    if bounds := bounds_table(result):
        parts += ["What was promised, and what came out:", bounds]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print and write."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)  # which ends the processes

    signal.signal(signal.SIGTERM, stop)
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
    if raw["load_before"] > 0.5:
        print(f"load {raw['load_before']:.1f}: times will be unsteady", file=sys.stderr)
    cases = [Case(*size, dtype) for size in arguments.shapes for dtype in arguments.dtypes]
    raw["cases"] = measure_all(cases, arguments)
    path = arguments.output / f"{file_stem(machine)}{SUFFIX}.json"
    Progress(path, raw).write()
    print(summary(read(raw)))
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
