"""Per-token losses of a shard of the vocabulary: what each shard tells, the exchange, the merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eaft_ext import reference
from eaft_ext._dispatch import is_built_in, takes_kernel
from eaft_ext._registration import ops
from eaft_ext.gates import Gate, GateFunction, NoGate
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


def num_words(logits: Tensor, shard: VocabShard) -> int:
    """The columns of the logits that are no padding."""
    columns = logits.size(-1)
    return (
        columns
        if shard.vocab_size is None
        else min(max(shard.vocab_size - shard.start, 0), columns)
    )


def _kernel_losses(
    logits: Tensor,
    labels: Tensor,
    k: int,
    gate: Gate,
    ignore_index: int,
    shard: VocabShard,
    inplace_backward: bool,
    gather: Gather,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, entropy and gate by the compiled operators."""
    source = logits.detach()
    partial = ops.gated_ce_partial(source, labels, k, shard.start, shard.vocab_size, ignore_index)
    # In a compiled graph the compiler decides about memory.
    has_backward = torch.is_grad_enabled() and logits.requires_grad
    loss, nll, entropy, weight, _, _ = ops.gated_ce_merge(
        logits,
        labels,
        gather(partial),
        gate.name,
        gate.parameters(),
        ignore_index,
        shard.start,
        shard.vocab_size,
        inplace_backward and has_backward and not torch.compiler.is_compiling(),
    )
    return loss, nll, entropy, weight


class _ReferenceNll(torch.autograd.Function):
    """nll and entropy in plain PyTorch; the gradient is of this shard alone."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        k: int,
        ignore_index: int,
        shard: VocabShard,
        gather: Gather,
    ) -> tuple[Tensor, Tensor]:
        words = logits[..., : num_words(logits, shard)]
        partial = reference.shard_partial(words, labels, k, shard.start, ignore_index)
        merged = reference.merge_partials(gather(partial), labels, ignore_index)
        nll, entropy, row_max, log_sum = merged
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, row_max, log_sum)
        ctx.ignore_index, ctx.shard = ignore_index, shard
        return nll, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_nll is None:
            return (None,) * 6
        logits, labels, row_max, log_sum = ctx.saved_tensors
        weight = torch.where(labels == ctx.ignore_index, 0.0, grad_nll)
        words = logits[..., : num_words(logits, ctx.shard)]
        gradient = torch.zeros_like(logits)
        gradient[..., : words.size(-1)] = reference.shard_gradient(
            weight, words, labels, row_max, log_sum, ctx.shard.start
        )
        return gradient, *(None,) * 5


def token_losses(
    logits: Tensor,
    labels: Tensor,
    k: int,
    gate: Gate | GateFunction,
    ignore_index: int,
    shard: VocabShard,
    gather: Gather,
    inplace_backward: bool = False,
) -> tuple[Tensor, TokenStats]:
    """Per-token losses and stats, the same in every process; ``gather`` is called once.

    The gradient of a process is that of its own columns: nothing is exchanged for it.
    """
    valid = labels != ignore_index
    by_kernel = takes_kernel("gated_ce_merge", logits)
    if by_kernel:
        inside = gate if is_built_in(gate) else NoGate()
        loss, nll, entropy, weight = _kernel_losses(
            logits, labels, k, inside, ignore_index, shard, inplace_backward, gather
        )
        if inside is gate:
            return loss, TokenStats(nll, entropy, weight, valid)
    else:
        loss, entropy = _ReferenceNll.apply(logits, labels, k, ignore_index, shard, gather)
        nll = loss.detach()
    # So far the loss is the nll, with its gradient: any weight can be put on it.
    k = k if shard.total is None else min(k, shard.total)
    weight = reference.gate_weights(gate, k, nll, entropy, valid)
    return reference.weigh(loss, weight), TokenStats(nll, entropy, weight, valid)
