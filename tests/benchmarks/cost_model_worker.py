"""A process of test_cost_model.py: ``cost_model_worker.py RANK WORLD_SIZE FOLDER``.

It makes each call anew for each of: what operators moved and sent, what was kept, and the peak.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from operand_bytes import Allocations, Operands
from spawned import work
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import eaft_ext
from eaft_ext.cli.bench import eager_eaft
from eaft_ext.parallel import _agreement

TOKENS, HIDDEN, CHUNK, K = 64, 48, 24, 20
# Words of each process: rows that begin at any address, and shards of three widths. What gloo
# allocates for a token is less than its logits.
OWN_WORDS = {1: [1003], 2: [1003, 1003], 3: [1003, 1330, 821], 4: [1003, 1003, 1003, 1003]}

Make = Callable[[], Callable[[], Tensor]]
"""Leaves without gradients; what it gives is the call on them."""


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).mul_(0.2)


class Calls:
    """All calls that so many processes can make, by name."""

    def __init__(self, rank: int, world_size: int) -> None:
        torch.manual_seed(0)
        self.world_size = world_size
        self.columns = OWN_WORDS[world_size][rank]
        self.start = sum(OWN_WORDS[world_size][:rank])
        self.words = sum(OWN_WORDS[world_size])
        self.labels = torch.randint(self.words, (TOKENS,))
        self.group = dist.group.WORLD
        self.groups = {self.group.group_name: "vocabulary"}
        self.told = {"group": self.group, "vocab_start": self.start, "vocab_size": self.words}

    def logits(self, **options: Any) -> Make:
        """The loss of this process's columns."""

        def make() -> Callable[[], Tensor]:
            logits = randn(TOKENS, self.columns).bfloat16().requires_grad_()
            if self.world_size == 1:
                return lambda: eaft_ext.gated_ce(logits, self.labels, **options)
            told = self.told | options
            return lambda: eaft_ext.vocab_parallel_gated_ce(logits, self.labels, **told)

        return make

    def linear(self, **options: Any) -> Make:
        """The loss of the hidden, and this process's rows of the weight."""
        options["chunk_size"] = CHUNK

        def make() -> Callable[[], Tensor]:
            hidden = randn(TOKENS, HIDDEN).requires_grad_()
            weight = randn(self.columns, HIDDEN).requires_grad_()
            if self.world_size == 1:
                return lambda: eaft_ext.linear_gated_ce(hidden, weight, self.labels, **options)
            told = self.told | options
            return lambda: eaft_ext.vocab_parallel_linear_gated_ce(
                hidden, weight, self.labels, **told
            )

        return make

    def output_layer(self) -> Callable[[], Tensor]:
        """The products alone: the gradient of the logits is there, and is not counted."""
        hidden = randn(TOKENS, HIDDEN).requires_grad_()
        weight = randn(self.columns, HIDDEN).requires_grad_()
        return lambda: _Given.apply(torch.nn.functional.linear(hidden, weight))

    def eager(self) -> Callable[[], Tensor]:
        """Operation by operation, on gathered rows."""
        logits = randn(TOKENS, self.columns).bfloat16().requires_grad_()

        def call() -> Tensor:
            whole = logits if self.world_size == 1 else _Gathered.apply(logits, self.group)
            return eager_eaft(whole, self.labels)

        return call

    def alone(self) -> Callable[[], Tensor]:
        """Tokens are divided: each process calls for its own, and knows how many all have."""
        logits = randn(TOKENS, self.columns).bfloat16().requires_grad_()
        labels = self.labels % self.columns
        return lambda: eaft_ext.gated_ce(logits, labels, num_items_in_batch=5 * TOKENS)

    def linear_alone(self) -> Callable[[], Tensor]:
        """The same with the output layer."""
        hidden = randn(TOKENS, HIDDEN).requires_grad_()
        weight = randn(self.columns, HIDDEN).requires_grad_()
        labels = self.labels % self.columns
        return lambda: eaft_ext.linear_gated_ce(
            hidden, weight, labels, num_items_in_batch=5 * TOKENS, chunk_size=CHUNK
        )

    def placed(self, **options: Any) -> Make:
        """Logits as a DTensor on two by two processes: rows divided, and the vocabulary."""
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "vocabulary"))
        self.groups |= {mesh.get_group(name).group_name: name for name in ("rows", "vocabulary")}
        of_all = self.labels % (2 * self.columns)
        labels = distribute_tensor(of_all, mesh, [Shard(0), Replicate()])

        def make() -> Callable[[], Tensor]:
            logits = distribute_tensor(
                randn(TOKENS, 2 * self.columns).bfloat16(), mesh, [Shard(0), Shard(1)]
            )
            logits.requires_grad_()
            return lambda: eaft_ext.gated_ce(logits, labels, **options)

        return make

    def sequence(self) -> Callable[[], Tensor]:
        """Hidden and weight as DTensors, the hidden divided by tokens among the same processes."""
        mesh = DeviceMesh.from_group(self.group, "cpu")
        hidden = distribute_tensor(randn(TOKENS, HIDDEN), mesh, [Shard(0)]).requires_grad_()
        weight = distribute_tensor(randn(self.words, HIDDEN), mesh, [Shard(0)]).requires_grad_()
        return lambda: eaft_ext.linear_gated_ce(hidden, weight, self.labels, chunk_size=CHUNK)


class _Gathered(torch.autograd.Function):
    """All columns, as Megatron-Core gathers them: each process takes its own of the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: Any) -> Tensor:
        ctx.rank, size = dist.get_rank(group), dist.get_world_size(group)
        ctx.columns = logits.size(1)
        c10d = torch.ops._c10d_functional
        parts = c10d.wait_tensor(c10d.all_gather_into_tensor(logits, size, group.group_name))
        return torch.cat(parts.chunk(size), dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.split(ctx.columns, dim=1)[ctx.rank].clone(), None


class _Given(torch.autograd.Function):
    """A loss whose gradient costs nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def _moved(make: Make, few: int, groups: dict[str, str]) -> dict[str, Any]:
    call = make()
    with Operands(few) as forward:
        loss = call()
    with Operands(few) as backward:
        loss.backward()
    return {
        "forward": forward.moved,
        "backward": backward.moved,
        "products": forward.products + backward.products,
        "sent forward": [(s.name, groups[s.group], s.given) for s in forward.sent],
        "sent backward": [(s.name, groups[s.group], s.given) for s in backward.sent],
    }


@contextmanager
def _patient() -> Iterator[None]:
    """Gloo's thread lets go of what it copied after it has said that it is done."""
    collectives = torch.ops._c10d_functional
    wait = collectives.wait_tensor

    def wait_longer(tensor: Tensor) -> Tensor:
        result = wait(tensor)
        time.sleep(0.02)
        return result

    with patch.object(collectives, "wait_tensor", wait_longer):
        yield


def _kept(make: Make) -> int:
    call = make()
    with _patient(), Allocations() as forward:
        loss = call()
    result = loss.to_local() if isinstance(loss, DTensor) else loss
    return forward.end - result.untyped_storage().nbytes()


def _peak(make: Make) -> int:
    call = make()
    with _patient(), Allocations() as both:
        call().backward()
    return both.peak


def measure(make: Make, few: int, groups: dict[str, str]) -> dict[str, Any]:
    """Of a forward and a backward: bytes that moved, were sent, and were allocated."""
    return _moved(make, few, groups) | {"kept": _kept(make), "peak": _peak(make)}


def notes(make: Make) -> list[int]:
    """The bytes of what a call writes into the store."""
    written: list[int] = []

    def dumps(note: Any) -> str:
        text = json.dumps(note)
        written.append(len(text))
        return text

    call = make()
    with patch.object(_agreement, "json", SimpleNamespace(dumps=dumps, loads=json.loads)):
        call()
    return written


def main(rank: int, world_size: int) -> dict[str, Any]:
    """All calls that so many processes can make."""
    calls = Calls(rank, world_size)
    cases: dict[str, Make] = {
        "logits": calls.logits(),
        "logits in place": calls.logits(inplace_backward=True),
        "linear": calls.linear(),
    }
    if world_size == 1:
        cases["logits in forward"] = calls.logits(gradient_in_forward=True)
        both = {"gradient_in_forward": True, "inplace_backward": True}
        cases["logits in forward in place"] = calls.logits(**both)
        cases["output layer"] = calls.output_layer
    else:
        cases["linear parts"] = calls.linear(reduce_hidden_gradient=False)
        cases["alone"], cases["linear alone"] = calls.alone, calls.linear_alone
    if world_size != 3:
        cases["eager"] = calls.eager
    if world_size in (2, 4):
        cases["linear sequence"] = calls.sequence
    if world_size == 4:
        cases["rows and vocabulary"] = calls.placed()
        cases["rows and vocabulary, counted"] = calls.placed(num_items_in_batch=5 * TOKENS)
    for make in cases.values():  # what is allocated once
        make()().backward()
    gc.collect()
    gc.freeze()  # modules and the like: later collections need not look at them again
    found: dict[str, Any] = {"columns": calls.columns}
    if world_size > 1:
        # Not at the end: where Python ends, gloo's thread must have let go of all that was sent.
        found["notes"] = notes(calls.logits()) + notes(calls.linear())
    # More than one number for each token and process.
    few = TOKENS * world_size
    return found | {name: measure(make, few, calls.groups) for name, make in cases.items()}


if __name__ == "__main__":
    work(main)
