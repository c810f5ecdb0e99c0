"""gradient_in_forward: the same loss and gradient, whatever comes after the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import REFUSAL, make, same_bits
from torch import Tensor

import eaft_ext
from eaft_ext import EntropyGate, FocalGate, gated_ce, reference

pytestmark = pytest.mark.operator("gated_ce_forward_with_grad")

V = 1000
FUSED = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
IN_PLACE = pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])


def _inputs(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    logits, labels = make(12, V, dtype, device=device, **({"ignored": 0.2} | options))
    return [logits.requires_grad_(), labels]


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


@FUSED
@IN_PLACE
@pytest.mark.parametrize(
    ("num_items", "reduction"),
    [(None, "mean"), (7, "mean"), (torch.tensor(9), "mean"), (None, "sum")],
    ids=["none-mean", "int-mean", "tensor-mean", "none-sum"],
)
@pytest.mark.parametrize("gate", [EntropyGate(2.0), FocalGate(1.5)], ids=repr)
def test_as_without(
    device: str,
    dtype: torch.dtype,
    inplace: bool,
    reduction: str,
    num_items: Any,
    gate: eaft_ext.Gate,
) -> None:
    if isinstance(num_items, Tensor):
        num_items = num_items.to(device)
    logits, labels = _inputs(device, dtype)
    options: Any = {"gate": gate, "reduction": reduction, "num_items_in_batch": num_items}
    plain, plain_stats = gated_ce(logits, labels, return_stats=True, **options)
    expected = _gradient(plain, logits)
    own = logits.detach().clone().requires_grad_()
    loss, stats = gated_ce(
        own,
        labels,
        return_stats=True,
        gradient_in_forward=True,
        inplace_backward=inplace,
        **options,
    )
    torch.testing.assert_close(loss, plain)
    for name, one, other in zip(stats._fields, stats, plain_stats, strict=True):
        torch.testing.assert_close(one, other, msg=name)
    gradient = _gradient(loss, own)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected)
    assert (gradient.data_ptr() == own.data_ptr()) == inplace


@FUSED
@IN_PLACE
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.7, 0.0])
def test_a_loss_that_is_scaled(
    device: str, dtype: torch.dtype, inplace: bool, factor: float
) -> None:
    logits, labels = _inputs(device, dtype)
    expected = _gradient(factor * gated_ce(logits, labels), logits)
    own = logits.detach().clone().requires_grad_()
    loss = gated_ce(own, labels, gradient_in_forward=True, inplace_backward=inplace)
    torch.testing.assert_close(_gradient(factor * loss, own), expected)


def test_several_backwards(device: str) -> None:
    logits, labels = _inputs(device)
    expected = _gradient(gated_ce(logits, labels), logits)
    loss = gated_ce(logits, labels, gradient_in_forward=True)
    for factor in (2.0, 1.0, 0.5):
        (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(factor).to(loss), True)
        torch.testing.assert_close(gradient, factor * expected)
    torch.testing.assert_close(_gradient(3 * loss, logits), 3 * expected)
    with pytest.raises(RuntimeError, match="second time"):
        _gradient(loss, logits)


def test_the_gradients_of_two_losses_add_up(device: str) -> None:
    logits, labels = _inputs(device)
    losses = [gated_ce(logits, labels, gate=g) for g in (EntropyGate(), FocalGate(1.0))]
    expected = _gradient(losses[0] + 2 * losses[1], logits)
    losses = [
        gated_ce(logits, labels, gate=g, gradient_in_forward=True)
        for g in (EntropyGate(), FocalGate(1.0))
    ]
    torch.testing.assert_close(_gradient(losses[0] + 2 * losses[1], logits), expected)


@IN_PLACE
def test_a_second_derivative_is_refused(device: str, inplace: bool) -> None:
    logits, labels = _inputs(device)
    loss = gated_ce(logits, labels, gradient_in_forward=True, inplace_backward=inplace)
    with pytest.raises(RuntimeError, match="drop create_graph=True or gradient_in_forward"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("num_rows", [0, 12])
def test_nothing_to_learn_from(device: str, num_rows: int) -> None:
    logits, labels = make(num_rows, V, device=device, ignored=1.0)
    logits.requires_grad_()
    loss = gated_ce(logits, labels, gradient_in_forward=True)
    loss /= 4
    assert loss.item() == 0
    assert torch.equal(_gradient(loss, logits), torch.zeros_like(logits))


def test_it_is_left_alone_where_it_cannot_be(device: str) -> None:
    """float16, a gate of one's own, no gradient: the same bits as without."""
    cases: list[tuple[Tensor, Any]] = [
        (_inputs(device, torch.float16)[0], EntropyGate()),
        (_inputs(device)[0], lambda nll, entropy: entropy),
        (_inputs(device)[0].detach(), EntropyGate()),
    ]
    labels = _inputs(device)[1]
    for logits, gate in cases:
        plain = gated_ce(logits, labels, gate=gate)
        loss = gated_ce(logits, labels, gate=gate, gradient_in_forward=True)
        assert same_bits(loss, plain)
        if logits.requires_grad:
            assert same_bits(_gradient(loss, logits), _gradient(plain, logits))


def test_without_kernels(device: str, without_kernels: None) -> None:
    logits, labels = _inputs(device)
    loss = gated_ce(logits, labels, gradient_in_forward=True)
    expected = reference.gated_ce(logits, labels)
    assert torch.equal(_gradient(loss, logits), _gradient(expected, logits))


def test_the_logits_are_not_kept(device: str) -> None:
    hidden, labels = _inputs(device)
    logits = hidden * 2
    gated_loss = gated_ce(logits, labels, gradient_in_forward=True)
    logits.data.fill_(float("nan"))
    assert _gradient(gated_loss, hidden).isfinite().all()


def test_under_a_compiler(device: str) -> None:
    logits, labels = _inputs(device)

    def loss(x: Tensor) -> Tensor:
        return gated_ce(x, labels, gradient_in_forward=True)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        _gradient(compiled(logits), logits), _gradient(gated_ce(logits, labels), logits)
    )


def test_the_reduction_must_give_a_scalar(device: str) -> None:
    logits, labels = _inputs(device)
    with pytest.raises(ValueError, match=r"gradient_in_forward needs reduction .* got 'none'"):
        gated_ce(logits, labels, reduction="none", gradient_in_forward=True)
    with pytest.raises(ValueError, match="GatedCrossEntropyLoss: gradient_in_forward needs"):
        eaft_ext.GatedCrossEntropyLoss(reduction="none", gradient_in_forward=True)


def test_the_module_hands_it_on(device: str) -> None:
    logits, labels = _inputs(device)
    loss = eaft_ext.GatedCrossEntropyLoss(gradient_in_forward=True)(logits, labels)
    assert "ScalarLoss" in type(loss.grad_fn).__name__
    torch.testing.assert_close(loss, gated_ce(logits, labels))


@pytest.mark.parametrize("factor", [torch.ones(2), torch.tensor(1.0, dtype=torch.float64)])
def test_a_factor_is_one_float32(device: str, factor: Tensor) -> None:
    gradient, _ = _inputs(device)
    with pytest.raises(REFUSAL, match="factor must be one float32 number on"):
        torch.ops.eaft_ext.scale_gradient_(gradient.detach(), factor.to(device))
