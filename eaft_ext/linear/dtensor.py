"""The linear loss of DTensors: a weight that FSDP has sharded, or a vocabulary that is divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from eaft_ext._checks import check_placement, check_same_dtype
from eaft_ext.gates import Gate, GateFunction
from eaft_ext.linear._token_losses import Product, Shard, reduced_loss
from eaft_ext.linear.vocab_parallel import compare_calls
from eaft_ext.parallel._group import Member
from eaft_ext.parallel.dtensor import PlacedRows, shard_of
from eaft_ext.reference import Reduction, TokenStats


def gathered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole of a parameter that FSDP2 has sharded, in the dtype that it is used in.

    Its gradient is the mean over the processes, as FSDP's gradients are.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    cast: Any = parameter.to(dtype)
    whole: Tensor = cast.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        # gloo has no mean of its own.
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def _vocab_dim(op: str, weight: DTensor) -> int | None:
    """The dimension of the mesh that divides the vocabulary."""
    dims = [i for i, p in enumerate(weight.placements) if not isinstance(p, Replicate)]
    if len(dims) > 1 or not all(weight.placements[i].is_shard(0) for i in dims):
        raise ValueError(
            f"{op}: weight must be Shard(0) on one dimension of its mesh and Replicate on all "
            f"others, got {weight.placements}"
        )
    return dims[0] if dims else None


def _placements_of_rows(op: str, hidden: DTensor, dim: int | None) -> list[Placement]:
    """Where the tokens are: not divided where the vocabulary is."""
    placements: list[Placement] = []
    for i, placement in enumerate(hidden.placements):
        whole = i == dim or isinstance(placement, Partial)
        placements.append(Replicate() if whole else placement)
        if placements[-1].is_shard(hidden.dim() - 1):
            raise ValueError(
                f"{op}: the last dimension of the hidden must not be divided, got "
                f"{hidden.placements}; redistribute() gathers it"
            )
    return placements


def linear_gated_ce_of_dtensor(
    op: str,
    hidden: DTensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    k: int,
    gate: Gate | GateFunction,
    ignore_index: int,
    reduction: Reduction,
    num_items_in_batch: float | Tensor | None,
    chunk_size: int | None,
    accumulate_in_float32: bool | None,
) -> tuple[Tensor, TokenStats]:
    """Loss and stats as DTensors on the mesh, of a hidden and a weight that are on it.

    A loss per token is placed as the rows are; a mean or sum is replicated.
    """
    if not isinstance(weight, DTensor) or not (bias is None or isinstance(bias, DTensor)):
        raise TypeError(f"{op}: with a DTensor as hidden, weight and bias must be DTensors too")
    mesh = hidden.device_mesh
    if weight.device_mesh != mesh or (bias is not None and bias.device_mesh != mesh):
        raise ValueError(f"{op}: hidden, weight and bias must be on one mesh")
    if isinstance(bias, DTensor) and bias.placements != weight.placements:
        raise ValueError(
            f"{op}: bias must be placed as the weight is, {weight.placements}, got "
            f"{bias.placements}"
        )
    dim = _vocab_dim(op, weight)
    placements = _placements_of_rows(op, hidden, dim)
    rows = PlacedRows(mesh, placements, hidden.shape[:-1])
    # Of a process's rows and columns alone: autograd adds up what belongs together.
    of_rows = [Partial() if i == dim else p for i, p in enumerate(placements)]
    of_columns = [
        p if i == dim else Replicate() if isinstance(placements[i], Replicate) else Partial()
        for i, p in enumerate(weight.placements)
    ]
    local_hidden = hidden.redistribute(placements=placements).to_local(grad_placements=of_rows)
    local_weight = weight.to_local(grad_placements=of_columns)
    local_bias = bias.to_local(grad_placements=of_columns) if isinstance(bias, DTensor) else None
    local_labels = rows.local_labels(op, labels, hidden, local_hidden, "hidden")
    check_placement(op, local_labels, local_hidden, "hidden")
    product = Product(local_hidden, local_weight, local_bias).in_autocast_dtype()
    check_same_dtype(op, *product)
    columns = shard_of(op, mesh, weight.size(0), local_weight.size(0), dim, "weight")
    shard = None
    if dim is not None:
        member = Member(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim))
        compare_calls(
            op,
            member,
            product,
            local_labels,
            k,
            gate,
            ignore_index,
            reduction,
            columns,
            chunk_size,
        )
        shard = Shard(columns, member.group.group_name, member.size, reduce_hidden=False)
    options: dict[str, Any] = {"num_items_in_batch": None}
    if reduction == "mean":
        valid = local_labels != ignore_index
        divisor = rows.mean_divisor(valid, num_items_in_batch, valid.new_empty(0).float().dtype)
        options["num_items_in_batch"] = divisor
    loss, stats = reduced_loss(
        product,
        local_labels,
        k,
        gate,
        ignore_index,
        reduction,
        chunk_size=chunk_size,
        accumulate_in_float32=accumulate_in_float32,
        shard=shard,
        **options,
    )
    placed = TokenStats(*(rows.per_token(stat) for stat in stats))
    return (rows.per_token(loss) if reduction == "none" else rows.summed(loss)), placed
