"""The loss of logits that are a DTensor: rows divided, the vocabulary divided, or neither."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from eaft_ext._checks import (
    check_labels,
    check_logits,
    check_placement,
    check_weight_shape,
    check_weight_values,
)
from eaft_ext._options import Keywords, Reduce, ReturnStats, check_gradient_in_forward, checked
from eaft_ext.parallel import _agreement
from eaft_ext.parallel._agreement import NotInGroupError
from eaft_ext.parallel._group import Member, Words, group_losses
from eaft_ext.parallel._shard import VocabShard
from eaft_ext.reference import TokenStats


def _vocab_dim(op: str, logits: DTensor) -> int | None:
    """The dimension of the mesh that divides the vocabulary."""
    last = logits.dim() - 1
    for placement in logits.placements:
        if not (isinstance(placement, Replicate) or type(placement) is Shard):
            raise ValueError(
                f"{op}: logits must be Shard or Replicate on every dimension of their mesh, got "
                f"{logits.placements}; redistribute() makes them so"
            )
    dims = [i for i, placement in enumerate(logits.placements) if placement.is_shard(last)]
    if len(dims) > 1:
        raise ValueError(
            f"{op}: the vocabulary must be divided over one dimension of the mesh, got "
            f"{logits.placements}"
        )
    return dims[0] if dims else None


class PlacedRows(NamedTuple):
    """Where the tokens of a call are: ``placements`` on a mesh, of labels with that ``shape``."""

    mesh: DeviceMesh
    placements: list[Placement]
    shape: torch.Size

    def local_labels(
        self, op: str, labels: Tensor, whole: DTensor, local: Tensor, name: str = "logits"
    ) -> Tensor:
        """The labels of this process's rows, for ``whole`` logits (or what ``name`` says).

        Labels that are no DTensor are those of this process, or of all where they have that shape.
        """
        if isinstance(labels, DTensor) or labels.shape != local.shape[:-1]:
            check_placement(op, labels, whole, name)
        if isinstance(labels, DTensor):
            if labels.device_mesh != self.mesh:
                raise ValueError(f"{op}: labels and {name} are on different meshes")
            return labels.redistribute(placements=self.placements).to_local()
        if labels.shape == local.shape[:-1]:
            return labels
        everywhere = [Replicate()] * self.mesh.ndim
        replicated = DTensor.from_local(labels, self.mesh, everywhere, run_check=False)
        return replicated.redistribute(placements=self.placements).to_local()

    def local_reduce(
        self,
        op: str,
        reduce: Reduce,
        labels: Tensor,
        whole: DTensor,
        local: Tensor,
        name: str = "logits",
    ) -> Reduce:
        """With the weights of this process's tokens, placed as the labels may be."""
        weight = reduce.token_weight
        if weight is None:
            return reduce
        check_weight_shape(op, weight, labels)
        weight = self.local_labels(op, weight, whole, local, name)
        return replace(reduce, token_weight=weight)

    def per_token(self, local: Tensor) -> DTensor:
        """A number for each token."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )

    def summed(self, local: Tensor) -> DTensor:
        """A sum over rows; those that are divided are added up."""
        sums = [Replicate() if isinstance(p, Replicate) else Partial() for p in self.placements]
        total = DTensor.from_local(local, self.mesh, sums, run_check=False)
        return total.redistribute(placements=[Replicate()] * self.mesh.ndim)

    def divisor(self, reduce: Reduce, valid: Tensor, dtype: torch.dtype) -> float | Tensor:
        """What the sum over all rows is divided by."""
        if reduce.reduction == "mean" and reduce.num_items_in_batch is None:
            return self.summed(valid.sum()).to_local().clamp(min=1)
        if isinstance(reduce.num_items_in_batch, DTensor):
            reduce = replace(reduce, num_items_in_batch=reduce.num_items_in_batch.full_tensor())
        return reduce.divisor(valid, dtype)


def member_of(mesh: DeviceMesh, dim: int | None) -> Member | None:
    """This process among those that share the vocabulary, if it is divided."""
    if dim is None:
        return None
    return Member(mesh.get_group(dim), _rank_of(mesh, dim), mesh.size(dim))


def _rank_of(mesh: DeviceMesh, dim: int) -> int:
    """This process's place on a dimension of the mesh, so that torch.compile can trace it."""
    place = mesh.get_coordinate()
    if place is None:
        raise NotInGroupError(f"process {dist.get_rank()} is not in {mesh}")
    return place[dim]


def shard_of(
    op: str, mesh: DeviceMesh, total: int, columns: int, dim: int | None, name: str = "logits"
) -> VocabShard:
    """The shard of this process, which has so many columns of a ``total`` divided over ``dim``."""
    if dim is None:
        return VocabShard(0, None, total)
    # As torch.chunk divides: the last ones may have less, or nothing.
    chunk = -(-total // mesh.size(dim))
    start = min(chunk * _rank_of(mesh, dim), total)
    if columns != min(chunk, total - start):
        raise ValueError(
            f"{op}: the local {name} have {columns} columns, and as a Shard of "
            f"{total} they would have {min(chunk, total - start)}"
        )
    return VocabShard(start, None, total)


def gated_ce_of_dtensor(
    op: str,
    logits: DTensor,
    labels: Tensor,
    k: int | None,
    options: Keywords,
    inplace_backward: bool,
    gradient_in_forward: bool,
    return_stats: ReturnStats,
) -> tuple[Tensor, TokenStats]:
    """Loss and stats as DTensors on the mesh of the logits; see :func:`eaft_ext.gated_ce`.

    A loss per token is placed as the rows are; a mean or sum is replicated.
    """
    mesh = logits.device_mesh
    with _agreement.told_to_others() as others:
        others.are(None)
        dim = _vocab_dim(op, logits)
        member = member_of(mesh, dim)
        others.are(None if member is None else member.group)
        check_logits(op, logits)
        check_labels(op, labels)
        of_token, reduce = checked(op, k, logits, return_stats=return_stats, **options)
        check_gradient_in_forward(op, gradient_in_forward, reduce.reduction)
        placements = [Replicate() if i == dim else p for i, p in enumerate(logits.placements)]
        rows = PlacedRows(mesh, placements, logits.shape[:-1])
        local_logits = logits.to_local()
        local_labels = rows.local_labels(op, labels, logits, local_logits)
        reduce = rows.local_reduce(op, reduce, labels, logits, local_logits)
        check_weight_values(op, reduce.token_weight, local_labels, of_token.ignore_index)
        shard = shard_of(op, mesh, logits.size(-1), local_logits.size(-1), dim)
    words = Words(shard, member)
    valid = local_labels != of_token.ignore_index
    local_labels, weighing = reduce.without_muted(local_labels, of_token)
    loss, stats = group_losses(
        op, local_logits, local_labels, of_token, weighing, words, inplace_backward
    )
    loss = weighing.weighted(loss)
    placed = stats.map(rows.per_token)
    if reduce.reduction == "none":
        return rows.per_token(loss), placed
    total = loss.sum()
    return rows.summed(total / rows.divisor(reduce, valid, total.dtype)), placed
