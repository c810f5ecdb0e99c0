"""Per-token losses of a shard of the vocabulary: what each shard tells, the exchange, the merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from eaft_ext import reference
from eaft_ext._dispatch import is_transformed, takes_kernel
from eaft_ext._options import TokenLoss
from eaft_ext._registration import ops
from eaft_ext.reference import TokenStats

Gather = Callable[[Tensor], Tensor]
"""From this shard's partial (..., k + 3) to those of all shards, (num_shards, ..., k + 3)."""


class VocabShard(NamedTuple):
    """The columns that a process has of the vocabulary."""

    start: int
    """The word of the first column."""
    vocab_size: int | None
    """Columns of words from here on are padding; None: there are none."""
    total: int | None
    """Words of all shards, where that is known."""


def num_words(columns: int, shard: VocabShard) -> int:
    """How many of a shard's columns are no padding."""
    return (
        columns
        if shard.vocab_size is None
        else min(max(shard.vocab_size - shard.start, 0), columns)
    )


class _ReferenceNll(torch.autograd.Function):
    """nll and entropy in plain PyTorch; the gradient is of this shard alone."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        partials: Tensor,
        ignore_index: int,
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        merged = reference.merge_partials(partials, labels, ignore_index)
        nll, entropy, row_max, log_sum = merged
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, row_max, log_sum)
        ctx.ignore_index, ctx.shard = ignore_index, shard
        return nll, entropy

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_nll is None:
            return (None,) * 5
        logits, labels, row_max, log_sum = ctx.saved_tensors
        weight = torch.where(labels == ctx.ignore_index, 0.0, grad_nll)
        gradient = _ReferenceGradient.apply(weight, logits, labels, row_max, log_sum, ctx.shard)
        return gradient, *(None,) * 4


class _ReferenceGradient(torch.autograd.Function):
    """The gradient of a shard's logits, which has none of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        logits: Tensor,
        labels: Tensor,
        row_max: Tensor,
        log_sum: Tensor,
        shard: VocabShard,
    ) -> Tensor:
        words = num_words(logits.size(-1), shard)
        gradient = torch.zeros_like(logits)
        gradient[..., :words] = reference.shard_gradient(
            weight, logits[..., :words], labels, row_max, log_sum, shard.start
        )
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError("eaft_ext: the loss of a vocabulary in shards has no second derivative")


def _k_of_gate(k: int, logits: Tensor, partials: Tensor, shard: VocabShard) -> int:
    """How many logits the entropy is over: k, or all words where there are fewer."""
    if shard.total is not None:
        return min(k, shard.total)
    if num_words(logits.size(-1), shard) >= k or torch.compiler.is_compiling():
        return k
    # Shards narrower than k tell how many words they have: NaN stands for those that are missing.
    counts = (~partials[..., reference.PARTIAL_HEAD :].isnan()).sum((0, -1))
    # Of ignored tokens nothing is told.
    return min(k, max(counts.flatten().tolist(), default=0) or k)


def token_losses(
    logits: Tensor,
    labels: Tensor,
    of_token: TokenLoss,
    shard: VocabShard,
    gather: Gather,
    inplace_backward: bool = False,
) -> tuple[Tensor, TokenStats]:
    """Per-token losses and stats, the same in every process; ``gather`` is called once.

    The gradient of a process is that of its own columns: nothing is exchanged for it.
    """
    if is_transformed(logits):
        raise RuntimeError(
            "eaft_ext: torch.func and forward mode cannot look into the loss of a vocabulary in "
            "shards"
        )
    ignore_index = of_token.ignore_index
    valid = labels != ignore_index
    by_kernel = takes_kernel("gated_ce_merge", logits)
    # Here the loss is the nll, with its gradient, and any weight can be put on it.
    weighed_here = not (of_token.is_known_to_kernels and by_kernel)
    if by_kernel:
        k, *gate, _ = of_token.kernel_arguments()
        partial = ops.gated_ce_partial(
            logits.detach(), labels, k, shard.start, shard.vocab_size, ignore_index
        )
        partials = gather(partial)
        # In a compiled graph the compiler decides about memory.
        has_backward = torch.is_grad_enabled() and logits.requires_grad
        inplace = inplace_backward and has_backward and not torch.compiler.is_compiling()
        of_shard = (shard.start, shard.vocab_size)
        loss, nll, entropy, weight, _, _ = ops.gated_ce_merge(
            logits, labels, partials, *gate, ignore_index, *of_shard, inplace
        )
    else:
        words = logits[..., : num_words(logits.size(-1), shard)]
        partials = gather(
            reference.shard_partial(words, labels, of_token.k, shard.start, ignore_index)
        )
        loss, entropy = _ReferenceNll.apply(logits, labels, partials, ignore_index, shard)
        nll = loss.detach()
    if weighed_here:
        k = _k_of_gate(of_token.k, logits, partials, shard)
        weight = of_token.gate_weights(k, nll, entropy, valid)
        loss = reference.weigh(loss, weight)
    return loss, TokenStats(nll, entropy, weight, valid)
