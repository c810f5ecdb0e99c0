"""One process of vocab_parallel.py: its part of the vocabulary, timed in lockstep with the others.

Before each call all processes wait for each other, so that none runs beside another's preparations.
"""

import argparse
import gc
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
from contenders.cases import Batch, Case, Rotation
from contenders.contender import Contender, Runner
from contenders.shards import CONTENDERS, FUSED, SAME, ShardRunner
from torch import distributed as dist

from .device import Cpu
from .measure import TOLERANCE, WARM_UP, check_agreement, rounded
from .memory import medians
from .progress import describe_error
from .timing import time_once, time_side_by_side

Found = dict[str, Any]


class Request(NamedTuple):
    """What all processes are told: the store by which they find each other, and more.

    The cases come with the names of whom to measure.
    """

    store: tuple[str, int]
    cases: list[tuple[Case, list[str]]]
    arguments: argparse.Namespace


class LockstepCpu(Cpu):
    """The CPU, of which every process uses one core; they begin together."""

    def get_ahead(self) -> None:
        dist.barrier()


class ShardRotation(Rotation):
    """Batches of this process's part of the vocabulary; all have the same labels, of the whole."""

    def __init__(self, case: Case, cache_bytes: int) -> None:
        shard = replace(case, vocab_size=case.vocab_size // dist.get_world_size())
        super().__init__(shard, cache_bytes, "cpu", seed=dist.get_rank())
        generator = torch.Generator().manual_seed(dist.get_world_size())
        for batch in self.full_turn():
            batch.labels.random_(case.vocab_size, generator=generator)

    def next(self) -> Batch:
        """Restored when no process is being timed."""
        dist.barrier()
        batch: Batch = super().next()
        return batch


def start(
    contenders: list[Contender], rotation: Rotation, device: Cpu
) -> tuple[list[ShardRunner], dict[str, str]]:
    """The contenders, warmed up, and why a peer is missing; all processes find the same."""
    runners: list[ShardRunner] = []
    failed: dict[str, str] = {}
    for contender in contenders:
        reason = ""
        try:
            runner = contender.make_runner()
            for _ in range(WARM_UP):
                time_once(runner, rotation, device)
        except Exception as error:
            if not contender.module:
                raise
            reason = describe_error(error)
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        if reason := next(filter(None, reasons), ""):
            failed[contender.name] = reason
        else:
            runners.append(runner)
    return runners, failed


def measure_times(case: Case, contenders: list[Contender], arguments: argparse.Namespace) -> Found:
    """Every single time, by contender and phase, and what else is found on the way."""
    device = LockstepCpu()
    rotation = ShardRotation(case, 0 if arguments.quick else device.cache_bytes())
    runners, failed = start(contenders, rotation, device)

    def drop(runner: Runner, reason: str) -> NoReturn:
        raise RuntimeError(f"{runner.name}: {reason}")  # the others wait for this one

    tolerance = dict.fromkeys(SAME, TOLERANCE[case.dtype]) | {FUSED: TOLERANCE["bfloat16"]}
    agreement = check_agreement(runners, rotation, SAME, tolerance, drop)
    # No time limit: as many rounds in all processes.
    seconds = time_side_by_side(runners, rotation, device, arguments.repeats, 0.0, drop=drop)
    return {"seconds": rounded(seconds), "agreement": agreement, "failed": failed}


def measure_memory(case: Case, contenders: list[Contender], _: object) -> Found:
    device = Cpu()
    rotation = ShardRotation(case, 0)
    found: Found = {"peak_bytes": {}, "kept": {}}
    for contender in contenders:
        runner: ShardRunner = contender.make_runner()
        # No time limit: as many calls in all processes.
        if peaks := medians(runner, rotation, device, float("inf")):
            found["peak_bytes"][contender.name] = peaks
        found["kept"][contender.name] = runner.kept(rotation.next())
    return found


def measure(rank: int, measure_what: Any, request: Request) -> Iterator[Found]:
    torch.set_num_threads(1)
    address, cases, arguments = request
    size, limit = arguments.world_size, timedelta(seconds=arguments.seconds)
    store = dist.TCPStore(*address, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    chosen = {name for _, names in cases for name in names}
    if any(c.module for c in CONTENDERS if c.name in chosen):
        warnings.filterwarnings("ignore", module=r"megatron\.")  # on what else could be installed
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    gc.freeze()  # no collection looks through all that was imported
    for case, names in cases:
        if rank == 0:
            print(f"{measure_what.__name__}: {case}", file=sys.stderr)
        torch.compiler.reset()
        yield measure_what(case, [c for c in CONTENDERS if c.name in names], arguments)
    dist.destroy_process_group()
