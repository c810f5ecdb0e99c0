"""One call against the reference: loss, statistics and gradient, by the rules of tolerances.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from inputs import same_bits, upstream_of
from tolerances import GRADIENT_FACTOR, LOSS_FACTOR, assert_within, of_long_sum
from torch import Tensor

import eaft_ext

PLAIN: dict[str, float | None] = {
    "softcap": None,
    "logit_scale": 1.0,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
}
"""The family's other options, where they change nothing."""


class Outcome(NamedTuple):
    """What a call gives, the gradient being that of ``sum(upstream * loss)``."""

    loss: Tensor
    nll: Tensor
    entropy: Tensor
    gate: Tensor
    gradient: Tensor


def outcome(
    function: Any, logits: Tensor, labels: Tensor, upstream: Tensor, **options: Any
) -> Outcome:
    """Call a ``gated_ce`` and its backward."""
    logits = logits.detach().requires_grad_()
    loss, stats = function(logits, labels, return_stats=True, **options)
    (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
    return Outcome(loss.detach(), stats.nll, stats.entropy, stats.gate, gradient)


def assert_same_stats(found: eaft_ext.TokenStats, expected: eaft_ext.TokenStats) -> None:
    """All that there is of one is there of the other, in every bit."""
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or same_bits(a, b), name


def gate_uncertainty(
    gate: Any, num_logits: int, nll: Tensor, entropy: Tensor, of_nll: Tensor, of_entropy: Tensor
) -> Tensor:
    """What a gate is uncertain by where its nll and its entropy are: they times its slopes."""
    nll, entropy = nll.clone().requires_grad_(), entropy.clone().requires_grad_()
    gate = eaft_ext.EntropyGate() if gate is None else gate
    gates = (gate.for_k(num_logits) if hasattr(gate, "for_k") else gate)(nll, entropy)
    if not gates.requires_grad:
        return torch.zeros_like(nll)
    slopes = torch.autograd.grad(gates.sum(), (nll, entropy), materialize_grads=True)
    return sum(
        (slope.abs() * known).nan_to_num(posinf=0.0)
        for slope, known in zip(slopes, (of_nll, of_entropy), strict=True)
    )


def uncertain_logits(logits: Tensor, **options: Any) -> Tensor:
    """By how many epsilons each token's lse is uncertain besides those of its nll.

    Where logits are added up, or are not those that were given, they are known to one each.
    """
    if all(options.get(name, plain) == plain for name, plain in PLAIN.items()):
        return logits.new_zeros(logits.shape[:-1], dtype=torch.float64)
    largest = torch.where(logits.isfinite(), logits, 0).abs().double().amax(-1)
    largest = largest * options.get("logit_scale", 1.0)
    return largest.clamp(max=options.get("softcap") or math.inf) + math.log(logits.size(-1))


def error_weights(
    gt: Outcome,
    upstream: Tensor,
    logits: Tensor,
    *,
    k: int | None = 20,
    gate: Any = None,
    z_loss: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """By how many epsilons each result is uncertain besides its own, for tolerances.py.

    An nll is known to one of itself and of 1, an entropy to one of itself and its logarithm.
    """
    vocab_size = logits.size(-1)
    nll = gt.nll.nan_to_num(posinf=0.0).abs()
    entropy = gt.entropy.nan_to_num(posinf=0.0)
    largest = uncertain_logits(logits, z_loss=z_loss, **options)
    of_nll = 1 + nll + largest
    of_entropy = (1 + largest) * torch.where(entropy < 1, entropy * (1 - entropy.log()), 1)
    num_logits = vocab_size if k is None else min(k, vocab_size)
    of_gate = gate_uncertainty(gate, num_logits, nll, entropy, of_nll, of_entropy.nan_to_num())
    gates = gt.gate.abs().nan_to_num() + of_gate
    of_mean = largest * of_long_sum(vocab_size) if options.get("label_smoothing") else 0.0
    of_loss = gates * (of_nll + of_mean) + z_loss * of_nll**2
    of_row = gates * (1 + largest) + 2 * z_loss * of_nll
    return {
        "nll": of_nll,
        "entropy": 1 + largest,
        "gate": of_gate,
        "loss": of_loss if gt.loss.dim() else max(of_loss.flatten().tolist(), default=1.0),
        "gradient": (upstream * of_row).abs().nan_to_num(),
    }


def assert_parity(logits: Tensor, labels: Tensor, **options: Any) -> None:
    """Hold ``eaft_ext.gated_ce`` to ``eaft_ext.reference.gated_ce`` on these inputs."""
    options = {"reduction": "none"} | options
    upstream = torch.tensor(-1.75, device=labels.device)
    if options["reduction"] == "none":
        upstream = upstream_of(labels)
    reference = eaft_ext.reference.gated_ce
    op = outcome(eaft_ext.gated_ce, logits, labels, upstream, **options)
    ref = outcome(reference, logits, labels, upstream, **options)
    gt = outcome(reference, logits.double(), labels, upstream.double(), **options)
    weights = error_weights(gt, upstream, logits, **options)
    for name, *values in zip(Outcome._fields, op, ref, gt, strict=True):
        rows = [value if value.dim() else value.unsqueeze(0) for value in values]
        factor = GRADIENT_FACTOR if name == "gradient" else LOSS_FACTOR
        assert_within(name, *rows, factor, weights[name])
