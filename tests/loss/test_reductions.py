"""Means, sums and gradient accumulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inputs import make
from torch import Tensor

import eaft_ext
from eaft_ext import gated_ce

pytestmark = pytest.mark.usefixtures("route")

V = 300


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def test_mean_is_over_the_tokens_that_count(device: str, dtype: torch.dtype) -> None:
    """Not over all tokens, and not over the sum of the gates."""
    logits, labels = make(12, V, dtype, device=device, ignored=0.3)
    logits.requires_grad_()
    losses = gated_ce(logits, labels, reduction="none")
    count = (labels != -100).sum().item()
    assert 0 < count < 12
    mean = gated_ce(logits, labels)
    torch.testing.assert_close(mean, losses.sum() / count)
    torch.testing.assert_close(gated_ce(logits, labels, reduction="sum"), losses.sum())
    torch.testing.assert_close(
        _gradient(mean, logits).float(),
        _gradient(losses.sum(), logits).float() / count,
        rtol=2e-2 if dtype.itemsize == 2 else 1e-6,
        atol=1e-6,
    )


NUM_ITEMS: dict[str, Any] = {
    "int": 37,
    "float": 37.0,
    "numpy": np.int64(37),
    "int64_tensor": torch.tensor(37),
    "int32_tensor": torch.tensor(37, dtype=torch.int32),
    "float32_tensor": torch.tensor(37.0),
    "float64_tensor": torch.tensor(37.0, dtype=torch.float64),
    "tensor_of_one_element": torch.tensor([37]),
    "tensor_of_shape_1_1": torch.tensor([[37.0]]),
}


@pytest.mark.parametrize("kind", NUM_ITEMS)
def test_num_items_in_batch(device: str, dtype: torch.dtype, kind: str) -> None:
    """The loss is one float32 number (float64 for float64 logits), whatever the count comes in."""
    logits, labels = make(12, V, dtype, device=device, ignored=0.3)
    logits.requires_grad_()
    num_items = NUM_ITEMS[kind]
    if isinstance(num_items, Tensor):
        num_items = num_items.to(device)
    loss = gated_ce(logits, labels, num_items_in_batch=num_items)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss, gated_ce(logits, labels, reduction="sum") / 37)
    loss.backward()


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor([0.0])], ids=repr)
def test_no_items_in_batch(device: str, zero: Any) -> None:
    """0 items and nothing to learn from: 0.0 with a graph, not 0 / 0."""
    logits, labels = make(12, V, device=device, ignored=1.0)
    zero = zero.clone().to(device) if isinstance(zero, Tensor) else zero
    loss = gated_ce(logits.requires_grad_(), labels, num_items_in_batch=zero)
    assert loss.shape == () and loss.requires_grad and loss.item() == 0
    loss.backward()
    assert logits.grad is not None and not logits.grad.any()
    if isinstance(zero, Tensor):
        assert not zero.any(), "the caller's tensor was changed"


def test_accumulation_over_micro_batches(device: str) -> None:
    """One of them with every label ignored. Their own means would weigh a token by its batch."""
    logits, labels = make(24, V, device=device, ignored=0.3)
    labels[6:12] = -100
    whole = logits.clone().requires_grad_()
    gated_ce(whole, labels).backward()
    parts = logits.clone().requires_grad_()
    num_items = (labels != -100).sum()
    total = torch.zeros((), device=device)
    for rows in range(0, 24, 6):
        loss = gated_ce(
            parts[rows : rows + 6], labels[rows : rows + 6], num_items_in_batch=num_items
        )
        loss.backward()
        total += loss.detach()
    assert whole.grad is not None and parts.grad is not None
    torch.testing.assert_close(total, gated_ce(logits, labels))
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_may_be_changed_in_place(device: str, reduction: str) -> None:
    logits, labels = make(12, V, device=device, ignored=0.3)
    plain, scaled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (gated_ce(plain, labels, reduction=reduction) * 1.5).sum().backward()
    loss, stats = gated_ce(scaled, labels, reduction=reduction, return_stats=True)
    before = stats.nll.clone()
    loss.mul_(3)
    loss /= 2
    loss.sum().backward()
    assert plain.grad is not None and scaled.grad is not None
    torch.testing.assert_close(scaled.grad, plain.grad)
    assert torch.equal(stats.nll, before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_stats_do_not_depend_on_the_reduction(device: str, reduction: str) -> None:
    logits, labels = make(12, V, device=device, ignored=0.3)
    logits = logits.view(3, 4, V).requires_grad_()
    labels = labels.view(3, 4)
    loss, stats = gated_ce(logits, labels, reduction=reduction, return_stats=True)
    assert isinstance(stats, eaft_ext.TokenStats)
    assert loss.requires_grad and loss.shape == ((3, 4) if reduction == "none" else ())
    for name, value in stats._asdict().items():
        assert value is None or (value.shape == (3, 4) and not value.requires_grad), name
    losses = stats.gate * stats.nll
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / stats.valid.sum()}
    torch.testing.assert_close(loss.detach(), expected[reduction])
