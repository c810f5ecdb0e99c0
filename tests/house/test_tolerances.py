"""The rules of tolerances.py find what a kernel might do wrong: each mistake here is small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_model import error_weights
from gate_cases import FAMILY
from inputs import IGNORED, make, upstream_of
from linear_cases import NAMES, assert_linear_parity, linear_inputs
from parity import Outcome, assert_outcome, outcome
from torch import Tensor

import eaft_ext
from eaft_ext import NoGate

Mistake = Callable[[Outcome, Outcome, Tensor], Outcome]


def _one_token(name: str, factor: float = 1.0, more: float = 0.0, largest: bool = False) -> Mistake:
    """A number of the token whose nll is the smallest, or the largest."""

    def change(found: Outcome, gt: Outcome, labels: Tensor) -> Outcome:
        nll = gt.nll.masked_fill(labels == IGNORED, -torch.inf if largest else torch.inf)
        token = nll.argmax() if largest else nll.argmin()
        changed = getattr(found, name).clone()
        changed[token] = changed[token] * factor + more
        return found._replace(**{name: changed})

    return change


def _truncated(found: Outcome, gt: Outcome, labels: Tensor) -> Outcome:
    """The gradient is cut to 16 bits, and not rounded to the nearest."""
    dtype = found.gradient.dtype
    rounded = gt.gradient.to(dtype)
    is_too_large = rounded.double().abs() > gt.gradient.abs()
    bits = rounded.view(torch.int16)
    return found._replace(gradient=torch.where(is_too_large, bits - 1, bits).view(dtype))


def _without_label(found: Outcome, gt: Outcome, labels: Tensor) -> Outcome:
    """One token's gradient is p where it should be p - 1."""
    upstream = upstream_of(labels)
    weight = torch.where((labels != IGNORED) & (upstream != 0), upstream * gt.gate, torch.inf)
    token = weight.abs().argmin()
    changed = found.gradient.clone()
    changed[token, labels[token]] += weight[token].to(changed.dtype)
    return found._replace(gradient=changed)


OF_A_TOKEN: dict[str, Mistake] = {
    "loss": _one_token("loss", factor=1 + 1e-4),
    "largest_loss": _one_token("loss", factor=1 + 1e-5, largest=True),
    "nll": _one_token("nll", more=1e-3),
    "entropy": _one_token("entropy", more=5e-5),
    "gate": _one_token("gate", more=5e-5),
    "label": _without_label,
}


def _assert_found(mistake: Mistake, trap: str, dtype: torch.dtype, **how: Any) -> None:
    """The rules hold the operator, and do not hold it with the mistake."""
    logits, labels = make(9, 8200, dtype, trap=trap)
    upstream = upstream_of(labels)
    how = {"reduction": "none"} | how
    found = outcome(eaft_ext.gated_ce, logits, labels, upstream, **how)
    ref = outcome(eaft_ext.reference.gated_ce, logits, labels, upstream, **how)
    gt = outcome(eaft_ext.reference.gated_ce, logits.double(), labels, upstream.double(), **how)
    weights = error_weights(gt, logits, labels, upstream, **how)
    assert_outcome(found, ref, gt, weights)
    with pytest.raises(AssertionError, match=r"off by|the largest error"):
        assert_outcome(mistake(found, gt, labels), ref, gt, weights)


@pytest.mark.parametrize("gate", [None, NoGate()], ids=["entropy", "none"])
@pytest.mark.parametrize("trap", ["normal", "outliers_of_1e4", "far_from_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", OF_A_TOKEN.values(), ids=OF_A_TOKEN)
def test_of_a_token(mistake: Mistake, dtype: torch.dtype, trap: str, gate: object) -> None:
    """Also where another token's nll is 20,000, of which an epsilon is more than the mistake."""
    _assert_found(mistake, trap, dtype, gate=gate)


def test_truncated_gradient() -> None:
    """In bfloat16 it would be less than the table allows a gradient of this size."""
    _assert_found(_truncated, "normal", torch.float16, gate=NoGate())


OF_A_FAMILY: dict[str, Mistake] = {
    "loss": _one_token("loss", factor=1 + 1e-3),
    "gradient": lambda found, gt, labels: found._replace(gradient=(1 + 1e-3) * found.gradient),
    "label": _without_label,
}


@pytest.mark.parametrize("family", FAMILY, ids=str)
@pytest.mark.parametrize("mistake", OF_A_FAMILY.values(), ids=OF_A_FAMILY)
def test_of_the_family(mistake: Mistake, family: dict[str, Any]) -> None:
    """Scaled, capped, smoothed, and with a z-loss."""
    _assert_found(mistake, "normal", torch.float32, **family)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_a_reduced_loss(reduction: str) -> None:
    logits, labels = make(9, 8200)
    upstream = torch.tensor(1.0)
    reference = eaft_ext.reference.gated_ce
    ref = outcome(reference, logits, labels, upstream, reduction=reduction)
    gt = outcome(reference, logits.double(), labels, upstream.double(), reduction=reduction)
    weights = error_weights(gt, logits, labels, upstream, reduction=reduction)
    assert_outcome(ref, ref, gt, weights)
    for wrong in (
        ref._replace(loss=ref.loss * (1 + 1e-4)),
        ref._replace(gradient=ref.gradient * (1 + 1e-3)),
    ):
        with pytest.raises(AssertionError, match=r"off by|the largest error"):
            assert_outcome(wrong, ref, gt, weights)


@pytest.mark.parametrize("wrong", NAMES)
def test_of_a_linear_loss(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is a thousandth too large."""
    *inputs, labels = linear_inputs(vocab_size=999)
    assert_linear_parity(inputs, labels)
    monkeypatch.setattr(eaft_ext, "linear_gated_ce", _scaled_gradient(NAMES.index(wrong)))
    with pytest.raises(AssertionError, match=rf"{wrong}: (off by|the largest error)"):
        assert_linear_parity(inputs, labels)


def _scaled_gradient(place: int) -> Callable[..., Any]:
    right = eaft_ext.linear_gated_ce

    def wrong(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, **options: Any) -> Any:
        tensors = [hidden, weight, bias]
        tensors[place] = _Scaled.apply(tensors[place])
        return right(*tensors[:2], labels, tensors[2], **options)

    return wrong


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 + 1e-3)
