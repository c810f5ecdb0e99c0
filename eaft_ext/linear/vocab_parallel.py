"""The linear loss where every process has some rows of the weight (tensor parallelism)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import linear

from eaft_ext._checks import (
    check_chunks,
    check_labels,
    check_linear,
    check_num_items,
    check_options,
    check_placement,
    check_same_dtype,
    wants_value_checks,
)
from eaft_ext._dispatch import is_transformed
from eaft_ext.gates import Gate, GateFunction
from eaft_ext.linear._reduced_loss import Product, WeightShard, reduced_loss
from eaft_ext.parallel import _agreement
from eaft_ext.parallel._group import (
    Member,
    can_check,
    check_group,
    check_shard,
    fingerprint,
    note_of_options,
)
from eaft_ext.parallel._shard import VocabShard
from eaft_ext.reference import Reduction, TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_OP = "vocab_parallel_linear_gated_ce"


def compare_calls(
    op: str,
    member: Member,
    product: Product,
    labels: Tensor,
    k: int,
    gate: Gate | GateFunction,
    ignore_index: int,
    reduction: Reduction,
    shard: VocabShard,
    chunk_size: int | None,
    reduce_hidden: bool,
    is_assumed: bool = False,
) -> None:
    """Raise where the processes do not mean the same: then their exchanges would not fit.

    ``is_assumed``: nobody said which shard of the weight each has.
    """
    if not can_check(member.group):
        return
    hidden, weight, bias = product
    note = {
        "the shape of the tokens": list(labels.shape),
        "the dtype of the hidden": str(hidden.dtype),
        "the device of the hidden": hidden.device.type,
        "whether the hidden has a gradient": torch.is_grad_enabled() and hidden.requires_grad,
        "chunk_size": chunk_size,
        "reduce_hidden_gradient": reduce_hidden,
    }
    if labels.device.type == "cpu" or wants_value_checks():
        note["the number of tokens not ignored"] = int((labels != ignore_index).sum())
    note |= note_of_options(k, gate, ignore_index, reduction, shard, weight.size(0))

    @torch.no_grad()
    def row(token: tuple[int, ...], words: slice) -> Tensor:
        some_bias = None if bias is None else bias[words]
        return linear(hidden[token][None], weight[words], some_bias)[0]

    evidence = partial(fingerprint, labels, ignore_index, weight.size(0), row)
    _agreement.check(op, member.group, hidden.device, note, evidence if is_assumed else None)


@overload
def vocab_parallel_linear_gated_ce(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    bias_shard: Tensor | None = ...,
    k: int = ...,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
    reduce_hidden_gradient: bool = ...,
    alpha: float = ...,
    normalizer: float | None = ...,
    gate: Gate | GateFunction | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    num_items_in_batch: float | Tensor | None = ...,
    chunk_size: int | None = ...,
    accumulate_in_float32: bool | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def vocab_parallel_linear_gated_ce(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    bias_shard: Tensor | None = ...,
    k: int = ...,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
    reduce_hidden_gradient: bool = ...,
    alpha: float = ...,
    normalizer: float | None = ...,
    gate: Gate | GateFunction | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    num_items_in_batch: float | Tensor | None = ...,
    chunk_size: int | None = ...,
    accumulate_in_float32: bool | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, TokenStats]: ...
def vocab_parallel_linear_gated_ce(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    bias_shard: Tensor | None = None,
    k: int = 20,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_hidden_gradient: bool = True,
    alpha: float = 1.0,
    normalizer: float | None = None,
    gate: Gate | GateFunction | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    chunk_size: int | None = None,
    accumulate_in_float32: bool | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    r"""Token-gated cross-entropy of an output layer whose weight is divided among processes.

    The loss of :func:`eaft_ext.linear_gated_ce`, exactly: entropy and softmax are of the whole
    vocabulary, and every process holds its columns of one chunk's logits. Each chunk costs one
    all-gather of ``k + 3`` numbers for each token, and the hidden's gradient one all-reduce at the
    end. As in :func:`eaft_ext.vocab_parallel_gated_ce`, do not add up the losses of the group.

    Args:
        hidden: (..., H), the same in all processes.
        weight_shard: (V_shard, H), the rows of this process. Shards may differ, also be empty.
        labels: (...), words of the whole vocabulary, the same in all processes.
        bias_shard: (V_shard), or None.
        group: the processes that share the vocabulary: a ``ProcessGroup`` or a ``DeviceMesh`` of
            one dimension.
        vocab_start: the word of the shard's first row. By default shards are equally long and in
            the order of the group's ranks.
        vocab_size: words of the vocabulary, if rows from there on are padding, whose gradient is
            0. By default there is none. Needed with ``vocab_start``.
        reduce_hidden_gradient: False leaves in each process the part of the hidden's gradient that
            is due to its rows, for a backward that adds the parts up itself, such as that of
            Megatron-LM's gather of a sequence-parallel hidden.
        chunk_size: as for :func:`eaft_ext.linear_gated_ce`, and the same in all processes.

    Other arguments, and what is returned, are as for :func:`eaft_ext.linear_gated_ce`. Loss and
    stats are the same bits in all processes.

    Raises:
        TypeError, ValueError: as :func:`eaft_ext.linear_gated_ce` does, and in all processes where
            :func:`eaft_ext.vocab_parallel_gated_ce` does that, also for the whole weight in each.
        RuntimeError: under ``torch.func`` and in forward mode; from a second derivative.
    """
    with _agreement.told_to_others() as others:
        member = check_group(_OP, group)
        others.are(member.group)
        check_linear(_OP, hidden, weight_shard, bias_shard, smallest_vocab=0)
        for name, tensor in (("hidden", hidden), ("weight_shard", weight_shard)):
            if hasattr(tensor, "device_mesh"):
                raise TypeError(
                    f"{_OP}: {name} is a DTensor; give DTensors to linear_gated_ce, or give "
                    f"{name}.to_local() to this"
                )
        check_labels(_OP, labels, ignore_index)
        check_placement(_OP, labels, hidden, "hidden")
        chosen = check_options(_OP, k, alpha, normalizer, gate, reduction)
        check_num_items(_OP, num_items_in_batch, reduction, hidden, "hidden")
        check_chunks(_OP, chunk_size, accumulate_in_float32)
        shard = check_shard(_OP, weight_shard.size(0), member, vocab_start, vocab_size)
        if shard.total is None:
            raise ValueError(
                f"{_OP}: vocab_start goes with vocab_size: what the shards have together"
            )
        product = Product(hidden, weight_shard, bias_shard).in_autocast_dtype()
        check_same_dtype(_OP, *product)
    if is_transformed(*product):
        raise RuntimeError(f"{_OP}: torch.func and forward mode cannot look into shards")
    compare_calls(
        _OP,
        member,
        product,
        labels,
        k,
        chosen,
        ignore_index,
        reduction,
        shard,
        chunk_size,
        reduce_hidden_gradient,
        is_assumed=vocab_start is None and vocab_size is None,
    )
    loss, stats = reduced_loss(
        product,
        labels,
        k,
        chosen,
        ignore_index,
        reduction,
        num_items_in_batch,
        chunk_size,
        accumulate_in_float32,
        WeightShard(
            shard.start,
            shard.vocab_size,
            shard.total,
            member.group.group_name,
            member.size,
            reduce_hidden_gradient,
        ),
    )
    return (loss, stats) if return_stats else loss
