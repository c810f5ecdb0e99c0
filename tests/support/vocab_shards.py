"""The loss over a vocabulary in shards that are all in this process: no group, no exchange."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from error_model import error_weights
from inputs import same_bits
from parity import Outcome, assert_outcome, assert_same_stats, outcome
from torch import Tensor

import eaft_ext
from eaft_ext import EntropyGate, reference
from eaft_ext._options import TokenLoss
from eaft_ext.parallel import _shard
from eaft_ext.parallel._shard import VocabShard, num_words

ops = torch.ops.eaft_ext

NUM_SHARDS = [1, 2, 3, 4, 8]


def divide(columns: int, num_shards: int) -> list[int]:
    """Widths of shards: as even as can be, but of three, which differ."""
    if num_shards == 3:
        narrow = columns // 7
        wide = columns // 2
        return [wide, narrow, columns - wide - narrow]
    return [len(columns_of) for columns_of in torch.arange(columns).tensor_split(num_shards)]


class Losses(NamedTuple):
    """What one shard's process has of a call."""

    logits: Tensor
    loss: Tensor
    stats: eaft_ext.TokenStats


def partial_of(logits: Tensor, labels: Tensor, of_token: TokenLoss, shard: VocabShard) -> Tensor:
    """What a shard tells the others, by the kernel or by the reference, as they are chosen."""
    logits = logits.detach()
    k, ignore_index = of_token.k, of_token.ignore_index
    if _shard.takes_kernel("gated_ce_merge", logits):
        words_of_all = (shard.start, shard.vocab_size)
        how = (ignore_index, of_token.family(), of_token.tells_entropy)
        return ops.gated_ce_partial(logits, labels, k or 0, *words_of_all, *how)
    words = of_token.map_logits(logits[..., : num_words(logits.size(-1), shard)])
    return reference.shard_partial(
        words,
        labels,
        1 if k is None else k,
        shard.start,
        ignore_index,
        sums_entropy=k is None or of_token.tells_entropy,
        sums_logits=of_token.label_smoothing != 0,
    )


def shards_at(
    logits: Tensor, widths: list[int], vocab_size: int | None = None
) -> list[tuple[Tensor, VocabShard]]:
    """The columns of every shard, where they lie, and their place in the vocabulary."""
    starts = [0, *itertools.accumulate(widths)]
    total = starts[-1] if vocab_size is None else vocab_size
    parts = logits.split(widths, -1)
    return [
        (part, VocabShard(start, vocab_size, total))
        for part, start in zip(parts, starts, strict=False)
    ]


def losses_of_shards(
    shards: list[tuple[Tensor, VocabShard]],
    labels: Tensor,
    k: int | None = 20,
    *,
    gate: Any = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    return_stats: Any = True,
    **family: Any,
) -> list[Losses]:
    """Per-token losses and stats as the process of every shard gets them."""
    of_token = TokenLoss(
        k,
        EntropyGate() if gate is None else gate,
        ignore_index,
        return_stats=return_stats,
        **family,
    )
    partials = [partial_of(x, labels, of_token, shard) for x, shard in shards]
    found = []
    for own, (logits, shard) in zip(partials, shards, strict=True):
        told: list[Tensor] = []

        def gather(partial: Tensor, told: list[Tensor] = told) -> Tensor:
            told.append(partial)
            return torch.stack(partials)

        loss, stats = _shard.token_losses(logits, labels, of_token, shard, gather, inplace_backward)
        assert len(told) == 1, "one exchange a call"
        assert told[0].shape == (*labels.shape, of_token.partial_size) and same_bits(told[0], own)
        found.append(Losses(logits, loss, stats))
    return found


def outcome_of_shards(
    logits: Tensor,
    labels: Tensor,
    upstream: Tensor,
    widths: list[int],
    *,
    vocab_size: int | None = None,
    **options: Any,
) -> Outcome:
    """As ``parity.outcome``; loss and stats are the same bits for all shards."""
    places = shards_at(logits.detach(), widths, vocab_size)
    if options.get("inplace_backward"):  # parts of one tensor could not be overwritten in turn
        places = [(part.clone(), shard) for part, shard in places]
    shards = [(part.requires_grad_(), shard) for part, shard in places]
    all_losses = losses_of_shards(shards, labels, **options)
    _, loss, stats = all_losses[0]
    for _, other_loss, other_stats in all_losses[1:]:
        assert same_bits(other_loss, loss)
        assert_same_stats(other_stats, stats)
    for value in stats:
        assert value is None or (value.shape == labels.shape and not value.requires_grad)
    gradients = [
        torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0] for x, loss, _ in all_losses
    ]
    return Outcome(loss.detach(), stats.nll, stats.entropy, stats.gate, torch.cat(gradients, -1))


def assert_matches(
    found: Outcome, logits: Tensor, labels: Tensor, upstream: Tensor, **options: Any
) -> None:
    """Hold a result to the truth, by the errors of the reference and of the undivided call.

    For k=None a shard tells its entropy, rounded, and the loss is proportional to it.
    """
    rounded = {"loss": 1} if options.get("k", 20) is None else {}
    whole = outcome(eaft_ext.gated_ce, logits, labels, upstream, **options)
    ref = outcome(reference.gated_ce, logits, labels, upstream, **options)
    gt = outcome(reference.gated_ce, logits.double(), labels, upstream.double(), **options)
    weights = error_weights(gt, logits, labels, upstream, **options)
    assert_outcome(found, ref, gt, weights, ", by the reference", rounded)
    assert_outcome(found, whole, gt, weights, ", by the whole row", rounded)


def assert_shards_match(
    logits: Tensor,
    labels: Tensor,
    upstream: Tensor,
    widths: list[int],
    vocab_size: int | None = None,
    **options: Any,
) -> None:
    """Hold shards to the truth."""
    found = outcome_of_shards(logits, labels, upstream, widths, vocab_size=vocab_size, **options)
    assert_matches(found, logits, labels, upstream, reduction="none", **options)
