"""torch.compile: one graph without breaks, for all sizes, with eager's results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import make
from parity import assert_same_stats
from torch import Tensor

from eaft_ext import FocalGate, GatedCrossEntropyLoss, gated_ce, topk

SIZES = [(5, 33), (12, 130), (8, 200), (31, 4100)]


@pytest.fixture(autouse=True)
def _one_graph() -> Iterator[None]:
    """Nothing is left of other tests, and a second compilation of a function is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def _compiled(function: Callable[..., Any], dynamic: bool = True) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")


def _both(
    function: Callable[..., Tensor], compiled: Callable[..., Tensor], logits: Tensor, *rest: Any
) -> None:
    found = []
    for one in (function, compiled):
        x = logits.clone().requires_grad_()
        loss = one(x * 1, *rest)
        loss.sum().backward()
        found.append((loss.detach(), x.grad))
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-7)


CALLS: dict[str, Callable[..., Tensor]] = {
    "default": lambda x, y: gated_ce(x, y),
    "none": lambda x, y: gated_ce(x, y, 8, reduction="none"),
    "focal_sum": lambda x, y: gated_ce(x, y, gate=FocalGate(2.0), reduction="sum"),
    "shorthand": lambda x, y: gated_ce(x, y, alpha=2.0, normalizer=3.0),
    "callable": lambda x, y: gated_ce(x, y, gate=lambda nll, entropy: (-nll).exp() * entropy),
    "in_place": lambda x, y: gated_ce(x, y, inplace_backward=True),
    "cut_off": lambda x, y: gated_ce(x[:-1], y[1:]),
}


@pytest.mark.parametrize("call", CALLS)
def test_one_graph_for_all_sizes(device: str, call: str) -> None:
    compiled = _compiled(CALLS[call])
    for num_rows, vocab_size in SIZES:
        logits, labels = make(num_rows, vocab_size, device=device, ignored=0.2)
        _both(CALLS[call], compiled, logits, labels)


def test_a_second_graph_is_an_error() -> None:
    """What the tests here rely on."""
    compiled = _compiled(CALLS["default"], dynamic=False)
    compiled(*make(5, 33))
    with pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(*make(6, 34))


@pytest.mark.parametrize("kind", ["tensor", "int"])
def test_count_of_items(device: str, kind: str) -> None:
    """A new count is no new graph."""

    def function(x: Tensor, y: Tensor, count: Any) -> Tensor:
        return gated_ce(x, y, num_items_in_batch=count)

    compiled = _compiled(function)
    for count, (num_rows, vocab_size) in enumerate(SIZES, 7):
        logits, labels = make(num_rows, vocab_size, device=device, ignored=0.2)
        given = torch.tensor(count, device=device) if kind == "tensor" else count
        _both(function, compiled, logits, labels, given)


def test_stats(device: str) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        loss, stats = gated_ce(x, y, return_stats=True)
        return loss, stats, stats.gate.mean()

    compiled = _compiled(function)
    for num_rows, vocab_size in SIZES:
        logits, labels = make(num_rows, vocab_size, device=device, ignored=0.2)
        logits.requires_grad_()
        eager, other = function(logits, labels), compiled(logits, labels)
        torch.testing.assert_close(other[0], eager[0])
        assert type(other[1]) is type(eager[1])
        assert_same_stats(other[1], eager[1])
        assert not any(stat.requires_grad for stat in other[1] if stat is not None)
        assert torch.equal(other[2], eager[2])


def test_topk(device: str) -> None:
    compiled = _compiled(lambda x: topk(x, 7))
    for num_rows, vocab_size in SIZES:
        logits, _ = make(num_rows, vocab_size, device=device)
        for a, b in zip(compiled(logits), topk(logits, 7), strict=True):
            assert torch.equal(a, b)


def test_half_precision_module_under_autocast(device: str) -> None:
    model = torch.nn.Linear(16, 200, device=device)
    criterion = GatedCrossEntropyLoss(k=8)
    hidden = torch.randn(12, 16, device=device)
    _, labels = make(12, 200, device=device, ignored=0.2)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return criterion(model(x), y)

    compiled = _compiled(step)
    eager, other = step(hidden, labels), compiled(hidden, labels)
    assert other.dtype == torch.float32
    torch.testing.assert_close(other, eager)
    other.backward()
    assert model.weight.grad is not None and model.weight.grad.any()


@pytest.mark.parametrize(
    "inplace",
    [
        pytest.param(False, id="out_of_place"),
        pytest.param(True, id="in_place", marks=pytest.mark.slow),
    ],
)
def test_inductor(device: str, inplace: bool) -> None:
    """Real code around the operators, in one training step: the logits' strides must hold."""
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU; install g++")
    weight = torch.randn(130, 16, device=device)
    _, labels = make(24, 130, device=device, ignored=0.2)
    labels = labels.view(4, 6)

    def step(hidden: Tensor) -> Tensor:
        logits = (hidden @ weight.T).tanh() * 5
        return gated_ce(logits[:, :-1], labels[:, 1:], inplace_backward=inplace)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    hidden = torch.randn(4, 6, 16, device=device)
    found = []
    for one in (step, compiled):
        x = hidden.clone().requires_grad_()
        loss = one(x)
        loss.backward()
        found.append((loss.detach(), x.grad))
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)
