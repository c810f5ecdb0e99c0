"""One process of test_vocab_parallel_processes.py: ``... RANK WORLD_SIZE FOLDER``.

It makes the calls of all cases, one after the other, and saves what each gives.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from operand_bytes import Operands
from spawned import leave
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from vocab_parallel_cases import CASES, GATES, NUM_ROWS, WORDS, Case, Process, cases_of
from vocab_parallel_errors import checks, provoke_errors, use_other_groups

from eaft_ext import FocalGate, NoGate, vocab_parallel_gated_ce


@contextmanager
def _by_debug_mode(seen: list[Any]) -> Iterator[None]:
    with CommDebugMode() as mode:
        yield
    seen.append(mode.get_total_counts())


@contextmanager
def _by_profiler(seen: list[Any]) -> Iterator[None]:
    """Names and shapes of what gloo itself is asked for."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield
    seen.append([(e.name, e.input_shapes) for e in profiler.events() if e.name.startswith("gloo:")])


@contextmanager
def _by_dispatch(seen: list[Any]) -> Iterator[None]:
    """The bytes that each functional collective is given."""
    with Operands() as operands:
        yield
    seen.append([sent.given for sent in operands.sent])


WATCHES = {"debug_mode": _by_debug_mode, "profiler": _by_profiler, "dispatch": _by_dispatch}
WATCHED = (
    "default",
    "gate_callable",
    "bfloat16",
    "float64",
    "k_2",
    "in_place",
    "all_ignored",
    "whole_entropy",
    "full_stats",
    "full_stats_smoothed",
)


def _collectives(process: Process) -> dict[str, list[Any]]:
    """What is sent in a forward and in a backward, seen from three sides."""
    found = {}
    for name, (way, watch) in itertools.product(WATCHED, WATCHES.items()):
        shard, labels, options = process.inputs(CASES[name])
        shard.requires_grad_()
        seen: list[Any] = []
        with watch(seen):
            result = vocab_parallel_gated_ce(shard, labels, **options)
        loss = result[0] if isinstance(result, tuple) else result
        with watch(seen):
            loss.sum().backward()
        found[f"{name} {way}"] = seen
    return found


# Options of a call, and what compiles it.
COMPILED: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, "aot_eager"),
    "unreduced": ({"gate": FocalGate(2.0), "reduction": "none"}, "aot_eager"),
    "callable": ({"gate": GATES["callable"]}, "aot_eager"),
    "in_place": ({"inplace_backward": True}, "inductor"),
    "whole_entropy": ({"k": None}, "aot_eager"),
}
SIZES = [(240, 12), (240, 5), (48, 7)]
"""Words and rows."""


def _compiled(process: Process, name: str) -> dict[str, Any]:
    """Results compiled and not, the collectives in the graph, and whether it overwrites logits."""
    options, backend = COMPILED[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    targets: list[list[str]] = []
    overwrites: list[bool] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        calls = [(str(node.target), node.args) for node in graph.graph.nodes]
        targets.append([target for target, _ in calls if "c10d" in target])
        overwrites.extend(args[9] for target, args in calls if "gated_ce_merge" in target)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return vocab_parallel_gated_ce(x * 1, y, group=process.world, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=record)
    results = []
    for words, num_rows in SIZES:
        case = Case(words=words, num_rows=num_rows)
        pair = []
        for one in (function, compiled):
            shard, labels, _ = process.inputs(case)
            loss = one(shard.requires_grad_(), labels)
            loss.sum().backward()
            pair.append((loss.detach(), shard.grad))
        results.append(pair)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {
        "results": results,
        "targets": targets[-1],
        "overwrites": overwrites,
        "graphs": graphs,
    }


def _recomputed(process: Process) -> dict[str, Any]:
    """Under activation checkpointing, the call inside: it is made again in the backward."""
    found = {}
    for use_reentrant in (False, True):
        shard, labels, options = process.inputs(CASES["default"])
        loss = checkpoint(
            lambda x, labels, options: vocab_parallel_gated_ce(x * 1, labels, **options),
            shard.requires_grad_(),
            labels,
            options,
            use_reentrant=use_reentrant,
        )
        loss.backward()
        found[use_reentrant] = (loss.detach(), shard.grad)
    return found


def _autocast(process: Process) -> Tensor:
    shard, labels, options = process.inputs(CASES["bfloat16_mean"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return vocab_parallel_gated_ce(shard, labels, **options)


def _two_losses(process: Process) -> tuple[Tensor, ...]:
    """In one graph, kept for a second backward."""
    shard, labels, options = process.inputs(CASES["default"])
    x = shard.requires_grad_() * 1
    first = vocab_parallel_gated_ce(x, labels, **options)
    second = vocab_parallel_gated_ce(x, labels.flip(0), gate=NoGate(), **options)
    (first + 2 * second).backward(retain_graph=True)
    once = shard.grad.clone()
    (first + 2 * second).backward()
    return first.detach(), second.detach(), once, shard.grad


def data_parallel_inputs(replica: int) -> tuple[Tensor, Tensor]:
    """Hidden states and labels of a replica; the second one has nothing to learn from."""
    generator = torch.Generator().manual_seed(replica)
    hidden = torch.randn(NUM_ROWS, 8, generator=generator)
    labels = torch.randint(WORDS, (NUM_ROWS,), generator=generator)
    return hidden, labels if replica == 0 else labels.fill_(-100)


def data_parallel_weight() -> Tensor:
    return torch.randn(WORDS, 8, generator=torch.Generator().manual_seed(7))


def _data_parallel(process: Process) -> dict[str, Tensor]:
    """Two replicas of a layer whose rows are divided among two processes each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica, part = divmod(process.rank, 2)
    layer = nn.Linear(8, WORDS // 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(data_parallel_weight().chunk(2)[part])
    model = nn.parallel.DistributedDataParallel(layer, process_group=mesh.get_group("dp"))
    hidden, labels = data_parallel_inputs(replica)
    loss = vocab_parallel_gated_ce(model(hidden), labels, group=mesh["tp"], inplace_backward=True)
    loss.backward()
    return {"loss": loss.detach(), "gradient": layer.weight.grad}


def main(rank: int, world_size: int, folder: Path) -> None:
    """Go through the cases."""
    process = Process(rank, world_size, folder)
    process.run("not_initialised", lambda: process.loss(group=None))
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
    )
    process.world = dist.group.WORLD
    for name in cases_of(world_size):
        process.run(name, lambda case=CASES[name]: process.outcome(case))
    process.run("collectives", lambda: _collectives(process))
    if world_size == 2:
        bodies = [_recomputed, _autocast, _two_losses]
        for body in bodies:
            process.run(body.__name__[1:], lambda body=body: body(process))
        for name in COMPILED:
            process.run(f"compiled_{name}", lambda name=name: _compiled(process, name))
        with checks():
            process.run("compiled_with_checks", lambda: _compiled(process, "default"))
    if world_size == 4:
        process.run("data_parallel", lambda: _data_parallel(process))
    provoke_errors(process)
    use_other_groups(process)
    process.save("end", True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave()
