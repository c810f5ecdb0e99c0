"""A process of test_linear_processes.py: ``linear_worker.py RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from linear_cases import HIDDEN, V, linear_inputs
from spawned import mean_of_ones, work
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

import eaft_ext

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "gate": eaft_ext.HardGate(0.5), "chunk_size": 5},
    "none": {"reduction": "none", "gate": eaft_ext.FocalGate(1.5), "chunk_size": 3},
    "own_gate": {"gate": lambda nll, entropy: nll / (1 + entropy), "chunk_size": 4},
    "num_items": {"num_items_in_batch": torch.tensor(7), "chunk_size": 1},
    "wide_k": {"k": 60, "normalizer": 3.0},
}
# Of the rows of the weight: those before each process's own, and after the last one.
UNEVEN = {1: [0, V], 2: [0, 7, V], 3: [0, 30, 30, V]}
PADDING = 3
# Of a mesh: its shape, and how the hidden and the weight lie on it.
PLACEMENTS: dict[str, tuple[tuple[int, ...], list[Any], list[Any]]] = {
    "vocabulary": ((-1,), [Replicate()], [Shard(0)]),
    "vocabulary_and_sequence": ((-1,), [Shard(0)], [Shard(0)]),
    "rows": ((-1,), [Shard(0)], [Replicate()]),
    "copies": ((-1,), [Replicate()], [Replicate()]),
}
PLACEMENTS_OF_FOUR: dict[str, tuple[tuple[int, ...], list[Any], list[Any]]] = {
    "rows_and_vocabulary": ((2, 2), [Shard(0), Replicate()], [Replicate(), Shard(0)]),
    "all_at_once": ((2, 2), [Shard(0), Shard(1)], [Replicate(), Shard(0)]),
}


def placements_of(world_size: int) -> dict[str, tuple[tuple[int, ...], list[Any], list[Any]]]:
    """Those that so many processes can have."""
    return PLACEMENTS | (PLACEMENTS_OF_FOUR if world_size == 4 else {})


def scalar(loss: Tensor) -> Tensor:
    """What the gradient is taken of: of losses per token, each with another upstream."""
    return 3 * loss if loss.dim() == 0 else loss.square().sum()


def own_rows(rank: int, world_size: int, kind: str) -> tuple[int, int, dict[str, Any]]:
    """From which row to which one of the weight, and what the call is told of that."""
    if kind == "uneven":
        start, stop = UNEVEN[world_size][rank : rank + 2]
        return start, stop, {"vocab_start": start, "vocab_size": V}
    columns = -(-V // world_size)
    told = {"vocab_size": V} if columns * world_size > V else {}
    return rank * columns, (rank + 1) * columns, told


def run_shards(rank: int, world_size: int, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """A forward and a backward, the weight's rows and the bias divided."""
    hidden, weight, bias, labels = linear_inputs()
    start, stop, told = own_rows(rank, world_size, kind)
    padding = max(0, stop - V)
    weight = torch.nn.functional.pad(weight, (0, 0, 0, padding), value=float("nan"))
    bias = torch.nn.functional.pad(bias, (0, padding), value=float("nan"))
    leaves = [hidden, weight[start:stop].clone(), bias[start:stop].clone()]
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        loss, stats = eaft_ext.vocab_parallel_linear_gated_ce(
            hidden,
            weight,
            labels,
            bias,
            group=dist.group.WORLD,
            return_stats=True,
            reduce_hidden_gradient=kind != "parts",
            **told,
            **options,
        )
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        scalar(loss).backward()
    return {
        "loss": loss.detach(),
        "stats": list(stats),
        "hidden": hidden.grad,
        "weight": weight.grad,
        "bias": bias.grad,
        "collectives": [
            Counter(event.name for event in profiler.events() if event.name.startswith("gloo:"))
            for profiler in (forward, backward)
        ],
    }


def full(tensor: Tensor) -> Tensor:
    """All of a result, which is a DTensor."""
    assert isinstance(tensor, DTensor), type(tensor)
    return tensor.full_tensor().detach()


def run_dtensors(
    shape: tuple[int, ...], of_hidden: list[Any], of_weight: list[Any], options: dict[str, Any]
) -> dict[str, Any]:
    """A forward and a backward, with an input that is computed and one that is not."""
    hidden, weight, bias, labels = linear_inputs()
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", tuple(world_size if n < 0 else n for n in shape))
    leaf = distribute_tensor(hidden, mesh, of_hidden).requires_grad_()
    weight, bias = (
        distribute_tensor(parameter, mesh, of_weight).requires_grad_()
        for parameter in (weight, bias)
    )
    loss, stats = eaft_ext.linear_gated_ce(
        leaf * 1, weight, labels, bias, return_stats=True, **options
    )
    scalar(loss).backward()
    return {
        "loss": full(loss),
        "stats": [full(stat) for stat in stats],
        "hidden": full(leaf.grad),
        "weight": full(weight.grad),
        "bias": full(bias.grad),
    }


class Head(torch.nn.Linear):
    """An output layer that gives the loss, so that FSDP's hooks are around it."""

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return eaft_ext.linear_gated_ce(hidden, self.weight, labels, self.bias, chunk_size=4)


def run_fsdp(rank: int, world_size: int, how: str) -> dict[str, Any]:
    """Every process has tokens of its own; the weight is sharded by FSDP2."""
    hidden, weight, bias, labels = linear_inputs(seed=rank)
    head = Head(HIDDEN, V)
    with torch.no_grad():
        # The same in all processes.
        _, weight, bias, _ = linear_inputs(seed=0)
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    fully_shard(head, mesh=init_device_mesh("cpu", (world_size,)))
    hidden.requires_grad_()
    if how == "inside":
        loss = head(hidden, labels)
    else:
        loss = eaft_ext.linear_gated_ce(hidden, head.weight, labels, head.bias)
    loss.backward()
    # FSDP2's own mean may be none.
    mean = mean_of_ones() if how == "inside" else 1.0
    return {
        "loss": loss.detach(),
        "hidden": hidden.grad,
        "weight": full(head.weight.grad) / mean,
        "bias": full(head.bias.grad) / mean,
    }


def _differing(rank: int, world_size: int, what: str) -> None:
    """A call in which this process does not mean what the others mean."""
    hidden, weight, _, labels = linear_inputs()
    rows = V // world_size
    weight = weight[:rows]
    labels %= rows
    options: dict[str, Any] = {}
    odd = rank == world_size - 1
    if what == "tokens" and odd:
        hidden, labels = hidden[1:], labels[1:]
    elif what == "ignored" and odd:
        labels = labels.clone()
        labels[4] = -100
    elif what == "labels" and odd:
        labels = labels.clone()
        labels[7] += 1
    elif what == "outside":
        labels = labels.clone()
        labels[9] = world_size * rows
    elif what == "chunk_size" and odd:
        options["chunk_size"] = 4
    elif what == "gradient":
        hidden.requires_grad_(not odd)
        weight = weight.clone().requires_grad_()
    elif what == "bad_weight" and odd:
        weight = weight[:, 1:]
    elif what == "no_size":
        options["vocab_start"] = rank * rows
    elif what == "dtensor":
        mesh = init_device_mesh("cpu", (world_size,))
        weight = distribute_tensor(weight, mesh, [Shard(0)])
    elif what == "placement":
        mesh = init_device_mesh("cpu", (world_size,))
        hidden = distribute_tensor(hidden, mesh, [Replicate()])
        weight = distribute_tensor(weight, mesh, [Shard(1)])
        eaft_ext.linear_gated_ce(hidden, weight, labels)
        return
    elif what == "half":
        mesh = init_device_mesh("cpu", (world_size,))
        eaft_ext.linear_gated_ce(distribute_tensor(hidden, mesh, [Partial()]), weight, labels)
        return
    if what == "labels":
        options["chunk_size"] = 3
    eaft_ext.vocab_parallel_linear_gated_ce(
        hidden, weight, labels, group=dist.group.WORLD, **options
    )


ERRORS = (
    "tokens",
    "ignored",
    "labels",
    "outside",
    "chunk_size",
    "gradient",
    "bad_weight",
    "no_size",
    "dtensor",
    "placement",
    "half",
)


def sentence(rank: int, world_size: int, what: str) -> str:
    """The error of a call that has one."""
    try:
        _differing(rank, world_size, what)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(rank: int, world_size: int) -> dict[str, Any]:
    """All cases that so many processes can have."""
    found: dict[str, Any] = {}
    kinds = ["even", "parts", *(["uneven"] if world_size in UNEVEN else [])]
    for option, options in OPTIONS.items():
        for kind in kinds:
            found[f"{kind} {option}"] = run_shards(rank, world_size, kind, options)
        for name, placed in placements_of(world_size).items():
            found[f"{name} {option}"] = run_dtensors(*placed, options)
    for how in ("inside", "outside"):
        found[f"fsdp {how}"] = run_fsdp(rank, world_size, how)
    if world_size == 2:
        for what in ERRORS:
            found[f"error {what}"] = sentence(rank, world_size, what)
    return found


if __name__ == "__main__":
    work(main)
