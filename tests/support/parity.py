"""One call against the reference: loss, statistics and gradient, by the rules of tolerances.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from error_model import error_weights
from inputs import same_bits, upstream_of
from tolerances import GRADIENT_FACTOR, LOSS_FACTOR, assert_within
from torch import Tensor

import eaft_ext


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


def assert_outcome(
    found: Outcome,
    ref: Outcome,
    gt: Outcome,
    weights: dict[str, Tensor],
    by: str = "",
    roundings: dict[str, int] | None = None,
) -> None:
    """Hold each result to both rules; ``by`` is told with its name, and not all are rounded."""
    for name, *values in zip(Outcome._fields, found, ref, gt, strict=True):
        rows = [value if value.dim() else value.unsqueeze(0) for value in values]
        factor = GRADIENT_FACTOR if name == "gradient" else LOSS_FACTOR
        assert_within(name + by, *rows, factor, weights[name], (roundings or {}).get(name, 0))


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
    assert_outcome(op, ref, gt, error_weights(gt, logits, labels, upstream, **options))
