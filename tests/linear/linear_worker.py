"""A process of test_linear_processes.py: ``linear_worker.py RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from linear_cases import HIDDEN, V, linear_inputs
from spawned import mean_of_ones, work
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import eaft_ext
from eaft_ext.linear import _chunks, _reduced_loss

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "gate": eaft_ext.HardGate(0.5), "chunk_size": 5},
    "none": {"reduction": "none", "gate": eaft_ext.FocalGate(1.5), "chunk_size": 3},
    "own_gate": {"gate": lambda nll, entropy: nll / (1 + entropy), "chunk_size": 4},
    "num_items": {"num_items_in_batch": torch.tensor(7), "chunk_size": 1},
    "wide_k": {"k": 60, "normalizer": 3.0},
    "family": {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-2, "chunk_size": 5},
    "family_own_gate": {
        "z_loss": 1e-2,
        "label_smoothing": 0.1,
        "gate": lambda nll, entropy: nll / (1 + entropy),
    },
    "token_weight": {"token_weight": torch.linspace(0, 2, 13), "z_loss": 1e-2},
    "whole_entropy": {"k": None, "return_stats": "full", "z_loss": 1e-2, "chunk_size": 5},
    "full_stats": {
        "return_stats": "full",
        "reduction": "none",
        "gate": lambda nll, entropy: nll / (1 + entropy),
        "chunk_size": 4,
    },
}
# Of a vocabulary in shards: every process drops the same tokens. Where the tokens are divided, too,
# each drops of its own.
DROPPING: dict[str, dict[str, Any]] = {
    "dropped": {"drop_below": 0.2, "chunk_size": 5, "alpha": 2.0},
    "dropped_of_none": {"drop_below": 0.2, "reduction": "none", "chunk_size": 5},
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
            reduce_hidden_gradient=kind != "parts",
            **told,
            **({"return_stats": True} | options),
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
        leaf * 1, weight, labels, bias, **({"return_stats": True} | options)
    )
    scalar(loss).backward()
    return {
        "loss": full(loss),
        "stats": list(stats.map(full)),
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
    whole = weight
    weight = weight[rank * rows : (rank + 1) * rows]
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
    elif what == "whole_weight":
        weight = whole
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
    elif what == "reduce":
        options["reduce_hidden_gradient"] = not odd
    elif what == "forward_mode":
        with forward_ad.dual_level():
            hidden = forward_ad.make_dual(hidden, torch.ones_like(hidden))
            eaft_ext.vocab_parallel_linear_gated_ce(hidden, weight, labels, group=dist.group.WORLD)
        return
    elif what == "dtype":
        weight = weight.bfloat16()
    elif what == "hidden_dtype" and odd:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    elif what == "labels_of_two_dimensions":
        hidden, labels = hidden[:12].view(3, 4, -1), labels[:12].view(3, 4).clamp(min=0)
        labels[2, 1] = int(odd)
        options["chunk_size"] = 5
    elif what in OF_DTENSORS:
        _differing_dtensors(world_size, odd, what)
        return
    elif what == "half":
        mesh = init_device_mesh("cpu", (world_size,))
        eaft_ext.linear_gated_ce(distribute_tensor(hidden, mesh, [Replicate()]), weight, labels)
        return
    if what == "labels":
        options["chunk_size"] = 3
    eaft_ext.vocab_parallel_linear_gated_ce(
        hidden, weight, labels, group=dist.group.WORLD, **options
    )


OF_DTENSORS = (
    "dtensor_k",
    "dtensor_labels",
    "dtensor_chunk_size",
    "dtensor_bias",
    "meshes",
    "divided_features",
)


def _differing_dtensors(world_size: int, odd: bool, what: str) -> None:
    """The same of DTensors."""
    hidden, weight, bias, labels = linear_inputs()
    mesh = init_device_mesh("cpu", (world_size,))
    other_mesh = init_device_mesh("cpu", (1, world_size))
    features = [Shard(1)] if what == "divided_features" else [Replicate()]
    # That of the vocabulary's dimension would be gathered.
    of_weight = [Replicate()] if what == "divided_features" else [Shard(0)]
    of_bias = [Replicate()] if what == "dtensor_bias" else of_weight
    eaft_ext.linear_gated_ce(
        distribute_tensor(hidden, mesh, features),
        distribute_tensor(weight, other_mesh, [Replicate(), Shard(0)])
        if what == "meshes"
        else distribute_tensor(weight, mesh, of_weight),
        labels[1:] if what == "dtensor_labels" and odd else labels,
        distribute_tensor(bias, mesh, of_bias),
        1 if what == "dtensor_k" and odd else 20,
        chunk_size=4 if what == "dtensor_chunk_size" and odd else None,
    )


class _EntropyGateOfOnesOwn(eaft_ext.EntropyGate):
    """The same function, which no kernel knows."""


def run_few_words(rank: int) -> list[Tensor]:
    """Fewer words than k."""
    hidden, weight, _, labels = linear_inputs(vocab_size=10)
    told = {"vocab_start": 4 * rank, "vocab_size": 10, "group": dist.group.WORLD}
    shard = weight[4 * rank : 10 if rank else 4]
    loss_of = eaft_ext.vocab_parallel_linear_gated_ce
    losses = [
        loss_of(hidden, shard, labels, gate=gate, **told)
        for gate in (eaft_ext.EntropyGate(), _EntropyGateOfOnesOwn())
    ]
    with patch.object(_reduced_loss, "takes_kernel", lambda op, hidden: False):
        losses.append(loss_of(hidden, shard, labels, **told))
    return losses


def run_uneven_chunks(rank: int) -> Tensor:
    """One shard has nine tenths of the words, and the limits are such that chunks are short."""
    hidden, weight, _, labels = linear_inputs(2000, 9000, hidden_size=2)
    told = {"vocab_start": 8100 * rank, "vocab_size": 9000, "group": dist.group.WORLD}
    shard = weight[8100:] if rank else weight[:8100]
    with patch.dict(_chunks.MAX_CHUNK_BYTES, cpu=2**23):
        return eaft_ext.vocab_parallel_linear_gated_ce(hidden, shard, labels, **told)


def run_gathered(world_size: int) -> dict[str, Any]:
    """In what dtype a float32 weight that FSDP2 has sharded is gathered, and its gradient is."""
    gathered: dict[str, list[torch.dtype]] = {}
    gradients = {}
    for name in ("bfloat16", "autocast", "float32"):
        hidden, weight, _, labels = linear_inputs()
        mesh = init_device_mesh("cpu", (world_size,))
        weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        hidden = hidden.bfloat16() if name == "bfloat16" else hidden
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "autocast")
        with autocast, _Gathers() as gathers:
            loss = eaft_ext.linear_gated_ce(hidden, weight, labels)
        loss.backward()
        gathered[name] = gathers.dtypes
        gradients[name] = weight.grad.dtype
    return {"gathered": gathered, "dtypes of the gradient": gradients}


class _Gathers(TorchDispatchMode):
    """The dtypes that are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if "all_gather" in str(function):
            self.dtypes.append(args[0].dtype)
        return function(*args, **kwargs or {})


ERRORS = (
    "tokens",
    "ignored",
    "labels",
    "outside",
    "chunk_size",
    "gradient",
    "bad_weight",
    "whole_weight",
    "no_size",
    "dtensor",
    "placement",
    "half",
    "reduce",
    "forward_mode",
    "dtype",
    "hidden_dtype",
    "labels_of_two_dimensions",
    *OF_DTENSORS,
)


def sentence(rank: int, world_size: int, what: str) -> str:
    """The error of a call that has one."""
    try:
        _differing(rank, world_size, what)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(rank: int, world_size: int) -> dict[str, Any]:
    """All cases that so many processes can have."""
    found: dict[str, Any] = {}
    kinds = ["even", "parts", *(["uneven"] if world_size in UNEVEN else [])]
    for option, options in (OPTIONS | DROPPING).items():
        for kind in kinds:
            found[f"{kind} {option}"] = run_shards(rank, world_size, kind, options)
        if option in DROPPING:
            continue
        for name, placed in placements_of(world_size).items():
            found[f"{name} {option}"] = run_dtensors(*placed, options)
    for how in ("inside", "outside"):
        found[f"fsdp {how}"] = run_fsdp(rank, world_size, how)
    if world_size == 2:
        found["few words"] = run_few_words(rank)
        found["uneven chunks"] = run_uneven_chunks(rank)
        found |= run_gathered(world_size)
        for what in ERRORS:
            found[f"error {what}"] = sentence(rank, world_size, what)
    return found


if __name__ == "__main__":
    work(main)
