"""Derivatives of the loss in shards: right ones, refused ones, and the shard's memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gate_cases import FIXED_GATES
from inputs import make, same_bits, upstream_of
from torch import Tensor
from vocab_shards import divide, losses_of_shards, outcome_of_shards, shards_at

from eaft_ext import EntropyGate, HardGate, NoGate

ops = torch.ops.eaft_ext

pytestmark = pytest.mark.operator("gated_ce_merge")

WIDTHS = [100, 20, 80]
IN_PLACE = pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])


def _shared_loss(logits: Tensor, labels: Tensor, widths: list[int], **options: Any) -> Tensor:
    """One loss with the gradient that all processes have together, each for its own columns."""
    vocab_size = options.pop("vocab_size", None)
    first, *others = (
        losses.loss
        for losses in losses_of_shards(shards_at(logits, widths, vocab_size), labels, **options)
    )
    return first + sum(loss - loss.detach() for loss in others)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", FIXED_GATES)
@pytest.mark.parametrize(
    ("widths", "vocab_size"),
    [([11], None), ([4, 7], None), ([3, 0, 5, 1], None), ([4, 4, 4], 7), ([2, 2], 3)],
    ids=str,
)
@pytest.mark.parametrize("num_rows", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_gradcheck(num_rows: int, widths: list[int], vocab_size: int | None, gate: str) -> None:
    words = sum(widths) if vocab_size is None else vocab_size
    logits, labels = make(num_rows, words, torch.float64, ignored=0.3)
    labels[0] = words - 1
    padding = torch.zeros(num_rows, sum(widths) - words, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return _shared_loss(x, labels, widths, k=4, gate=FIXED_GATES[gate], vocab_size=vocab_size)

    assert torch.autograd.gradcheck(loss, torch.cat([logits, padding], 1).requires_grad_())


@pytest.mark.usefixtures("route")
def test_gradcheck_of_views_and_of_a_loss_used_further() -> None:
    buffer = torch.randn(4, 3, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 8, -100], [3, 3, 5], [1, 7, 4]])

    def loss(x: Tensor) -> Tensor:
        return _shared_loss((2 * x)[1:].transpose(0, 1), labels, [4, 5], gate=NoGate()).exp()

    assert torch.autograd.gradcheck(loss, buffer)


GATES = [EntropyGate(), HardGate(0.5), lambda nll, entropy: entropy + 1]
PADDING = pytest.mark.parametrize(
    "vocab_size", [200, 190, 110], ids=["no_padding", "padding", "a_shard_of_padding"]
)


def _padded(dtype: torch.dtype, device: str, vocab_size: int) -> tuple[Tensor, Tensor]:
    logits, labels = make(12, vocab_size, dtype, device=device, ignored=0.2)
    return torch.nn.functional.pad(logits, (0, 200 - vocab_size), value=math.nan), labels


@PADDING
@pytest.mark.usefixtures("poisoned_memory", "route")
@pytest.mark.parametrize("gate", GATES, ids=["entropy", "hard", "callable"])
def test_in_place_gives_the_same_gradient(
    device: str, dtype: torch.dtype, vocab_size: int, gate: Any
) -> None:
    logits, labels = _padded(dtype, device, vocab_size)
    upstream = upstream_of(labels)
    out_of_place, in_place = (
        outcome_of_shards(
            logits,
            labels,
            upstream,
            WIDTHS,
            vocab_size=vocab_size,
            gate=gate,
            inplace_backward=inplace,
        )
        for inplace in (False, True)
    )
    for a, b in zip(in_place, out_of_place, strict=True):
        assert same_bits(a, b)


@PADDING
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("gate", GATES, ids=["entropy", "hard", "callable"])
def test_in_place_the_gradient_lies_in_the_shard(
    device: str, dtype: torch.dtype, vocab_size: int, at: int, gate: Any
) -> None:
    """And what is around it is left alone: the shard is a part of a larger buffer."""
    logits, labels = _padded(dtype, device, vocab_size)
    upstream = upstream_of(labels)
    options: dict[str, Any] = {"vocab_size": vocab_size, "gate": gate}
    expected = outcome_of_shards(logits, labels, upstream, WIDTHS, **options).gradient
    width = WIDTHS[at]
    buffer = torch.full((14, width + 7), 7.5, dtype=dtype, device=device)
    x = buffer[1:13, 5 : 5 + width]
    shards = shards_at(logits, WIDTHS, vocab_size)
    x.copy_(shards[at][0]).requires_grad_()
    shards[at] = (x, shards[at][1])
    version = x._version
    loss = losses_of_shards(shards, labels, gate=gate, inplace_backward=True)[at].loss
    assert x._version == version
    seen: list[int] = []
    # The address alone: who holds the gradient itself makes autograd copy it.
    x.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss.backward(upstream.to(loss.dtype))
    assert seen == [x.data_ptr()] and x._version > version
    wanted = expected.split(WIDTHS, -1)[at]
    assert x.grad is not None and same_bits(x.grad, wanted) and same_bits(x.detach(), wanted)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:13, 5 : 5 + width] = False
    assert (buffer[outside] == 7.5).all()


def _loss(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Of the process that has the middle one of three shards."""
    logits, _ = make(12, 200, device=x.device.type)
    shards = shards_at(logits, WIDTHS)
    shards[1] = (x, shards[1][1])
    return losses_of_shards(shards, labels, **options)[1].loss


@pytest.fixture
def labels(device: str) -> Tensor:
    return make(12, 200, device=device, ignored=0.2)[1]


@pytest.fixture
def shard(device: str) -> Tensor:
    return make(12, 200, device=device)[0][:, 100:120].clone().requires_grad_()


def _differentiate_twice(shard: Tensor, labels: Tensor, further: str, inplace: bool) -> None:
    loss = _loss(shard * 1, labels, inplace_backward=inplace).sum()
    (gradient,) = torch.autograd.grad(loss, shard, create_graph=True)
    if further == "backward":
        gradient.sum().backward()
    elif further == "grad":
        torch.autograd.grad(gradient.norm(), shard)
    else:
        (_loss(shard, labels).sum() + gradient.square().sum()).backward()


FURTHER = pytest.mark.parametrize("further", ["backward", "grad", "penalty"])


@FURTHER
@IN_PLACE
def test_no_second_derivative(shard: Tensor, labels: Tensor, inplace: bool, further: str) -> None:
    sentence = "create_graph" if inplace else "second derivative"
    with pytest.raises(RuntimeError, match=rf"^eaft_ext: .*{sentence}"):
        _differentiate_twice(shard, labels, further, inplace)


@FURTHER
@pytest.mark.usefixtures("without_kernels")
def test_no_second_derivative_without_kernels(further: str) -> None:
    """An error there too: not a term that is silently left out."""
    logits, labels = make(12, 200, ignored=0.2)
    shard = logits[:, 100:120].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"second derivative|differentiate twice"):
        _differentiate_twice(shard, labels, further, inplace=False)


@pytest.mark.usefixtures("route")
def test_create_graph_alone_is_no_error(shard: Tensor, labels: Tensor) -> None:
    (plain,) = torch.autograd.grad(_loss(shard, labels).sum(), shard)
    (kept,) = torch.autograd.grad(_loss(shard, labels).sum(), shard, create_graph=True)
    assert same_bits(kept, plain)


@pytest.mark.usefixtures("route")
def test_backward_twice_over_a_kept_graph(shard: Tensor, labels: Tensor) -> None:
    loss = _loss(shard, labels).sum()
    loss.backward(retain_graph=True)
    assert shard.grad is not None
    once = shard.grad.clone()
    loss.backward()
    torch.testing.assert_close(shard.grad, 2 * once)


def test_in_place_backward_twice_is_an_error(shard: Tensor, labels: Tensor) -> None:
    loss = _loss(shard, labels, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_producer_that_needs_its_output_is_not_overwritten(shard: Tensor, labels: Tensor) -> None:
    loss = _loss(shard.tanh(), labels, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", ["expanded", "vocabulary_first"])
def test_in_place_is_refused_in_the_forward(shard: Tensor, labels: Tensor, layout: str) -> None:
    """And not at all where there will be no backward."""
    x = shard[:1].expand(12, 20) if layout == "expanded" else shard.t().contiguous().t()
    with pytest.raises(ValueError, match=r"in place.*sizes \[12, 20\] and strides \["):
        _loss(x, labels, inplace_backward=True)
    expected = _loss(x, labels)
    assert same_bits(_loss(x.detach(), labels, inplace_backward=True), expected)
    with torch.no_grad():
        assert same_bits(_loss(x, labels, inplace_backward=True), expected)


@pytest.mark.usefixtures("route")
@IN_PLACE
def test_without_a_gradient(shard: Tensor, labels: Tensor, inplace: bool) -> None:
    expected = _loss(shard, labels)
    before = shard.detach().clone()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = _loss(shard, labels, inplace_backward=inplace)
        assert not loss.requires_grad and same_bits(loss, expected)
    loss = _loss(shard.detach(), labels, inplace_backward=inplace)
    assert not loss.requires_grad and same_bits(loss, expected)
    assert same_bits(shard, before)


@pytest.mark.usefixtures("route")
@IN_PLACE
def test_no_upstream_gradient(shard: Tensor, labels: Tensor, inplace: bool) -> None:
    """Zero times an infinite loss is a gradient of zero; and hooks may scale what there is."""
    with torch.no_grad():
        shard[3] = -math.inf
        labels[3] = 110
    losses = _loss(shard * 1, labels, inplace_backward=inplace, gate=NoGate())
    assert losses[3] == math.inf
    losses.backward(torch.zeros_like(losses))
    assert shard.grad is not None and not shard.grad.any()


@pytest.mark.usefixtures("route")
@IN_PLACE
def test_hooks_and_accumulation(shard: Tensor, labels: Tensor, inplace: bool) -> None:
    (expected,) = torch.autograd.grad(_loss(shard, labels).sum(), shard)
    for _ in range(2):
        x = shard * 1
        x.register_hook(lambda gradient: gradient * 3)
        _loss(x, labels, inplace_backward=inplace).sum().backward()
    assert shard.grad is not None
    torch.testing.assert_close(shard.grad, 6 * expected)


@pytest.mark.usefixtures("route")
def test_two_calls_in_one_graph(shard: Tensor, labels: Tensor) -> None:
    x = shard * 1
    total = _loss(x, labels).sum() + 2 * _loss(x, labels.flip(0), gate=NoGate()).sum()
    total.backward()
    parts = [
        torch.autograd.grad(_loss(shard, y, gate=gate).sum(), shard)[0]
        for y, gate in ((labels, EntropyGate()), (labels.flip(0), NoGate()))
    ]
    assert shard.grad is not None
    torch.testing.assert_close(shard.grad, parts[0] + 2 * parts[1])


@pytest.mark.usefixtures("route")
def test_the_loss_may_be_changed_in_place(shard: Tensor, labels: Tensor) -> None:
    (expected,) = torch.autograd.grad(_loss(shard, labels).sum() * 1.5, shard)
    logits, _ = make(12, 200, device=shard.device.type)
    shards = shards_at(logits, WIDTHS)
    shards[1] = (shard, shards[1][1])
    _, loss, stats = losses_of_shards(shards, labels)[1]
    before = stats.nll.clone()
    loss.mul_(3)
    loss /= 2
    loss.sum().backward()
    assert shard.grad is not None
    torch.testing.assert_close(shard.grad, expected)
    assert torch.equal(stats.nll, before)


@pytest.mark.parametrize("upstream", ["expanded", "strided"])
@pytest.mark.parametrize("vocab_size", [200, 110])
def test_upstream_gradients_of_any_stride(
    device: str, labels: Tensor, upstream: str, vocab_size: int
) -> None:
    logits, _ = make(12, 200, device=device)
    labels = torch.where(labels < 0, labels, labels % vocab_size)
    numbers = torch.linspace(-1, 2, 24, device=device)[::2]
    if upstream == "expanded":
        numbers = torch.full((1,), 2.5, device=device).expand(12)
    options: dict[str, Any] = {"widths": divide(200, 4), "vocab_size": vocab_size}
    found = outcome_of_shards(logits, labels, numbers, **options)
    expected = outcome_of_shards(logits, labels, numbers.contiguous(), **options)
    assert same_bits(found.gradient, expected.gradient)
