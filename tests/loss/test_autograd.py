"""Derivatives: right ones, refused ones, and what overwriting the logits may and may not do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gate_cases import FIXED_GATES
from inputs import make, same_bits
from torch import Tensor

import eaft_ext
from eaft_ext import NoGate, gated_ce, topk

V = 300
IN_PLACE = pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])


def _inputs(device: str, **options: Any) -> tuple[Tensor, Tensor]:
    logits, labels = make(12, V, device=device, ignored=0.2, **options)
    return logits.requires_grad_(), labels


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gate", FIXED_GATES)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(3, 11), (10, 7), (2, 130)], ids=str)
def test_gradcheck(num_rows: int, vocab_size: int, gate: str, reduction: str) -> None:
    logits, labels = make(num_rows, vocab_size, torch.float64, ignored=0.3)

    def loss(x: Tensor) -> Tensor:
        return gated_ce(x, labels, 4, gate=FIXED_GATES[gate], reduction=reduction)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_(), fast_mode=vocab_size > 100)


def test_gradcheck_of_views_and_scaling() -> None:
    """Logits that are computed, sliced and transposed, and a loss that is used further."""
    buffer = torch.randn(4, 3, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 8, -100], [3, 3, 5]])

    def loss(x: Tensor) -> Tensor:
        logits = (2 * x)[:, 1:].transpose(0, 1)
        return gated_ce(logits, labels.repeat(1, 2)[:, :4], 3, gate=NoGate()).exp()

    assert torch.autograd.gradcheck(loss, buffer)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("k", [1, 4, 9])
def test_gradcheck_of_topk(k: int) -> None:
    logits = torch.randperm(27, dtype=torch.float64).view(3, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk(x, k)[0], logits)
    values, indices = topk(logits, k)
    assert values.requires_grad and not indices.requires_grad


@IN_PLACE
@pytest.mark.parametrize("further", ["backward", "grad", "penalty"])
def test_no_second_derivative(device: str, inplace: bool, further: str) -> None:
    logits, labels = _inputs(device)
    x = logits * 1
    loss = gated_ce(x, labels, inplace_backward=inplace)
    sentence = "create_graph" if inplace else "second derivative"
    with pytest.raises(RuntimeError, match=rf"^eaft_ext: .*{sentence}"):
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        if further == "backward":
            gradient.sum().backward()
        elif further == "grad":
            torch.autograd.grad(gradient.norm(), logits)
        else:
            (gated_ce(logits, labels) + gradient.square().sum()).backward()


def test_create_graph_alone_is_no_error(device: str) -> None:
    """Some training loops ask for it and never differentiate twice."""
    logits, labels = _inputs(device)
    (plain,) = torch.autograd.grad(gated_ce(logits, labels), logits)
    (gradient,) = torch.autograd.grad(gated_ce(logits, labels), logits, create_graph=True)
    assert same_bits(gradient, plain)


def test_the_reference_has_a_second_derivative() -> None:
    logits, labels = make(3, 9, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: eaft_ext.reference.gated_ce(x, labels, 4, gate=NoGate()), logits.requires_grad_()
    )


def test_backward_twice_over_a_kept_graph(device: str) -> None:
    logits, labels = _inputs(device)
    loss = gated_ce(logits, labels)
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


@pytest.mark.parametrize("leaf", [False, True])
def test_in_place_backward_twice_is_an_error(device: str, leaf: bool) -> None:
    """The logits are gone: autograd notices, and no wrong numbers come out."""
    logits, labels = _inputs(device)
    x = logits if leaf else logits * 1
    loss = gated_ce(x, labels, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_losses_of_the_same_logits_in_place(device: str) -> None:
    logits, labels = _inputs(device)
    x = logits * 1
    first, second = (gated_ce(x, labels, inplace_backward=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + second).backward()


# Other uses of the logits beside the loss, and those that read them in their own backward.
CONSUMERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(),
    "square": lambda x: x.square().sum(),
    "logsumexp": lambda x: x.logsumexp(-1).square().mean(),
    "max": lambda x: x.max(-1).values.sum(),
    "slices": lambda x: (x[:, 3:7] * x[:, 4:8]).sum(),
}
READERS = {"square", "logsumexp", "slices"}


@IN_PLACE
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_other_consumers_of_the_logits(
    device: str, consumer: str, order: str, inplace: bool
) -> None:
    """The right gradient, or autograd's error where one would come from overwritten logits.

    Backward runs from the last use to the first: only what was before the loss comes too late.
    """
    use = CONSUMERS[consumer]
    logits, labels = _inputs(device)
    (from_loss,) = torch.autograd.grad(gated_ce(logits, labels), logits)
    (from_use,) = torch.autograd.grad(use(logits), logits)

    x = logits * 1
    if order == "before":
        total = use(x) + gated_ce(x, labels, inplace_backward=inplace)
    else:
        total = gated_ce(x, labels, inplace_backward=inplace) + use(x)
    if inplace and order == "before" and consumer in READERS:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
        return
    total.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, from_loss + from_use)


def test_producer_that_needs_its_output(device: str) -> None:
    """The backward of tanh reads the logits themselves: overwriting them must be noticed."""
    hidden, labels = _inputs(device)
    loss = gated_ce(hidden.tanh(), labels, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("leaf", [False, True], ids=["computed", "leaf"])
def test_in_place_gradient_lies_in_the_logits(
    device: str, dtype: torch.dtype, leaf: bool, reduction: str
) -> None:
    logits, labels = make(12, V, dtype, device=device, ignored=0.2)
    logits.requires_grad_()
    gated_ce(logits, labels, reduction=reduction).sum().backward()
    assert logits.grad is not None
    expected = logits.grad.clone()

    again = logits.detach().clone().requires_grad_()
    x = again if leaf else again * 1
    address = x.data_ptr()
    found: list[int] = []
    # The address alone: who holds the gradient itself makes autograd copy it.
    x.register_hook(lambda gradient: found.append(gradient.data_ptr()))
    gated_ce(x, labels, reduction=reduction, inplace_backward=True).sum().backward()
    assert found == [address]
    assert again.grad is not None
    if leaf:
        assert again.grad.data_ptr() == address, "autograd kept a copy"
    assert same_bits(again.grad, expected)


@IN_PLACE
def test_gradient_of_computed_logits(device: str, inplace: bool) -> None:
    """Through a linear layer, as in training."""
    torch.manual_seed(0)
    hidden = torch.randn(12, 16, device=device, requires_grad=True)
    weight = torch.randn(V, 16, device=device, requires_grad=True)
    _, labels = make(12, V, device=device, ignored=0.2)
    gated_ce(hidden @ weight.T, labels, inplace_backward=inplace).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    eaft_ext.reference.gated_ce(hidden @ weight.T, labels).backward()
    for a, b in zip(found, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@IN_PLACE
def test_logits_without_gradient(device: str, inplace: bool) -> None:
    logits, labels = _inputs(device)
    expected = gated_ce(logits, labels)
    before = logits.detach().clone()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = gated_ce(logits, labels, inplace_backward=inplace)
        assert not loss.requires_grad and same_bits(loss, expected)
    loss = gated_ce(logits.detach(), labels, inplace_backward=inplace)
    assert not loss.requires_grad and loss.grad_fn is None and same_bits(loss, expected)
    assert same_bits(logits, before), "the forward wrote on the logits"


def test_inference_tensors(device: str) -> None:
    """Also the operators that write over them, whose version counter they do not have."""
    logits, labels = make(12, V, device=device)
    ops = torch.ops.eaft_ext
    upstream = torch.ones(12, device=device)
    arguments = (labels, 20, "entropy", [1.0], -100)
    gradient = ops.gated_ce_forward_with_grad(upstream, logits, *arguments)[-1]
    with torch.inference_mode():
        inference = logits.clone()
        ops.gated_ce_forward_with_grad_(upstream, inference, *arguments)
    assert inference.is_inference() and same_bits(inference, gradient)


@pytest.mark.parametrize("call", ["gated_ce", "topk", "linear_gated_ce", "losses of tokens"])
def test_eager_calls_take_the_short_way(
    device: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of torch.library takes longer than few rows do; under a compiler it is taken."""
    logits, labels = _inputs(device)
    weight = torch.randn(V, V, device=device)
    linear = partial(eaft_ext.linear_gated_ce, weight=weight, labels=labels)
    loss: Callable[[Tensor], Tensor] = {
        "gated_ce": lambda x: gated_ce(x, labels),
        "topk": lambda x: topk(x, 5)[0].sum(),
        "linear_gated_ce": linear,
        "losses of tokens": lambda x: linear(x, reduction="none").sum(),
    }[call]
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    (expected,) = torch.autograd.grad(compiled(logits), logits)
    monkeypatch.setattr(torch._library.utils, "fill_defaults", _refuse)
    (found,) = torch.autograd.grad(loss(logits), logits)
    assert same_bits(found, expected)
    with pytest.raises(AssertionError, match="schema"):
        compiled(logits)


def _refuse(*_: Any) -> Any:
    raise AssertionError("torch.library asks the schema for what was left out")


@pytest.mark.usefixtures("route")
def test_stats_carry_no_gradient(device: str) -> None:
    logits, labels = _inputs(device)
    loss, stats = gated_ce(logits, labels, return_stats=True)
    for value in stats:
        assert value is None or not value.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        stats.nll.sum().backward()
    loss.backward()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("upstream", ["expanded", "per_row", "zeros", "negative", "strided"])
def test_upstream_gradients(device: str, dtype: torch.dtype, upstream: str) -> None:
    """Stride 0 from a sum, one for every row, and zeros that leave nothing."""
    logits, labels = make(12, V, dtype, device=device, ignored=0.2)
    logits.requires_grad_()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    one = {
        "expanded": torch.full((), 2.0, dtype=real).expand(12),
        "per_row": torch.linspace(-3, 5, 12, dtype=real),
        "zeros": torch.zeros(12, dtype=real),
        "negative": torch.full((12,), -1.0, dtype=real),
        "strided": torch.linspace(-3, 5, 24, dtype=real)[::2],
    }[upstream].to(device)
    loss = gated_ce(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss, logits, one)
    rows = []
    for row in range(12):
        part = logits.detach()[row].requires_grad_()
        single = gated_ce(part, labels[row], reduction="none") * one[row]
        rows.append(torch.autograd.grad(single, part)[0])
    torch.testing.assert_close(gradient, torch.stack(rows))
    assert upstream != "zeros" or not gradient.any()


def test_zero_upstream_silences_a_row_with_an_infinite_loss(device: str) -> None:
    """Rows whose weight is 0 are not even read."""
    logits, labels = make(12, V, device=device)
    logits[3, labels[3]] = -torch.inf
    logits.requires_grad_()
    losses = gated_ce(logits, labels, reduction="none")
    assert losses[3].isinf()
    losses[torch.arange(12) != 3].sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all() and not logits.grad[3].any()


@IN_PLACE
def test_hooks(device: str, inplace: bool) -> None:
    """They see the gradient, and what they return counts."""
    logits, labels = _inputs(device)
    (expected,) = torch.autograd.grad(gated_ce(logits, labels), logits)
    x = logits * 1
    seen: list[Tensor] = []
    x.register_hook(lambda gradient: seen.append(gradient.clone()))
    x.register_hook(lambda gradient: gradient * 3)
    kept: list[Tensor] = []
    logits.register_post_accumulate_grad_hook(lambda leaf: kept.append(leaf.grad))
    gated_ce(x, labels, inplace_backward=inplace).backward()
    assert same_bits(seen[0], expected)
    torch.testing.assert_close(kept[0], 3 * expected)


@IN_PLACE
def test_gradient_accumulates(device: str, inplace: bool) -> None:
    weight, labels = _inputs(device)
    for _ in range(3):
        gated_ce(weight * 1, labels, inplace_backward=inplace).backward()
    assert weight.grad is not None
    (once,) = torch.autograd.grad(gated_ce(weight, labels), weight)
    torch.testing.assert_close(weight.grad, 3 * once)


def test_function_transforms(device: str) -> None:
    """torch.func.grad, a vmap of it, and forward mode."""
    logits, labels = _inputs(device)
    (expected,) = torch.autograd.grad(gated_ce(logits, labels, reduction="sum"), logits)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return gated_ce(x, y, reduction="sum")

    x = logits.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x, labels), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, labels), expected)
    losses = torch.func.vmap(loss)(x, labels)
    torch.testing.assert_close(losses, gated_ce(x, labels, reduction="none"))
    direction = torch.randn_like(x)
    _, derivative = torch.func.jvp(lambda x: loss(x, labels), (x,), (direction,))
    torch.testing.assert_close(derivative, (expected * direction).sum(), rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = gated_ce(torch.autograd.forward_ad.make_dual(x, direction), labels, reduction="sum")
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, derivative)
