"""The loss in plain PyTorch, any device, any dtype: the measure of the kernels, and their stand-in.

It imports nothing of the package and computes what the kernels compute, by the formulas of
:func:`gated_ce`, with several passes over float32 copies of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]

PARTIAL_HEAD = 3
"""Numbers of a :func:`shard_partial` before its k largest logits."""


class TokenStats(NamedTuple):
    """What is known of every token: detached, shaped like the labels, 0 where the label is ignored.

    Float32, or float64 for float64 logits; ``valid`` and ``correct`` are bool. Of a vocabulary in
    shards they are of the whole of it, and the same in all processes. x is what the softcap and the
    logit_scale make of the logits, and nothing here is multiplied by a token_weight.
    """

    nll: Tensor
    """-ln p(y), in nats."""
    entropy: Tensor
    """H, in nats: of the k largest logits, renormalised among themselves; of all for k=None."""
    gate: Tensor
    """The weight that the nll is multiplied by."""
    valid: Tensor
    """Whether the label takes part, that is, is not ``ignore_index``."""
    correct: Tensor | None = None
    """Whether no logit is larger than the label's, which then is an arg-max: ties are correct. The
    sum over that of ``valid`` is the token accuracy."""
    lse: Tensor | None = None
    """ln sum_j exp(x_j), in nats."""
    z_loss: Tensor | None = None
    """z_loss * lse^2, as it is in the loss; None without one."""
    vocab_entropy: Tensor | None = None
    """The entropy in nats over the whole vocabulary, with ``return_stats="full"``; else None."""
    dropped: Tensor | None = None
    """Whether a ``drop_below`` left the token out of the gradients; None without one, and for
    losses that are not reduced. The share of the scores s = gate * -expm1(-nll) that went with
    them is ``(s * dropped).sum() / s.sum()``."""

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStats:
        """The same with ``function`` of each of those that are there."""
        # Here and elsewhere not _replace(), which the compiler of torch 2.11 does not trace.
        made: list[Any] = [None if stat is None else function(stat) for stat in self]
        return TokenStats(*made)


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def map_logits(logits: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    """What a model makes of its logits before the loss, in float32 at least.

    ``x' = logit_scale x``, or ``softcap tanh(logit_scale x / softcap)``.
    """
    if softcap is None and logit_scale == 1:
        return logits
    scaled = _widened(logits) * logit_scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def topk_entropy(logits: Tensor, k: int) -> Tensor:
    """H, the entropy in nats of the min(k, V) largest of ``logits`` (..., V); detached.

    ``Z = sum_i exp(t_i - t_1)``, ``q_i = exp(t_i - t_1) / Z``, ``H = ln Z - sum_i q_i (t_i - t_1)``
    """
    top = _widened(logits.detach()).topk(min(k, logits.size(-1)), dim=-1).values
    return entropy_beside(top[..., 1:], top[..., 0])


def vocab_entropy(logits: Tensor) -> Tensor:
    """The entropy in nats of softmax(x) for x = ``logits`` (..., V), all of them; detached."""
    x = _widened(logits.detach())
    row_max, largest = x.max(-1, keepdim=True)
    return entropy_beside(x.scatter(-1, largest, -math.inf), row_max.squeeze(-1))


def entropy_beside(others: Tensor, largest: Tensor) -> Tensor:
    """The entropy in nats of logits, the ``largest`` (...) and all ``others`` (..., n).

    Its 1 in Z and 0 in the sum are left to the end: of a confident token the others are all there
    is.
    """
    shifted = others - largest.unsqueeze(-1)
    exponential = shifted.exp()
    rest = exponential.sum(-1)
    # A term with q_i = 0 is 0, also where t_i = -inf.
    weighted = torch.where(exponential == 0, 0.0, exponential * shifted).sum(-1)
    # Where the largest is infinite there is no distribution: NaN, else 0.
    undefined = largest - largest
    return rest.log1p() - weighted / (1 + rest) + undefined


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """-ln p(y) of each token, differentiable; 0 where ignored, NaN for a label outside [0, V)."""
    vocab_size = logits.size(-1)
    valid = labels != ignore_index
    in_range = (labels >= 0) & (labels < vocab_size)
    # Ignored rows are replaced, not multiplied by 0: they may hold NaN.
    x = torch.where(valid.unsqueeze(-1), _widened(logits), 0.0)
    target = x.gather(-1, torch.where(in_range, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    row_max = x.detach().amax(-1)
    # The log-sum stays apart from the maximum: shift-invariant in float32.
    nll = (row_max - target) + (x - row_max.unsqueeze(-1)).exp().sum(-1).log()
    # A product: the gradient of a label outside [0, V) is NaN too.
    factor = torch.where(in_range, torch.ones_like(nll), math.nan)
    return torch.where(valid, nll * factor, 0.0)


def gate_weights(gate: Any, k: int, nll: Tensor, entropy: Tensor, valid: Tensor) -> Tensor:
    """What ``gate`` makes of the detached stats, which are 0 where ignored; as is the result."""
    weights = (gate.for_k(k) if hasattr(gate, "for_k") else gate)(nll, entropy)
    if not isinstance(weights, Tensor):
        raise TypeError(f"gate {gate!r} must return a tensor, got {weights!r}")
    if weights.shape not in (nll.shape, torch.Size()):
        raise ValueError(
            f"gate {gate!r} must return weights shaped like the labels, {tuple(nll.shape)}, got "
            f"{tuple(weights.shape)}"
        )
    return torch.where(valid, weights.detach().to(nll.dtype), 0.0)


def weigh(nll: Tensor, gate: Tensor) -> Tensor:
    """``gate * nll``, and 0 where the gate is 0, also where the nll is infinite."""
    return torch.where(gate == 0, 0.0, gate * nll)


def without_muted(
    labels: Tensor, token_weight: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels and weights of which those of weight 0 are ignored, and how many were not before.

    Such a token costs nothing, and counts in a mean all the same.
    """
    weight = token_weight.detach()
    ignored = labels == ignore_index
    muted = ignored | (weight == 0)
    num_valid = (~ignored).sum()
    return labels.masked_fill(muted, ignore_index), weight.masked_fill(muted, 0), num_valid


def mean_divisor(
    valid: Tensor, num_items_in_batch: float | Tensor | None, dtype: torch.dtype
) -> float | Tensor:
    """What "mean" divides by: 1 where there is nothing to learn from."""
    if num_items_in_batch is None:
        return valid.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        count = num_items_in_batch.reshape(()).to(dtype)
        return count.masked_fill(count == 0, 1)
    return num_items_in_batch or 1


def reduce_loss(
    loss: Tensor,
    valid: Tensor,
    reduction: Reduction,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """Per-token losses to what ``reduction`` asks for.

    The mean is over the tokens that are not ignored, or over ``num_items_in_batch``. With nothing
    to learn from it is 0, connected to the graph.
    """
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / mean_divisor(valid, num_items_in_batch, total.dtype)


def token_losses(
    logits: Tensor,
    labels: Tensor,
    k: int | None,
    gate: Any,
    ignore_index: int = -100,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    tells_entropy: bool = False,
) -> tuple[Tensor, TokenStats]:
    """Per-token losses and stats: ``gate`` is one of :mod:`eaft_ext.gates`, or any function.

    ``tells_entropy`` asks for that of the whole vocabulary.
    """
    vocab_size = logits.size(-1)
    valid = labels != ignore_index
    # Ignored rows are replaced, not multiplied by 0: they may hold NaN.
    x = torch.where(valid.unsqueeze(-1), _widened(logits), 0.0)
    x = map_logits(x, softcap, logit_scale)
    nll = cross_entropy(x, labels, ignore_index)
    whole = None
    if k is None or tells_entropy:
        # A label outside the vocabulary spoils all of its row.
        whole = torch.where(valid, torch.where(nll.isnan(), nll, vocab_entropy(x)), 0.0).detach()
    entropy = torch.where(valid, topk_entropy(x, k), 0.0) if k is not None else whole
    assert entropy is not None, "one of both is there"
    num_logits = vocab_size if k is None else min(k, vocab_size)
    weight = gate_weights(gate, num_logits, nll.detach(), entropy, valid)
    cross = nll
    lse = torch.where(valid, x.logsumexp(-1), 0.0)
    if label_smoothing != 0:
        of_all = torch.where(valid, lse - x.mean(-1), 0.0)
        cross = (1 - label_smoothing) * nll + label_smoothing * of_all
    loss = weigh(cross, weight)
    of_lse = None
    if z_loss != 0:
        of_lse = z_loss * lse**2
        loss = loss + of_lse
    column = labels.clamp(0, vocab_size - 1).long().unsqueeze(-1)
    is_top = x.gather(-1, column).squeeze(-1) == x.amax(-1)
    spoilt = nll.isnan()  # also by a label outside the vocabulary
    return loss, TokenStats(
        nll.detach(),
        entropy,
        weight,
        valid,
        correct=valid & ~spoilt & is_top,
        lse=torch.where(spoilt, nll, lse).detach(),
        z_loss=None if of_lse is None else torch.where(spoilt, nll, of_lse).detach(),
        vocab_entropy=whole if tells_entropy else None,
    )


def shard_partial(
    logits: Tensor,
    labels: Tensor,
    k: int,
    vocab_start: int,
    ignore_index: int = -100,
    *,
    sums_entropy: bool = False,
    sums_logits: bool = False,
) -> Tensor:
    """What a shard of the vocabulary tells the others of each token: (..., k + 3).

    ``logits`` (..., V_shard) are the columns from ``vocab_start`` on. Of each row x with label y::

        y,  sum_j exp(x_j - t_1) - 1,  x_y or NaN where it is in another shard,  t_1 >= ... >= t_k

    t: the k largest of the shard, NaN where it has fewer, or where the label is ignored. With
    ``sums_entropy``, for the entropy of all logits, that of the shard's own follows, for which k
    may be 1; with ``sums_logits``, for label smoothing, ``sum_j x_j`` comes last.
    """
    x = _widened(logits.detach())
    num_sums = sums_entropy + sums_logits
    partial = x.new_full((*x.shape[:-1], PARTIAL_HEAD + k + num_sums), math.nan)
    partial[..., PARTIAL_HEAD + k :] = 0
    if sums_logits:
        partial[..., -1] = torch.where(labels != ignore_index, x.sum(-1), 0.0)
    partial[..., 0] = labels
    partial[..., 1] = -1
    columns = x.size(-1)
    if columns == 0:
        return partial
    row_max, largest = x.max(-1, keepdim=True)
    finite_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    # Without the largest's own 1, beside which the others would be rounded off.
    rest = (x - finite_max).exp().scatter(-1, largest, 0.0).sum(-1)
    valid = labels != ignore_index
    if sums_entropy:
        partial[..., PARTIAL_HEAD + k] = torch.where(valid, vocab_entropy(x), 0.0)
    row_max = row_max.squeeze(-1)
    # 0, or -1 where the 1 was none, or NaN.
    rest = rest + torch.where(row_max == -math.inf, -1.0, row_max - row_max)
    column = labels.long() - vocab_start
    inside = (column >= 0) & (column < columns)
    target = x.gather(-1, torch.where(inside, column, 0).unsqueeze(-1)).squeeze(-1)
    top = x.masked_fill(x.isnan(), -math.inf).topk(min(k, columns), dim=-1).values
    partial[..., 1] = torch.where(valid, rest, -1.0)
    partial[..., 2] = torch.where(valid & inside, target, math.nan)
    partial[..., PARTIAL_HEAD : PARTIAL_HEAD + top.size(-1)] = torch.where(
        valid.unsqueeze(-1), top, math.nan
    )
    return partial


class Merged(NamedTuple):
    """What all shards tell of each token, put together."""

    nll: Tensor
    entropy: Tensor
    """Of the k largest logits."""
    row_max: Tensor
    log_sum: Tensor
    correct: Tensor
    vocab_entropy: Tensor | None
    """Of all logits, if the shards tell of it."""


def merge_partials(
    partials: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    k: int | None = None,
    *,
    sums_entropy: bool = False,
) -> Merged:
    """nll, entropy, row_max and log_sum of each token, and more, from what all shards tell of it.

    ``partials`` (num_shards, ..., k + 3) are :func:`shard_partial` of each. NaN where the label is
    in no shard or in several, or where shards were given different labels. ``k`` is needed where
    more comes behind the k largest.
    """
    valid = labels != ignore_index
    label, rest, target = partials[..., :PARTIAL_HEAD].unbind(-1)
    top = partials[..., PARTIAL_HEAD : None if k is None else PARTIAL_HEAD + k]
    top = top.masked_fill(top.isnan(), -math.inf)
    row_max, first = top[..., 0].max(0, keepdim=True)
    scale = (top[..., 0] - row_max.masked_fill(row_max == -math.inf, 0.0)).exp()
    others = ((1 + rest) * scale).scatter(0, first, 0.0).sum(0)
    others = rest.gather(0, first).squeeze(0) + others
    log_sum = others.log1p()
    whole = None
    if sums_entropy:
        assert k is not None, "it says where the entropies are"
        whole = _entropy_of_parts((1 + rest) * scale, partials[..., PARTIAL_HEAD + k])
    row_max = row_max.squeeze(0)
    has_target = ~target.isnan()
    target = torch.where(has_target, target, 0.0).sum(0)
    agreed = (label == labels).all(0) & (has_target.sum(0) == 1)
    nll = (row_max - target) + log_sum
    nll = torch.where(valid, torch.where(agreed, nll, math.nan), 0.0)
    all_top = top.movedim(0, -2).flatten(-2)
    entropy = topk_entropy(all_top, top.size(-1))
    entropy = torch.where(valid, torch.where(nll.isnan(), nll, entropy), 0.0)
    if whole is not None:
        whole = torch.where(valid, torch.where(nll.isnan(), nll, whole), 0.0)
    correct = valid & ~nll.isnan() & (target == row_max)
    return Merged(nll, entropy, row_max, torch.where(nll.isnan(), nll, log_sum), correct, whole)


def _entropy_of_parts(masses: Tensor, entropies: Tensor) -> Tensor:
    """The entropy of all words from those of disjoint parts of them, (num_parts, ...).

    It is that of which part a word is in, and of which word of the part it is. ``masses`` are what
    the parts' probabilities are in proportion to.
    """
    largest, first = masses.max(0, keepdim=True)
    ratio = masses / largest
    within = torch.where(ratio == 0, 0.0, ratio * entropies).sum(0) / ratio.sum(0)
    others = ratio.scatter(0, first, 0.0)
    between = torch.where(others == 0, 0.0, others * others.log()).sum(0)
    return within + others.sum(0).log1p() - between / ratio.sum(0)


def weight_of_all(
    z_loss: float, upstream: Tensor, weight: Tensor, row_max: Tensor, log_sum: Tensor
) -> Tensor:
    """What softmax(x) is multiplied by in a row's gradient: ``weight + 2 z_loss lse upstream``.

    ``weight``, the upstream gradient times the gate, is that of the label.
    """
    return weight if z_loss == 0 else weight + 2 * z_loss * (row_max + log_sum) * upstream


def shard_gradient(
    weight: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    vocab_start: int,
    *,
    of_all: Tensor | None = None,
    uniform: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The gradient of the columns from ``vocab_start`` on.

    ``dx'/dx (of_all softmax(x') - weight onehot(y) - uniform)``, with ``of_all`` the weight and
    ``uniform`` 0 unless they are given, and x' what :func:`map_logits` makes of the logits.
    """
    x = _widened(map_logits(logits, softcap, logit_scale))
    shifted = (x - row_max.unsqueeze(-1)) - log_sum.unsqueeze(-1)
    columns = torch.arange(vocab_start, vocab_start + x.size(-1), device=x.device)
    here = columns == labels.unsqueeze(-1)
    target = weight.unsqueeze(-1)
    everywhere = target if of_all is None else of_all.unsqueeze(-1)
    # p - 1 before any rounding: close to p = 1 it is all there is.
    at_label = target * shifted.expm1() + (everywhere - target) * shifted.exp()
    gradient = torch.where(here, at_label, everywhere * shifted.exp())
    if uniform is not None:
        gradient = gradient - uniform.unsqueeze(-1)
    gradient = logit_scale * gradient
    if softcap is not None:
        gradient = gradient * (1 - (x / softcap) ** 2)
    muted = (everywhere == 0) & (target == 0)
    if uniform is not None:
        muted = muted & (uniform.unsqueeze(-1) == 0)
    return torch.where(muted, 0.0, gradient).to(logits.dtype)


def gated_ce(
    logits: Tensor,
    labels: Tensor,
    k: int | None = 20,
    *,
    alpha: float = 1.0,
    normalizer: float | None = None,
    gate: Any = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool | Literal["full"] = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Token-gated cross-entropy, with the arguments of :func:`eaft_ext.gated_ce`.

    ``loss_t = w_t (g_t ce_t + z_loss lse_t^2)`` with ``ce = nll = -ln p(y)``, or with label
    smoothing e ``(1 - e) nll + e (lse - mean_j x_j)``, ``g = (H / normalizer)^alpha`` detached, and
    H the :func:`topk_entropy`, or for k=None the :func:`vocab_entropy`, all of the logits that
    :func:`map_logits` gives; ``normalizer`` is ``ln min(k, V)``, or ``ln V``, unless given, and w
    the ``token_weight``.

    Args:
        logits: (..., V), any floating dtype; float64 is computed in float64, all else in float32.
        labels: (...), integers.
        gate: a gate of :mod:`eaft_ext.gates`, or any function of ``(nll, entropy)``.
        inplace_backward: accepted for parity; autograd decides here.

    Other arguments, and what is returned, are as in :func:`eaft_ext.gated_ce`. Arguments are not
    checked; a label outside [0, V) gives NaN.
    """
    if gate is None:
        num_logits = logits.size(-1) if k is None else min(k, logits.size(-1))
        divisor = math.log(num_logits) if normalizer is None else normalizer

        def gate(nll: Tensor, entropy: Tensor) -> Tensor:
            return torch.where(entropy == 0, 0.0, entropy / (divisor or 1.0)) ** alpha

    if token_weight is not None:
        labels, token_weight, num_valid = without_muted(labels, token_weight, ignore_index)
        if reduction == "mean" and num_items_in_batch is None:
            num_items_in_batch = num_valid
    loss, stats = token_losses(
        logits,
        labels,
        k,
        gate,
        ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        tells_entropy=return_stats == "full",
    )
    if token_weight is not None:
        loss = weigh(loss, token_weight.to(loss.dtype))
    loss = reduce_loss(loss, stats.valid, reduction, num_items_in_batch)
    return (loss, stats) if return_stats else loss


def linear_gated_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    k: int | None = 20,
    **options: Any,
) -> Any:
    """:func:`gated_ce` of the logits ``hidden @ weight.T + bias``, all of which it holds.

    Args:
        hidden: (..., H).
        weight: (V, H).
        labels: (...), integers.
        bias: (V).
        options: those of :func:`gated_ce`.
    """
    return gated_ce(torch.nn.functional.linear(hidden, weight, bias), labels, k, **options)


def topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``logits`` (..., V), values and indices; equals by the lowest index."""
    ordered = torch.sort(logits, dim=-1, descending=True, stable=True)
    return ordered.values[..., :k], ordered.indices[..., :k]
