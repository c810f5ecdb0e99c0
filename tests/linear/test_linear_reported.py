"""Faults of fused linear losses elsewhere, as tests: each says which library had it."""

from __future__ import annotations

import torch
from linear_cases import linear_inputs

from eaft_ext import gated_ce, linear_gated_ce


def test_a_head_with_bias() -> None:
    """Cut Cross-Entropy #52: the bias of an output layer was left out."""
    hidden, weight, bias, labels = linear_inputs()
    layer = torch.nn.Linear(*weight.t().shape)
    layer.load_state_dict({"weight": weight, "bias": bias})
    found = linear_gated_ce(hidden, layer.weight, labels, layer.bias)
    torch.testing.assert_close(found, gated_ce(layer(hidden), labels))
    (gradient,) = torch.autograd.grad(found, layer.bias)
    assert gradient.abs().sum() > 0


def test_hidden_and_weight_of_any_strides() -> None:
    """TransformerEngine #2734, unsloth #10713: a view was read as if it were contiguous."""
    hidden, weight, bias, labels = linear_inputs()
    expected = linear_gated_ce(hidden, weight, labels, bias)
    views = [torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for t in (hidden, bias)]
    found = linear_gated_ce(views[0], weight.t().contiguous().t(), labels, views[1])
    torch.testing.assert_close(found, expected)
