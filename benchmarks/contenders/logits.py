"""What is compared on logits: plain copies of them, and losses with their backward."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import eaft_ext
from eaft_ext.cli.bench import eager_eaft

from . import peers
from .cases import IGNORED, Batch
from .contender import ANY, GPU, BareRunner, Build, Contender, Function, Runner, imported, plain

ops = torch.ops.eaft_ext

# What k costs is measured where the bounds are held, by the operators alone.
# The vocabulary of Qwen3.
QWEN = 151_936
SWEEP_SHAPE = (8192, QWEN)
SWEEP = {k: f"operators_k{k}" for k in (2, 8, 20, 64, 128)}
# In order of worth: time may be short.
SHAPES = {
    "cpu": ((512, QWEN), (2048, 50_257), (4, QWEN)),
    "cuda": (SWEEP_SHAPE, (8192, 128_256), (4096, 2**18), (16384, 32_000), (64, QWEN), (1, QWEN)),
}


class SinglePassRunner(BareRunner):
    """The operator that gives the losses and the gradient at once, for the mean of all tokens."""

    is_loss = True

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.logits, batch.labels

    def outcome(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean is over all tokens, and is scaled here to be over those that count."""
        loss, *_, gradient = self.forward(self.prepare(batch))
        valid = batch.labels != IGNORED
        return loss.sum() / valid.sum(), gradient.mul_(valid.numel() / valid.sum())


class OperatorRunner(SinglePassRunner):
    """The operators that ``gated_ce`` is made of, without autograd and the reduction of the losses.

    The forward leaves in its result what the backward needs.
    """

    has_backward = True

    def forward(self, arguments: tuple[Tensor, Tensor]) -> Any:
        return *arguments, *self.function(*arguments)

    def backward(self, result: Any) -> Tensor:
        logits, labels, _, _, _, gate, row_max, log_sum, _ = result
        return ops.gated_ce_backward(gate, logits, labels, row_max, log_sum, IGNORED)

    def outcome(self, batch: Batch) -> None:  # type: ignore[override]
        pass


def operator(op: Function, k: int) -> Function:
    """An operator with EAFT's gate, which is made once."""
    gate = eaft_ext.EntropyGate()
    options = (k, gate.name, gate.parameters(), IGNORED)
    return lambda *tensors: op(*tensors, *options)


def single_pass() -> Function:
    """For the mean of the losses."""
    forward = operator(ops.gated_ce_forward_with_grad, 20)

    def function(logits: Tensor, labels: Tensor) -> Any:
        upstream = torch.full(labels.shape, 1 / len(labels), device=labels.device)
        return forward(upstream, logits, labels)

    return function


def _ours(name: str, title: str, devices: tuple[str, ...] = ANY, **how: Any) -> Contender:
    build = plain(partial(eaft_ext.gated_ce, **how))
    return Contender(name, title, build, Runner, "inplace_backward" in how, devices)


def _peer(name: str, title: str, build: Build, module: str = "", **more: bool) -> Contender:
    return Contender(name, title, build, Runner, devices=GPU, module=module or name, **more)


_on_gpu = partial(Contender, devices=GPU)
COMPILE = partial(torch.compile, eager_eaft, dynamic=False)
IN_PLACE = {"inplace_backward": True}
IN_FORWARD = {"gradient_in_forward": True}
FUSED = "`gated_ce`, gradient in forward"
LIGER = imported("liger_kernel.transformers:LigerCrossEntropyLoss")
FLASH_ATTN = imported("flash_attn.losses.cross_entropy:CrossEntropyLoss")
TRITON = "transformer_engine"
OVERWRITES = {"overwrites_logits": True}
CONTENDERS = (
    Contender("copy", "copy into existing memory", plain(lambda x, y: y.copy_(x)), BareRunner),
    # Elsewhere the allocator keeps what was freed.
    Contender(
        "clone",
        "copy into fresh memory",
        plain(lambda x, _: x.clone()),
        BareRunner,
        devices=("cpu",),
    ),
    _ours("gated_ce", "`gated_ce`"),
    _ours("gated_ce_inplace", "`gated_ce`, in place", **IN_PLACE),
    _ours("gated_ce_fused", FUSED, GPU, **IN_FORWARD),
    _ours("gated_ce_fused_inplace", f"{FUSED}, in place", GPU, **IN_FORWARD, **IN_PLACE),
    _on_gpu("single_pass", "`gated_ce_forward_with_grad`", single_pass, SinglePassRunner),
    Contender("cross_entropy", "`F.cross_entropy`", plain(F.cross_entropy), Runner),
    Contender("eager", "eager EAFT", plain(eager_eaft), Runner),
    Contender("compiled", "compiled EAFT", COMPILE, Runner, compiles=True),
    # One kernel writes the gradient over the logits in the forward.
    _peer("liger", "Liger-Kernel, no gate, in place", LIGER, "liger_kernel", **OVERWRITES),
    # CuTe kernels, a row on chip in a cluster of blocks.
    _peer("quack", "QuACK, no gate", imported("quack:cross_entropy"), compiles=True),
    # In Triton, as the next one.
    _peer("flash_attn", "flash-attn, no gate", FLASH_ATTN),
    _peer(TRITON, "Transformer Engine, no gate", peers.transformer_engine, **OVERWRITES),
    *(
        _on_gpu(name, f"operators, K = {k}", build, OperatorRunner, shape=SWEEP_SHAPE)
        for k, name in SWEEP.items()
        for build in [partial(operator, ops.gated_ce_forward, k)]
    ),
)
# Who computes the same as whom.
SAME = {
    c.name: "cross_entropy" if c.module else "eager"
    for c in CONTENDERS
    if c.runner.is_loss and c.shape is None and c.name not in ("eager", "cross_entropy")
}
