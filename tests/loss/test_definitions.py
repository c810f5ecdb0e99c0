"""What is computed, against short eager programs that share no line with the package.

They follow the formulas of the papers and of the implementations in use, which differ in what the
entropy is divided by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import make, upstream_of
from torch import Tensor
from torch.nn import functional as F

import eaft_ext
from eaft_ext import (
    ConflictGate,
    EntropyGate,
    FocalGate,
    HardGate,
    NoGate,
    PowerGate,
    ProbabilityGate,
    SigmoidGate,
    ThresholdGate,
)

pytestmark = pytest.mark.usefixtures("route")

V = 700
REDUCTIONS = ["mean", "sum", "none"]


def token_entropy(logits: Tensor, k: int) -> Tensor:
    """Of the k most likely tokens, as a distribution of their own."""
    return torch.distributions.Categorical(logits=logits.topk(k).values).entropy()


def gate_by_hand(logits: Tensor, labels: Tensor, k: int, gate: Any) -> Tensor:
    """The weight of every token, from whole distributions."""
    logits = logits.double()
    p = logits.softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    relative = token_entropy(logits, k) / math.log(k)
    match gate:
        case EntropyGate(alpha=alpha, normalizer=None):
            return relative**alpha
        case EntropyGate(alpha=alpha, normalizer=normalizer):
            return (token_entropy(logits, k) / normalizer) ** alpha
        case SigmoidGate(beta=beta, slope=slope):
            return 1 / (1 + (-slope * (relative - beta)).exp())
        case HardGate(threshold=threshold):
            return (relative > threshold).double()
        case ConflictGate(entropy=entropy, probability=probability):
            return 1 - ((relative < entropy) & (p < probability)).double()
        case ProbabilityGate():
            return p
        case PowerGate(q=q):
            return p**q
        case ThresholdGate(threshold=threshold):
            return (p > threshold).double()
        case FocalGate(gamma=gamma):
            return (1 - p) ** gamma
        case NoGate():
            return torch.ones_like(p)
    raise AssertionError(gate)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * 1e-1
    )


# Each as in one of the implementations: the mean loss of logits (N, V) and labels (N).


def paper_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Normalised by ln K, K = 20."""
    keep = labels != -100
    logits, labels = logits[keep].double(), labels[keep]
    gate = (token_entropy(logits, 20) / math.log(20)).detach()
    return (gate * F.cross_entropy(logits, labels, reduction="none")).mean()


def authors_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """LLaMA-Factory and ms-swift: the entropy of the top 20 over the literal 3.0."""
    logits = logits.double()
    per_token = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    with torch.no_grad():
        top = logits.topk(20, dim=-1).values
        log_p = top - top.logsumexp(-1, keepdim=True)
        weight = -(log_p.exp() * log_p).sum(-1) / 3.0
    keep = (labels != -100).double()
    return (per_token * weight * keep).sum() / keep.sum()


def axolotl_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The entropy of the top 20 as it is."""
    keep = labels != -100
    logits, labels = logits[keep].double(), labels[keep]
    weight = token_entropy(logits, 20).detach()
    return -(weight * logits.log_softmax(-1)[torch.arange(len(labels)), labels]).sum() / keep.sum()


@pytest.mark.parametrize(
    ("program", "options"),
    [
        (paper_loss, {}),
        (paper_loss, {"k": 20, "alpha": 1.0, "normalizer": math.log(20)}),
        (paper_loss, {"gate": EntropyGate()}),
        (authors_loss, {"normalizer": 3.0}),
        (authors_loss, {"gate": EntropyGate(normalizer=3.0)}),
        (axolotl_loss, {"normalizer": 1.0}),
    ],
)
def test_definitions_in_use(
    device: str, dtype: torch.dtype, program: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    logits, labels = make(12, V, dtype, device=device, ignored=0.3)
    losses, gradients = [], []
    for function, kept in ((program, {}), (eaft_ext.gated_ce, options)):
        x = logits.clone().requires_grad_()
        losses.append(function(x, labels, **kept))
        losses[-1].backward()
        gradients.append(x.grad)
    close(losses[1], losses[0], torch.float64 if dtype == torch.float64 else torch.float32)
    close(gradients[1], gradients[0], dtype)


def test_the_definitions_differ(device: str) -> None:
    logits, labels = make(12, V, device=device)
    found = [program(logits, labels) for program in (paper_loss, authors_loss, axolotl_loss)]
    assert len({round(loss.item(), 3) for loss in found}) == 3


@pytest.mark.parametrize(
    "gate",
    [
        EntropyGate(),
        EntropyGate(alpha=2.0),
        EntropyGate(alpha=3.0),
        EntropyGate(alpha=0.0),
        EntropyGate(alpha=0.5, normalizer=2.5),
        SigmoidGate(),
        SigmoidGate(beta=0.7, slope=5.0),
        HardGate(0.3),
        HardGate(0.6),
        ConflictGate(0.6, 0.1),
        ConflictGate(1.0, 0.02),
        ProbabilityGate(),
        PowerGate(0.3),
        PowerGate(2.0),
        PowerGate(0.0),
        ThresholdGate(0.02),
        ThresholdGate(0.2),
        FocalGate(2.0),
        FocalGate(0.5),
        FocalGate(0.0),
        NoGate(),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [2, 20])
def test_loss_and_detached_gradient(device: str, dtype: torch.dtype, k: int, gate: Any) -> None:
    """``g * nll``, and ``u * g * (softmax - onehot)``: the gate is a number to the gradient."""
    logits, labels = make(12, V, dtype, device=device, ignored=0.2)
    upstream = upstream_of(labels)
    valid = labels != -100
    weight = gate_by_hand(logits, labels, k, gate) * valid
    log_p = logits.double().log_softmax(-1)
    safe = labels.clamp(min=0)
    nll = -log_p.gather(-1, safe[:, None]).squeeze(-1) * valid
    gradient = (log_p.exp() - F.one_hot(safe, V)) * (upstream.double() * weight)[:, None]

    x = logits.clone().requires_grad_()
    loss, stats = eaft_ext.gated_ce(x, labels, k, gate=gate, reduction="none", return_stats=True)
    loss.backward(upstream.to(loss.dtype))
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    close(stats.nll, nll, stats_dtype)
    close(stats.entropy, token_entropy(logits.double(), k) * valid, stats_dtype)
    close(stats.gate, weight, stats_dtype)
    close(loss.detach(), weight * nll, stats_dtype)
    assert torch.equal(stats.valid, valid) and stats.valid.dtype == torch.bool
    assert x.grad is not None
    close(x.grad, gradient, dtype)


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_gate_is_cross_entropy(
    device: str, dtype: torch.dtype, reduction: str, ignore_index: int
) -> None:
    logits, labels = make(24, V, dtype, device=device)
    labels[::5] = ignore_index
    found, expected = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = eaft_ext.gated_ce(
        found, labels, gate=NoGate(), reduction=reduction, ignore_index=ignore_index
    )
    plain = F.cross_entropy(expected, labels, reduction=reduction, ignore_index=ignore_index)
    close(loss, plain)
    loss.sum().backward()
    plain.sum().backward()
    assert found.grad is not None and expected.grad is not None
    close(found.grad, expected.grad, dtype)


def test_entropy_of_equal_logits_is_ln_k(device: str, dtype: torch.dtype) -> None:
    for vocab_size in (1, 2, 5, 20, 21, 5000):
        logits = torch.full((9, vocab_size), -3.5, dtype=dtype, device=device)
        labels = torch.zeros(9, dtype=torch.int64, device=device)
        loss, stats = eaft_ext.gated_ce(logits, labels, reduction="none", return_stats=True)
        k = min(20, vocab_size)
        close(stats.entropy, torch.full_like(stats.entropy, math.log(k)))
        # A vocabulary of one has nothing to be uncertain of: the gate is 0, not 0 / 0.
        close(stats.gate, torch.full_like(stats.gate, float(k > 1)))
        close(loss, stats.gate * math.log(vocab_size))


def test_shift_of_a_row_changes_nothing(device: str) -> None:
    """In float32 the nll stays exact far from 0: the log-sum is kept apart from the maximum."""
    logits, labels = make(9, V, device=device)
    logits = (logits * 256).round() / 256  # so that the shifted logits are exact
    plain = eaft_ext.gated_ce(logits, labels, reduction="none")
    for shift in (1024.0, -1024.0, 16384.0):
        shifted = eaft_ext.gated_ce(logits + shift, labels, reduction="none")
        torch.testing.assert_close(shifted, plain, rtol=1e-6, atol=1e-7)


def test_k_belongs_to_the_call(device: str) -> None:
    """The entropy and its normaliser are those of the call's k, and of V where V is smaller."""
    logits, labels = make(9, 6, device=device)
    for k in (2, 6, 20):
        _, stats = eaft_ext.gated_ce(logits, labels, k, return_stats=True)
        close(stats.entropy, token_entropy(logits.double(), min(k, 6)))
        close(stats.gate, stats.entropy / math.log(min(k, 6)))
