"""A process of test_dtensor.py: ``dtensor_worker.py RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

from typing import Any

import torch
from inputs import make
from spawned import work
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

import eaft_ext

# Neither the tokens nor the vocabulary can be divided evenly by 3 or by 4.
N, V = 10, 50
# Of the mesh: its shape, and how the logits lie on it.
PLACEMENTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "vocabulary": ((-1,), [Shard(1)]),
    "vocabulary_by_a_negative_number": ((-1,), [Shard(-1)]),
    "rows": ((-1,), [Shard(0)]),
    "replicated": ((-1,), [Replicate()]),
}
PLACEMENTS_OF_FOUR: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows_and_vocabulary": ((2, 2), [Shard(0), Shard(1)]),
    "vocabulary_and_rows": ((2, 2), [Shard(1), Shard(0)]),
    "copies_and_vocabulary": ((2, 2), [Replicate(), Shard(1)]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "gate": eaft_ext.HardGate(0.5)},
    "none": {"reduction": "none", "gate": lambda nll, entropy: nll / (1 + entropy)},
    "num_items": {"num_items_in_batch": torch.tensor(7)},
    "in_place": {"inplace_backward": True},
    "k_above_the_shard": {"k": 40, "normalizer": 3.0},
    "family": {"softcap": 5.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2},
    "token_weight": {"token_weight": torch.linspace(0, 2, N)},
    "whole_entropy": {"k": None, "return_stats": "full", "z_loss": 1e-2},
    "full_stats": {"return_stats": "full", "reduction": "none", "label_smoothing": 0.1},
}
LABELS = ("tensor", "dtensor", "local")


def placements_of(world_size: int) -> dict[str, tuple[tuple[int, ...], list[Any]]]:
    """Those that so many processes can have."""
    return PLACEMENTS | (PLACEMENTS_OF_FOUR if world_size == 4 else {})


def whole() -> tuple[Tensor, Tensor]:
    """The same in every process."""
    return make(N, V, ignored=0.2, seed=3)


def full(tensor: Tensor) -> Tensor:
    """All of a result, which is a DTensor."""
    assert isinstance(tensor, DTensor), type(tensor)
    return tensor.full_tensor().detach()


def run(shape: tuple[int, ...], placements: list[Any], kind: str, options: Any) -> dict[str, Any]:
    """A forward and a backward."""
    logits, labels = whole()
    world_size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", tuple(world_size if n < 0 else n for n in shape))
    leaf = distribute_tensor(logits, mesh, placements).requires_grad_()

    def placed(per_token: Tensor) -> Tensor:
        if kind == "dtensor":
            return distribute_tensor(per_token, mesh, [Replicate()] * mesh.ndim)
        if kind == "local":
            rows = [p if p == Shard(0) else Replicate() for p in placements]
            return distribute_tensor(per_token, mesh, rows).to_local()
        return per_token

    labels = placed(labels)
    if "token_weight" in options:
        options = options | {"token_weight": placed(options["token_weight"])}
    # Not a leaf: it may be overwritten.
    with loss_parallel(), CommDebugMode() as forward:
        loss, stats = eaft_ext.gated_ce(leaf * 1, labels, **({"return_stats": True} | options))
    scalar = loss if loss.dim() == 0 else loss.square().sum()
    with loss_parallel(), CommDebugMode() as backward:
        scalar.backward()
    assert leaf.grad.placements == leaf.placements
    return {
        "loss": full(loss),
        "stats": list(stats.map(full)),
        "gradient": full(leaf.grad),
        "collectives": (forward.get_total_counts(), backward.get_total_counts()),
    }


def error_of(**arguments: Any) -> str:
    """What a wrong call raises."""
    try:
        eaft_ext.gated_ce(**arguments)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def function(rank: int, world_size: int) -> dict[str, Any]:
    """All cases, then errors, then a correct call."""
    found: dict[str, Any] = {}
    for name, (shape, placements) in placements_of(world_size).items():
        for kind in LABELS:
            for option, options in OPTIONS.items():
                found[f"{name} {kind} {option}"] = run(shape, placements, kind, options)
    logits, labels = whole()
    mesh = init_device_mesh("cpu", (world_size,))
    divided = distribute_tensor(logits, mesh, [Shard(1)])
    few = labels if rank else labels[:-1]
    found["errors"] = {
        "labels of another shape in one": error_of(logits=divided, labels=few),
        "partial": error_of(logits=DTensor.from_local(logits, mesh, [Partial()]), labels=labels),
        "k": error_of(logits=divided, labels=labels, k=1),
    }
    if world_size == 4:
        square = init_device_mesh("cpu", (2, 2))
        twice = distribute_tensor(logits[:, :48], square, [Shard(1), Shard(1)])
        found["errors"]["vocabulary divided twice"] = error_of(logits=twice, labels=labels)
        other = distribute_tensor(labels, square, [Replicate(), Replicate()])
        found["errors"]["another mesh"] = error_of(logits=divided, labels=other)
    found["afterwards"] = full(eaft_ext.gated_ce(divided, labels))
    compiled = torch.compile(eaft_ext.gated_ce, fullgraph=True, backend="aot_eager")
    found["compiled"] = full(compiled(divided, labels))
    return found


if __name__ == "__main__":
    work(function)
