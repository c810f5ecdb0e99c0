"""What is compared on logits: plain copies of them, and losses with their backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import eaft_ext
from eaft_ext.cli.bench import eager_eaft

from . import peers
from .cases import IGNORED, Batch
from .contender import ANY, CPU, GPU, BareRunner, Build, Contender, Function, Runner, plain

ops = torch.ops.eaft_ext

# What k costs is measured where the bounds are held, by the operators alone.
SWEEP_SHAPE = (8192, 151_936)
SWEEP = {k: f"operators_k{k}" for k in (2, 8, 20, 64, 128)}
# In order of worth: time may be short.
SHAPES = {
    "cpu": ((512, 151_936), (2048, 50_257), (4, 151_936)),
    "cuda": (
        SWEEP_SHAPE,
        (8192, 128_256),
        (4096, 262_144),
        (16384, 32_000),
        (64, 151_936),
        (1, 151_936),
    ),
}


class SinglePassRunner(BareRunner):
    """The operator that gives the losses and the gradient at once, for the mean of all tokens."""

    is_loss = True

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """No graph is recorded."""
        return batch.logits, batch.labels

    def outcome(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean is over all tokens, and is scaled here to be over those that count."""
        loss, *_, gradient = self.forward(self.prepare(batch))
        valid = batch.labels != IGNORED
        return loss.sum() / valid.sum(), gradient.mul_(valid.numel() / valid.sum())


class OperatorRunner(Runner):
    """The operators alone, without autograd and without the reduction of the losses.

    The forward leaves in its result what the backward needs.
    """

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """No graph is recorded."""
        return batch.logits, batch.labels

    def forward(self, arguments: tuple[Tensor, Tensor]) -> Any:
        """The losses and statistics, after the arguments."""
        return *arguments, *self.function(*arguments)

    def backward(self, result: Any) -> Any:
        """The gradient of the sum of the losses."""
        logits, labels, _, _, _, gate, row_max, log_sum = result
        return ops.gated_ce_backward(gate, logits, labels, row_max, log_sum, IGNORED)

    def outcome(self, batch: Batch) -> None:
        """They are what ``gated_ce`` is made of."""


def options(k: int) -> tuple[Any, ...]:
    """What the operators take after the labels, with EAFT's gate."""
    gate = eaft_ext.EntropyGate()
    return k, gate.name, gate.parameters(), IGNORED


def forward_operator(k: int) -> Function:
    """``gated_ce_forward``."""
    return lambda logits, labels: ops.gated_ce_forward(logits, labels, *options(k))


def single_pass() -> Function:
    """``gated_ce_forward_with_grad``, for the mean of the losses."""

    def function(logits: Tensor, labels: Tensor) -> Any:
        upstream = torch.full(labels.shape, 1 / len(labels), device=labels.device)
        return ops.gated_ce_forward_with_grad(upstream, logits, labels, *options(20))

    return function


def _ours(name: str, title: str, devices: tuple[str, ...] = ANY, **how: Any) -> Contender:
    build = plain(partial(eaft_ext.gated_ce, **how))
    return Contender(name, title, build, Runner, "inplace_backward" in how, devices)


def _peer(name: str, title: str, build: Build, module: str, **more: bool) -> Contender:
    return Contender(name, title, build, Runner, devices=GPU, module=module, **more)


IN_PLACE = {"inplace_backward": True}
IN_FORWARD = {"gradient_in_forward": True}
CONTENDERS = (
    Contender("copy", "copy into existing memory", plain(lambda x, y: y.copy_(x)), BareRunner),
    # Elsewhere the allocator keeps what was freed.
    Contender(
        "clone", "copy into fresh memory", plain(lambda x, _: x.clone()), BareRunner, devices=CPU
    ),
    _ours("gated_ce", "`gated_ce`"),
    _ours("gated_ce_inplace", "`gated_ce`, in place", **IN_PLACE),
    _ours("gated_ce_fused", "`gated_ce`, gradient in forward", GPU, **IN_FORWARD),
    _ours(
        "gated_ce_fused_inplace",
        "`gated_ce`, gradient in forward, in place",
        GPU,
        **IN_FORWARD,
        **IN_PLACE,
    ),
    Contender(
        "single_pass", "`gated_ce_forward_with_grad`", single_pass, SinglePassRunner, devices=GPU
    ),
    Contender("cross_entropy", "`F.cross_entropy`", plain(F.cross_entropy), Runner),
    Contender("eager", "eager EAFT", plain(eager_eaft), Runner),
    Contender(
        "compiled",
        "compiled EAFT",
        lambda: torch.compile(eager_eaft, dynamic=False),
        Runner,
        compiles=True,
    ),
    _peer(
        "liger",
        "Liger-Kernel, no gate, in place",
        peers.liger,
        "liger_kernel",
        overwrites_logits=True,
    ),
    _peer("quack", "QuACK, no gate", peers.quack, "quack", compiles=True),
    _peer("flash_attn", "flash-attn, no gate", peers.flash_attn, "flash_attn"),
    _peer(
        "transformer_engine",
        "Transformer Engine, no gate",
        peers.transformer_engine,
        "transformer_engine",
        overwrites_logits=True,
    ),
    *(
        Contender(
            name,
            f"operators, K = {k}",
            partial(forward_operator, k),
            OperatorRunner,
            devices=GPU,
            shape=SWEEP_SHAPE,
        )
        for k, name in SWEEP.items()
    ),
)
