"""The loss in plain PyTorch, any device, any dtype: the measure of the kernels, and their stand-in.

It imports nothing of the package and computes what the kernels compute, by the formulas of
:func:`gated_ce`, with several passes over float32 copies of the logits.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]


class TokenStats(NamedTuple):
    """What is known of every token: detached, shaped like the labels, 0 where the label is ignored.

    Float32, or float64 for float64 logits; ``valid`` is bool.
    """

    nll: Tensor
    """-ln p(y), in nats."""
    entropy: Tensor
    """H, the entropy in nats of the k largest logits, renormalised among themselves."""
    gate: Tensor
    """The weight that the nll is multiplied by."""
    valid: Tensor
    """Whether the label takes part, that is, is not ``ignore_index``."""


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def topk_entropy(logits: Tensor, k: int) -> Tensor:
    """H, the entropy in nats of the min(k, V) largest of ``logits`` (..., V); detached.

    ``Z = sum_i exp(t_i - t_1)``, ``q_i = exp(t_i - t_1) / Z``, ``H = ln Z - sum_i q_i (t_i - t_1)``
    """
    top = _widened(logits.detach()).topk(min(k, logits.size(-1)), dim=-1).values
    # Without the largest, whose 1 in Z and 0 in the sum are left to the end: of a confident token
    # the others are all there is.
    shifted = top[..., 1:] - top[..., :1]
    exponential = shifted.exp()
    others = exponential.sum(-1)
    # A term with q_i = 0 is 0, also where t_i = -inf.
    weighted = torch.where(exponential == 0, 0.0, exponential * shifted).sum(-1)
    # Where the largest is infinite there is no distribution: NaN, else 0.
    undefined = top[..., 0] - top[..., 0]
    return others.log1p() - weighted / (1 + others) + undefined


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
    return torch.where(valid, nll * torch.where(in_range, 1.0, math.nan), 0.0)


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
    logits: Tensor, labels: Tensor, k: int, gate: Any, ignore_index: int = -100
) -> tuple[Tensor, TokenStats]:
    """Per-token losses and stats: ``gate`` is one of :mod:`eaft_ext.gates`, or any function."""
    k = min(k, logits.size(-1))
    valid = labels != ignore_index
    nll = cross_entropy(logits, labels, ignore_index)
    entropy = torch.where(valid, topk_entropy(logits, k), 0.0)
    weight = gate_weights(gate, k, nll.detach(), entropy, valid)
    return weigh(nll, weight), TokenStats(nll.detach(), entropy, weight, valid)


def gated_ce(
    logits: Tensor,
    labels: Tensor,
    k: int = 20,
    *,
    alpha: float = 1.0,
    normalizer: float | None = None,
    gate: Any = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Token-gated cross-entropy, with the arguments of :func:`eaft_ext.gated_ce`.

    ``loss_t = g_t * nll_t`` with ``nll = -ln p(y)``, ``g = (H / normalizer)^alpha`` detached, and H
    the :func:`topk_entropy`; ``normalizer`` is ``ln min(k, V)`` unless given.

    Args:
        logits: (..., V), any floating dtype; float64 is computed in float64, all else in float32.
        labels: (...), integers.
        gate: a gate of :mod:`eaft_ext.gates`, or any function of ``(nll, entropy)``.
        inplace_backward: accepted for parity; autograd decides here.

    Other arguments, and what is returned, are as in :func:`eaft_ext.gated_ce`. Arguments are not
    checked; a label outside [0, V) gives NaN.
    """
    if gate is None:
        divisor = math.log(min(k, logits.size(-1))) if normalizer is None else normalizer

        def gate(nll: Tensor, entropy: Tensor) -> Tensor:
            return torch.where(entropy == 0, 0.0, entropy / (divisor or 1.0)) ** alpha

    loss, stats = token_losses(logits, labels, k, gate, ignore_index)
    loss = reduce_loss(loss, stats.valid, reduction, num_items_in_batch)
    return (loss, stats) if return_stats else loss


def topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``logits`` (..., V), values and indices; equals by the lowest index."""
    ordered = torch.sort(logits, dim=-1, descending=True, stable=True)
    return ordered.values[..., :k], ordered.indices[..., :k]
