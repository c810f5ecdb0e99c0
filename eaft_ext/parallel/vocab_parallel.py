"""The loss where every process of a group has a shard of the vocabulary (tensor parallelism)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from eaft_ext._checks import (
    check_labels,
    check_logits,
    check_placement,
    check_weight_values,
)
from eaft_ext._options import Keywords, ReturnStats, checked, with_keywords
from eaft_ext.parallel import _agreement
from eaft_ext.parallel._group import Words, check_group, check_shard, group_losses
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

_OP = "vocab_parallel_gated_ce"


@overload
def vocab_parallel_gated_ce(
    logits_shard: Tensor,
    labels: Tensor,
    k: int | None = ...,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
    inplace_backward: bool = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> Tensor: ...
@overload
def vocab_parallel_gated_ce(
    logits_shard: Tensor,
    labels: Tensor,
    k: int | None = ...,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = ...,
    vocab_size: int | None = ...,
    inplace_backward: bool = ...,
    return_stats: Literal[True, "full"],
    **options: Unpack[Keywords],
) -> tuple[Tensor, TokenStats]: ...
@with_keywords
def vocab_parallel_gated_ce(
    logits_shard: Tensor,
    labels: Tensor,
    k: int | None = 20,
    *,
    group: ProcessGroup | DeviceMesh,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    return_stats: ReturnStats = False,
    **options: Unpack[Keywords],
) -> Tensor | tuple[Tensor, TokenStats]:
    r"""Token-gated cross-entropy of logits whose vocabulary is divided among processes.

    The loss of :func:`eaft_ext.gated_ce`, exactly: entropy and softmax are of the whole vocabulary.
    Every process reads its shard once, and one all-gather of ``k + 3`` numbers for each token
    brings what the others found; all processes then have the same loss. The backward reads and
    writes the shard once and communicates nothing::

        m, S, t_1 ... t_k   of the whole row, merged from those of the shards
        loss = g * nll                  dloss/dx = g * (softmax(x) - onehot(y)), of this shard

    As in Megatron-LM the gradient is that of the one loss that all processes share: do not add up
    the losses of the group.

    Args:
        logits_shard: (..., V_shard), the columns of this process; dtypes and strides as for
            :func:`eaft_ext.gated_ce`. Shards may differ in width, also be empty.
        labels: (...), int64 or int32, words of the whole vocabulary, the same in all processes.
        k: how many of the largest logits of the whole row H is taken over, from 2 to 128. It may
            exceed a shard. None: over all of them; 5 numbers for each token are exchanged then, and
            ``vocab_start`` goes with ``vocab_size``.
        group: the processes that share the vocabulary: a ``ProcessGroup`` or a ``DeviceMesh`` of
            one dimension.
        vocab_start: the word of this shard's first column. By default shards are equally wide and
            in the order of the group's ranks, as in Megatron-LM.
        vocab_size: words of the vocabulary, if columns from there on are padding. Padding takes no
            part: it is not read, and its gradient is 0. By default there is none. Give it under
            ``torch.compile`` if ``vocab_start`` is given, there are fewer words than k, and
            ``gate`` is your own and depends on k.
        inplace_backward: as for :func:`eaft_ext.gated_ce`, with the shard's memory.

    Other arguments, and what is returned, are as for :func:`eaft_ext.gated_ce`. Loss and stats are
    the same bits in all processes.

    Raises:
        TypeError, ValueError: as :func:`eaft_ext.gated_ce` does; without a group, or of a process
            that is not in it. Over gloo, at a group's first call and, if all processes have
            ``EAFT_EXT_CHECKS=1``, always, they compare shapes and options beforehand, by the store
            of torch.distributed: what is wrong in one of them, or differs between them, is then
            raised in all. A label that is in no shard, or differs between processes, raises on the
            CPU; on CUDA it gives NaN, for its token alone. Under ``torch.compile`` nothing is
            compared and such labels give NaN. Where they compare, processes whose shards are equal,
            and whose labels are all within the first shard, have whole logits: they are refused,
            unless ``vocab_start`` or ``vocab_size`` is given.
    """
    with _agreement.told_to_others() as others:
        member = check_group(_OP, group)
        others.are(member.group)
        check_logits(_OP, logits_shard, smallest_vocab=0)
        if hasattr(logits_shard, "device_mesh"):
            raise TypeError(
                f"{_OP}: logits_shard is a DTensor; give it to gated_ce, or give "
                "logits_shard.to_local() to this"
            )
        check_labels(_OP, labels)
        check_placement(_OP, labels, logits_shard)
        of_token, reduce = checked(_OP, k, logits_shard, return_stats=return_stats, **options)
        check_weight_values(_OP, reduce.token_weight, labels, of_token.ignore_index)
        shard = check_shard(_OP, logits_shard.size(-1), member, vocab_start, vocab_size)
    words = Words(shard, member, is_assumed=vocab_start is None and vocab_size is None)
    labels, reduce = reduce.without_muted(labels, of_token)
    loss, stats = group_losses(_OP, logits_shard, labels, of_token, reduce, words, inplace_backward)
    loss = reduce.reduced(loss, stats.valid)
    return (loss, stats) if return_stats else loss
