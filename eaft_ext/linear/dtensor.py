"""The linear loss of DTensors: a weight that FSDP has sharded, or a vocabulary that is divided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from eaft_ext._checks import (
    check_chunks,
    check_labels,
    check_linear,
    check_placement,
    check_same_dtype,
    check_weight_values,
)
from eaft_ext._dispatch import is_transformed
from eaft_ext._options import Keywords, ReturnStats, checked
from eaft_ext._registration import stats_dtype
from eaft_ext.linear._reduced_loss import (
    Chunking,
    Product,
    WeightShard,
    autocast_dtype,
    reduced_loss,
)
from eaft_ext.linear.vocab_parallel import compare_calls
from eaft_ext.parallel import _agreement
from eaft_ext.parallel._group import Words
from eaft_ext.parallel._shard import VocabShard
from eaft_ext.parallel.dtensor import PlacedRows, member_of, shard_of
from eaft_ext.reference import TokenStats


def gathered(hidden: Tensor, parameter: Tensor) -> Tensor:
    """The whole of a parameter that FSDP2 has sharded, in the dtype of the product.

    Its gradient is the mean over the processes, as FSDP's gradients are.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    shard: Any = parameter.to(autocast_dtype(hidden) or hidden.dtype)
    if shard is parameter:  # which would keep a hook for ever
        shard = parameter.view_as(parameter)
    if shard.requires_grad:
        # Of a shard, and not of the whole; gloo has no mean of its own.
        shard.register_hook(lambda gradient: gradient / mesh.size())
    whole: Tensor = shard.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    return whole


def _divided_dim(op: str, weight: DTensor) -> int | None:
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


class _Local(NamedTuple):
    """A call as it is for this process alone."""

    product: Product
    labels: Tensor
    rows: PlacedRows
    columns: VocabShard


def _local_call(
    op: str,
    hidden: DTensor,
    weight: DTensor,
    labels: Tensor,
    bias: DTensor | None,
    dim: int | None,
) -> _Local:
    mesh = hidden.device_mesh
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
    local_bias = None if bias is None else bias.to_local(grad_placements=of_columns)
    local_labels = rows.local_labels(op, labels, hidden, local_hidden, "hidden")
    check_placement(op, local_labels, local_hidden, "hidden")
    product = Product(local_hidden, local_weight, local_bias).in_autocast_dtype()
    check_same_dtype(op, *product)
    columns = shard_of(op, mesh, weight.size(0), local_weight.size(0), dim, "weight")
    return _Local(product, local_labels, rows, columns)


def linear_gated_ce_of_dtensor(
    op: str,
    product: Product,
    labels: Tensor,
    k: int | None,
    options: Keywords,
    chunking: Chunking,
    return_stats: ReturnStats,
) -> tuple[Tensor, TokenStats]:
    """Loss and stats as DTensors on the mesh, of a hidden and a weight that are on it.

    A loss per token is placed as the rows are; a mean or sum is replicated.
    """
    hidden, weight, bias = product
    assert isinstance(hidden, DTensor), "this is for those"
    with _agreement.told_to_others() as others:
        others.are(None)
        mesh = hidden.device_mesh
        if not isinstance(weight, DTensor) or not (bias is None or isinstance(bias, DTensor)):
            raise TypeError(f"{op}: with a DTensor as hidden, weight and bias must be DTensors too")
        if weight.device_mesh != mesh or (bias is not None and bias.device_mesh != mesh):
            raise ValueError(f"{op}: hidden, weight and bias must be on one mesh")
        dim = _divided_dim(op, weight)
        member = member_of(mesh, dim)
        others.are(None if member is None else member.group)
        if bias is not None and bias.placements != weight.placements:
            raise ValueError(
                f"{op}: bias must be placed as the weight is, {weight.placements}, got "
                f"{bias.placements}"
            )
        check_linear(op, hidden, weight, bias)
        check_labels(op, labels)
        of_token, reduce = checked(op, k, hidden, "hidden", return_stats=return_stats, **options)
        check_chunks(op, *chunking, of_token.z_loss)
        given = labels
        product, labels, rows, columns = _local_call(op, hidden, weight, labels, bias, dim)
        reduce = rows.local_reduce(op, reduce, given, hidden, product.hidden, "hidden")
        check_weight_values(op, reduce.token_weight, labels, of_token.ignore_index)
    if is_transformed(*product):
        raise RuntimeError(f"{op}: torch.func and forward mode cannot look into DTensors")
    shard = None
    if member is not None:
        compare_calls(
            op,
            Words(columns, member),
            product,
            labels,
            of_token,
            reduce,
            chunking,
            reduce_hidden=False,
        )
        shard = WeightShard.of(columns, member, reduce_hidden=False)
    if reduce.reduction == "mean":
        # Of all rows.
        valid = labels != of_token.ignore_index
        divisor = rows.divisor(reduce, valid, stats_dtype(product.hidden))
        reduce = replace(reduce, num_items_in_batch=divisor)
    labels, reduce = reduce.without_muted(labels, of_token)
    loss, stats = reduced_loss(product, labels, of_token, reduce, chunking, shard)
    placed = stats.map(rows.per_token)
    return (rows.per_token(loss) if reduce.reduction == "none" else rows.summed(loss)), placed
