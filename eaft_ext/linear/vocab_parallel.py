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
    check_placement,
    check_same_dtype,
    check_weight_values,
    wants_value_checks,
)
from eaft_ext._dispatch import is_transformed
from eaft_ext._options import Keywords, Reduce, ReturnStats, TokenLoss, checked, with_keywords
from eaft_ext.linear._reduced_loss import Chunking, Product, WeightShard, reduced_loss
from eaft_ext.parallel import _agreement
from eaft_ext.parallel._group import Words, check_group, check_shard, fingerprint
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

_OP = "vocab_parallel_linear_gated_ce"


def compare_calls(
    op: str,
    words: Words,
    product: Product,
    labels: Tensor,
    of_token: TokenLoss,
    reduce: Reduce,
    chunking: Chunking,
    reduce_hidden: bool,
) -> None:
    """Raise where the processes do not mean the same: then their exchanges would not fit."""
    if words.group is None or not words.can_check:
        return
    ignore_index = of_token.ignore_index
    hidden, weight, bias = product
    note = {
        "the shape of the tokens": list(labels.shape),
        "the dtype of the hidden": str(hidden.dtype),
        "the device of the hidden": hidden.device.type,
        "whether the hidden has a gradient": torch.is_grad_enabled() and hidden.requires_grad,
        "chunk_size": chunking.chunk_size,
        "drop_below": chunking.drop_below,
        "reduce_hidden_gradient": reduce_hidden,
    }
    if labels.device.type == "cpu" or wants_value_checks():
        note["the number of tokens not ignored"] = int((labels != ignore_index).sum())
    note |= words.note(weight.size(0), of_token, reduce)

    @torch.no_grad()
    def row(token: tuple[int, ...], rows: slice) -> Tensor:
        some_bias = None if bias is None else bias[rows]
        return linear(hidden[token][None], weight[rows], some_bias)[0]

    evidence = partial(fingerprint, labels, ignore_index, weight.size(0), row)
    _agreement.check(op, words.group, hidden.device, note, evidence if words.is_assumed else None)


@overload
def vocab_parallel_linear_gated_ce(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    bias_shard: Tensor | None = ...,
    k: int | None = ...,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
    reduce_hidden_gradient: bool = ...,
    chunk_size: int | None = ...,
    accumulate_in_float32: bool | None = ...,
    drop_below: float = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> Tensor: ...
@overload
def vocab_parallel_linear_gated_ce(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    bias_shard: Tensor | None = ...,
    k: int | None = ...,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
    reduce_hidden_gradient: bool = ...,
    chunk_size: int | None = ...,
    accumulate_in_float32: bool | None = ...,
    drop_below: float = ...,
    return_stats: Literal[True, "full"],
    **options: Unpack[Keywords],
) -> tuple[Tensor, TokenStats]: ...
@with_keywords
def vocab_parallel_linear_gated_ce(
    hidden: Tensor,
    weight_shard: Tensor,
    labels: Tensor,
    bias_shard: Tensor | None = None,
    k: int | None = 20,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_hidden_gradient: bool = True,
    chunk_size: int | None = None,
    accumulate_in_float32: bool | None = None,
    drop_below: float = 0.0,
    return_stats: ReturnStats = False,
    **options: Unpack[Keywords],
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
        chunk_size, drop_below: as for :func:`eaft_ext.linear_gated_ce`, and the same in all
            processes, which drop the same tokens where their upstream gradients are the same.

    Other arguments, and what is returned, are as for :func:`eaft_ext.linear_gated_ce`. Loss and
    stats are the same bits in all processes.

    Raises:
        TypeError, ValueError: as :func:`eaft_ext.linear_gated_ce` does, and in all processes where
            :func:`eaft_ext.vocab_parallel_gated_ce` does that, also for the whole weight in each.
        RuntimeError: under ``torch.func`` and in forward mode; from a second derivative.
    """
    chunking = Chunking(chunk_size, accumulate_in_float32, drop_below)
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
        check_labels(_OP, labels)
        check_placement(_OP, labels, hidden, "hidden")
        of_token, reduce = checked(_OP, k, hidden, "hidden", return_stats=return_stats, **options)
        check_weight_values(_OP, reduce.token_weight, labels, of_token.ignore_index)
        check_chunks(_OP, *chunking, of_token.z_loss)
        shard = check_shard(_OP, weight_shard.size(0), member, vocab_start, vocab_size)
        if shard.total is None:
            raise ValueError(
                f"{_OP}: vocab_start goes with vocab_size: what the shards have together"
            )
        product = Product(hidden, weight_shard, bias_shard).in_autocast_dtype()
        check_same_dtype(_OP, *product)
    if is_transformed(*product):
        raise RuntimeError(f"{_OP}: torch.func and forward mode cannot look into shards")
    labels, reduce = reduce.without_muted(labels, of_token)
    words = Words(shard, member, is_assumed=vocab_start is None and vocab_size is None)
    compare_calls(
        _OP,
        words,
        product,
        labels,
        of_token,
        reduce,
        chunking,
        reduce_hidden_gradient,
    )
    rows = WeightShard.of(shard, member, reduce_hidden_gradient)
    loss, stats = reduced_loss(product, labels, of_token, reduce, chunking, rows)
    return (loss, stats) if return_stats else loss
