"""Per-token losses of a shard of the vocabulary: what each shard tells, the exchange, the merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from eaft_ext import reference
from eaft_ext._dispatch import is_transformed, takes_kernel
from eaft_ext._options import TokenLoss
from eaft_ext._registration import called, gated_ce_merge, ops
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
    """Cross-entropy and lse in plain PyTorch; the gradient is of this shard alone."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        partials: Tensor,
        merged: reference.Merged,
        of_token: TokenLoss,
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        row_max, log_sum = merged.row_max, merged.log_sum
        ignored = labels == of_token.ignore_index
        lse = torch.where(ignored, 0.0, row_max + log_sum)
        cross = of_token.smoothed(merged, partials, ignored, shard.total)
        ctx.save_for_backward(logits, labels, row_max, log_sum)
        ctx.of_token, ctx.shard = of_token, shard
        return cross, lse

    @staticmethod
    def backward(ctx: Any, grad_cross: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        logits, labels, row_max, log_sum = ctx.saved_tensors
        ignored = labels == ctx.of_token.ignore_index
        weight = torch.where(ignored, 0.0, grad_cross)
        of_all = weight + torch.where(ignored, 0.0, grad_lse)
        gradient = _ReferenceGradient.apply(
            weight, of_all, logits, labels, row_max, log_sum, ctx.of_token, ctx.shard
        )
        return gradient, *(None,) * 5


class _ReferenceGradient(torch.autograd.Function):
    """The gradient of a shard's logits, which has none of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        of_all: Tensor,
        logits: Tensor,
        labels: Tensor,
        row_max: Tensor,
        log_sum: Tensor,
        of_token: TokenLoss,
        shard: VocabShard,
    ) -> Tensor:
        words = num_words(logits.size(-1), shard)
        gradient = torch.zeros_like(logits)
        gradient[..., :words] = reference.shard_gradient(
            weight * (1 - of_token.label_smoothing),
            logits[..., :words],
            labels,
            row_max,
            log_sum,
            shard.start,
            of_all=of_all,
            uniform=of_token.uniform(weight, shard.total),
            softcap=of_token.softcap,
            logit_scale=of_token.logit_scale,
        )
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError("eaft_ext: the loss of a vocabulary in shards has no second derivative")


def _k_of_gate(k: int | None, logits: Tensor, partials: Tensor, shard: VocabShard) -> int:
    """How many logits the entropy is over: k, or all words where there are fewer."""
    if shard.total is not None:
        return shard.total if k is None else min(k, shard.total)
    assert k is not None, "it was checked"
    if num_words(logits.size(-1), shard) >= k or torch.compiler.is_compiling():
        return k
    # Shards narrower than k tell how many words they have: NaN stands for those that are missing.
    top = partials[..., reference.PARTIAL_HEAD : reference.PARTIAL_HEAD + k]
    counts = (~top.isnan()).sum((0, -1))
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
    if shard.total is None and (of_token.label_smoothing != 0 or of_token.k is None):
        option = "k=None" if of_token.k is None else "label_smoothing"
        raise ValueError(
            f"eaft_ext: with {option}, vocab_start goes with vocab_size: how many words the "
            "shards have together"
        )
    ignore_index = of_token.ignore_index
    valid = labels != ignore_index
    by_kernel = takes_kernel("gated_ce_merge", logits)
    # Here the loss is the nll, with its gradient, and any weight can be put on it.
    weighed_here = not (of_token.is_known_to_kernels and by_kernel)
    rest = of_token.z_loss_alone if by_kernel else None
    if by_kernel:
        k, *gate, _ = of_token.kernel_arguments()
        family = of_token.family()
        of_shard = (shard.start, shard.vocab_size)
        partial = called(
            ops.gated_ce_partial,
            logits.detach(),
            labels,
            k,
            *of_shard,
            ignore_index,
            family,
            of_token.tells_entropy,
        )
        partials = gather(partial)
        # In a compiled graph the compiler decides about memory.
        has_backward = torch.is_grad_enabled() and logits.requires_grad
        inplace = inplace_backward and has_backward and not torch.compiler.is_compiling()
        # Two losses of the same logits cannot both overwrite them.
        inplace = inplace and rest is None
        loss, nll, entropy, weight, _, _, extra = gated_ce_merge(
            logits,
            labels,
            partials,
            k,
            *gate,
            ignore_index,
            *of_shard,
            inplace,
            family,
            shard.total,
            of_token.num_extra,
        )
    else:
        words = of_token.map_logits(logits[..., : num_words(logits.size(-1), shard)])
        partials = gather(of_token.shard_partial(words, labels, shard.start))
        merged = of_token.merge_partials(partials, labels)
        nll, entropy, extra = merged.nll, merged.entropy, of_token.extra(merged, ~valid)
        loss, lse = _ReferenceNll.apply(logits, labels, partials, merged, of_token, shard)
    if weighed_here:
        num_logits = _k_of_gate(of_token.k, logits, partials, shard)
        weight = of_token.gate_weights(num_logits, nll, entropy, valid)
        loss = reference.weigh(loss, weight)
        if not by_kernel and of_token.z_loss != 0:
            loss = loss + of_token.z_loss * lse**2
    if rest is not None:
        # From what the shards have told already.
        told = partials[..., : rest.partial_size]
        loss = loss + token_losses(logits, labels, rest, shard, lambda _: told)[0]
    return loss, of_token.stats(nll, entropy, weight, valid, extra)
