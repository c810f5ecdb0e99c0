"""Imports eaft_ext, and again: ``import_again_worker.py WAY``, or a process of a group.

Exits with an error unless all operators work, those of both imports.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from spawned import work
from torch import Tensor
from torch import distributed as dist

import eaft_ext


def _ours() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "eaft_ext"]


def _forget(*names: str) -> None:
    for name in names:
        del sys.modules[name]


def _reload() -> None:
    for name in _ours():
        if not name.endswith("._C"):  # Python loads what is compiled once
            importlib.reload(sys.modules[name])


WAYS: dict[str, Callable[[], None]] = {
    "the package": lambda: _forget("eaft_ext"),
    "all modules": lambda: _forget(*_ours()),
    "all but the compiled one": lambda: _forget(*(n for n in _ours() if n != "eaft_ext._C")),
    "the operators alone": lambda: _forget("eaft_ext._registration", "eaft_ext.linear._operators"),
    "reload": _reload,
}


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (12, 77))
    labels = torch.randint(77, (12,), generator=generator)
    labels[3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def _losses(package: Any) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Of hidden, weight and labels: whatever has an operator with a gradient."""

    def topk(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        values: Tensor = package.topk(hidden @ weight.t(), 5)[0]
        return values.square().sum()

    return {
        "gated_ce": lambda h, w, y: package.gated_ce(h @ w.t(), y),
        "in place": lambda h, w, y: package.gated_ce(h @ w.t(), y, inplace_backward=True),
        "gradient in forward": lambda h, w, y: package.gated_ce(
            h @ w.t(), y, gradient_in_forward=True
        ),
        "linear_gated_ce": lambda h, w, y: package.linear_gated_ce(h, w, y, chunk_size=5),
        "linear_gated_ce per token": lambda h, w, y: (
            package.linear_gated_ce(h, w, y, chunk_size=5, reduction="none").sum() / 11
        ),
        "topk": topk,
    }


def expected_of(name: str) -> list[Tensor]:
    """Loss and gradients in float64, in plain PyTorch."""
    hidden, weight, labels = _inputs(torch.float64)
    logits = hidden @ weight.t()
    if name == "topk":
        loss = logits.topk(5).values.square().sum()
    else:
        loss = eaft_ext.reference.gated_ce(logits, labels)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


COMPILED = ("gated_ce", "linear_gated_ce", "topk")


def _check(package: Any) -> None:
    """Losses and gradients, eager and compiled."""
    for name, loss_of in _losses(package).items():
        compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
        for function in (loss_of, compiled) if name in COMPILED else (loss_of,):
            hidden, weight, labels = _inputs(torch.float32)
            loss = function(hidden, weight, labels)
            found = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
            for a, b in zip(found, expected_of(name), strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5, msg=name)


def _import_again(way: str) -> Any:
    WAYS[way]()
    again = importlib.import_module("eaft_ext")
    importlib.import_module("eaft_ext.linear._operators")
    return again


def check_way(way: str) -> None:
    """With a graph and a compiled function that are older than the second import."""
    hidden, weight, labels = _inputs(torch.float32)
    loss_of = _losses(eaft_ext)["linear_gated_ce"]
    compiled = torch.compile(loss_of, backend="aot_eager")
    older = [compiled(hidden, weight, labels), loss_of(hidden, weight, labels)]
    again = _import_again(way)
    _check(again)
    _check(eaft_ext)
    _, *expected = expected_of("linear_gated_ce")
    for loss in (*older, compiled(hidden, weight, labels)):
        for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def in_a_group(rank: int, world_size: int) -> list[Tensor]:
    """The first process imports again between two calls, and the others do not."""
    hidden, weight, labels = _inputs(torch.float32)
    shard = (hidden @ weight.t()).tensor_split(world_size, -1)[rank]
    start = sum(x.size(-1) for x in weight.t().tensor_split(world_size, -1)[:rank])
    losses = []
    package: Any = eaft_ext
    for call in range(3):
        if rank == 0 and call > 0:
            package = _import_again("all modules")
        loss = package.vocab_parallel_gated_ce(
            shard, labels, group=dist.group.WORLD, vocab_start=start, vocab_size=77
        )
        losses.append(loss.detach())
    return losses


if __name__ == "__main__":
    if len(sys.argv) > 2:
        work(in_a_group)
    else:
        check_way(sys.argv[1])
