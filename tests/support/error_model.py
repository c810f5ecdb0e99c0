"""By how much each result is uncertain, for tolerances.py: a model of the errors of float32.

All is in epsilons of what is computed in, besides those of the result itself. An nll is known to
one of 1, an entropy H below 1 to one of H (1 - ln H). What is computed from them, and from logits
that are not known exactly, is as uncertain as they make it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tolerances import FLOOR_IN_EPSILONS, of_long_sum
from torch import Tensor

import eaft_ext


def token_factors(
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Any = None,
    token_weight: Tensor | None = None,
) -> Tensor:
    """What each token's loss is multiplied with: its weight over the divisor, 0 if ignored."""
    # A word that is not the label has p = 1/2 here, so half of that for its gradient.
    logits = torch.zeros(*labels.shape, 2, dtype=torch.float64, device=labels.device)
    logits.requires_grad_()
    loss = eaft_ext.reference.gated_ce(
        logits,
        torch.where(labels == ignore_index, -100, 0),
        gate=eaft_ext.NoGate(),
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        token_weight=token_weight,
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return 2 * gradient[..., 1]


def largest_logits(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """The largest absolute value of each row of logits, scaled and capped; infinities apart."""
    largest = torch.where(logits.isfinite(), logits, 0).abs().double().amax(-1)
    return (largest * logit_scale).clamp(max=softcap or math.inf)


def _of_gate(
    gate: Any, num_logits: int, nll: Tensor, entropy: Tensor, of_nll: Tensor, of_entropy: Tensor
) -> Tensor:
    """What a gate is uncertain by for its nll and its entropy: how far each of them moves it."""
    function = gate.for_k(num_logits) if hasattr(gate, "for_k") else gate
    step = FLOOR_IN_EPSILONS * torch.finfo(torch.float32).eps
    gates = function(nll, entropy)
    moved = (function(nll + step * of_nll, entropy), function(nll, entropy + step * of_entropy))
    return sum((one - gates).abs().nan_to_num() / step for one in moved)


def error_weights(
    gt: Any,
    logits: Tensor,
    labels: Tensor,
    upstream: Tensor | float = 1.0,
    *,
    k: int | None = 20,
    alpha: float = 1.0,
    normalizer: float | None = None,
    gate: Any = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    known_to: Tensor | float = 0.0,
    inplace_backward: bool = False,  # does not matter
    **reduction: Any,
) -> dict[str, Tensor]:
    """Of a call of ``gated_ce`` with these options, by the names of its results.

    Args:
        gt: its nll, entropy and gate.
        upstream: the gradient of the loss.
        known_to: the epsilons that the logits of each token are known to, if they are products.
    """
    vocab_size = logits.size(-1)
    nll = gt.nll.nan_to_num(posinf=0.0).abs().double()
    entropy = gt.entropy.nan_to_num(posinf=0.0).double()
    largest = largest_logits(logits, softcap, logit_scale)
    # Logits that are not those that were given are known to an epsilon of the largest.
    is_mapped = softcap is not None or logit_scale != 1
    of_logit = known_to + (largest if is_mapped else torch.zeros_like(largest))
    of_lse = 1 + largest + math.log(vocab_size)
    of_nll = 1 + nll + of_logit
    of_entropy = (1 + of_logit) * torch.where(entropy < 1, entropy * (1 - entropy.log()), 1)

    num_logits = vocab_size if k is None else min(k, vocab_size)
    gate = eaft_ext.EntropyGate(alpha, normalizer) if gate is None else gate
    of_gate = _of_gate(gate, num_logits, nll, entropy, of_nll, of_entropy.nan_to_num())
    gates = gt.gate.abs().nan_to_num().double()
    smooth = label_smoothing * of_lse
    of_loss = gates * (of_nll + smooth * of_long_sum(vocab_size)) + of_gate * (nll + 2 * smooth)
    of_loss = of_loss + z_loss * of_lse**2
    # The truth's gradient of an lse is exp(x - lse), in float64: known to an epsilon of the lse.
    of_truth = of_lse if logits.dtype == torch.float64 else 0.0
    of_row = gates * (1 + of_logit + label_smoothing * of_truth) + of_gate
    of_row = of_row + 2 * z_loss * of_lse * (1 + of_logit + of_truth)
    factors = token_factors(labels, **reduction)
    is_reduced = reduction.get("reduction", "mean") != "none"
    return {
        "loss": (factors * of_loss).sum() if is_reduced else factors * of_loss,
        "nll": 1 + of_logit,
        "entropy": 1 + of_logit,
        "gate": of_gate,
        "gradient": (upstream * factors * of_row).abs().nan_to_num(),
        "lse": 1 + of_logit,
        "z_loss": z_loss * of_lse**2,
        "vocab_entropy": 1 + of_logit,
    }
