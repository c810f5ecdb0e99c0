"""What is compared where processes share the vocabulary: each has its part of the logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import eaft_ext

from .cases import Batch
from .contender import Build, Contender, Function, GradientRunner, imported
from .peers import distribution_version

OURS = "vocab_parallel_gated_ce"
INPLACE = f"{OURS}_inplace"
NO_GATE = f"{OURS}_no_gate"
MEGATRON = "megatron"
FUSED = "megatron_fused"
# Who computes the same as whom.
SAME = {INPLACE: OURS, MEGATRON: NO_GATE, FUSED: NO_GATE}
PEER, DISTRIBUTION = "megatron.core", "megatron-core"


def peer_version() -> str:
    return distribution_version(DISTRIBUTION)


class ShardRunner(GradientRunner):
    """A contender on this process's logits [s, b, V / world size] and labels [s, b]."""

    def leaves(self, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
        num_rows = batch.labels.numel()
        # Megatron's layout, two sequences beside each other.
        labels = batch.labels.view(-1, 2 if num_rows % 2 == 0 else 1)
        logits = self.source(batch).view(*labels.shape, -1)
        return [logits], labels, torch.linspace(0.5, 1.5, num_rows).view_as(labels)

    def kept(self, batch: Batch) -> list[str]:
        """The tensors as large as the logits that the graph keeps for the backward."""
        arguments = self.prepare(batch)
        ((logits,), *_) = arguments
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() >= logits.numel():
                found.setdefault(tensor.data_ptr(), tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = self.forward(arguments)
        unchanged = torch.equal(logits.detach().view_as(batch.logits), batch.logits)
        self.backward(result)

        def describe(tensor: Tensor) -> str:
            name = str(tensor.dtype).removeprefix("torch.")
            if tensor.data_ptr() != logits.data_ptr():
                return f"{name} beside the logits"
            return "the logits" if unchanged else f"{name} over the logits"

        return [describe(tensor) for tensor in found.values()]


def megatron_fused() -> Function:
    """The same with fewer exchanges, compiled; its gradient is always rounded to bfloat16."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return partial(fused_vocab_parallel_cross_entropy, tp_group=dist.group.WORLD)


def _ours(**options: Any) -> Build:
    loss: Callable[..., Any] = partial(eaft_ext.vocab_parallel_gated_ce, reduction="none")
    return lambda: partial(loss, group=dist.group.WORLD, **options)


def _peer(name: str, title: str, build: Build, **more: bool) -> Contender:
    # Float32 logits are overwritten by it.
    return Contender(name, title, build, ShardRunner, True, module=PEER, **more)


CONTENDERS = (
    Contender(OURS, "`vocab_parallel_gated_ce`", _ours(), ShardRunner),
    Contender(INPLACE, "the same in place", _ours(inplace_backward=True), ShardRunner, True),
    Contender(NO_GATE, "the same, no gate", _ours(gate=eaft_ext.NoGate()), ShardRunner),
    # PyTorch's operations one by one.
    _peer(
        MEGATRON, "Megatron-Core", imported(f"{PEER}.tensor_parallel:vocab_parallel_cross_entropy")
    ),
    _peer(FUSED, "Megatron-Core, fused", megatron_fused, compiles=True),
)
