"""What is compared: plain copies of the logits, and losses with their backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peers
import torch
import torch.nn.functional as F
from cases import DTYPES, IGNORED, Batch, Case
from torch import Tensor

import eaft_ext
from eaft_ext.cli.bench import eager_eaft

Function = Callable[..., Any]
ops = torch.ops.eaft_ext


class Runner:
    """A contender's function, and its call on a batch in two steps.

    ``forward`` is the call of the loss on logits that require a gradient, ``backward`` is
    ``.backward()`` of the scalar that it returned. The leaf is made by ``prepare`` and has no
    gradient yet, so nothing is accumulated.
    """

    has_backward = True

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._function = contender.build()

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The arguments of ``forward``; not part of what is timed."""
        source = batch.workspace if self.contender.overwrites_logits else batch.logits
        return source.detach().requires_grad_(), batch.labels

    def forward(self, arguments: tuple[Tensor, Tensor]) -> Any:
        """The loss."""
        return self._function(*arguments)

    def backward(self, result: Any) -> Any:
        """The gradient of the loss, into the leaf."""
        result.backward()

    def outcome(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """The loss and the gradient, to be compared between contenders; None where there are none.

        What the batch's logits are overwritten with stays in its workspace.
        """
        arguments = self.prepare(batch)
        loss = self.forward(arguments)
        self.backward(loss)
        gradient = arguments[0].grad
        assert gradient is not None, "a leaf has a gradient after its backward"
        return loss.detach(), gradient


class CopyRunner(Runner):
    """A copy of (source, target)."""

    has_backward = False

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """From the logits to the workspace."""
        return batch.logits, batch.workspace

    def outcome(self, batch: Batch) -> None:
        """A copy has neither."""


class SinglePassRunner(Runner):
    """The operator that gives the losses and the gradient at once, for the mean of all tokens."""

    has_backward = False

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
        return *arguments, *self._function(*arguments)

    def backward(self, result: Any) -> Any:
        """The gradient of the sum of the losses."""
        logits, labels, _, _, _, gate, row_max, log_sum = result
        return ops.gated_ce_backward(gate, logits, labels, row_max, log_sum, IGNORED)

    def outcome(self, batch: Batch) -> None:
        """They are what ``gated_ce`` is made of."""


def forward_operator(k: int) -> Function:
    """``gated_ce_forward`` with EAFT's gate."""
    gate = eaft_ext.EntropyGate()
    options = (k, gate.name, gate.parameters(), IGNORED)
    return lambda logits, labels: ops.gated_ce_forward(logits, labels, *options)


def single_pass() -> Function:
    """``gated_ce_forward_with_grad`` with EAFT's gate, for the mean of the losses."""
    gate = eaft_ext.EntropyGate()
    options = (20, gate.name, gate.parameters(), IGNORED)

    def function(logits: Tensor, labels: Tensor) -> Any:
        upstream = torch.full(labels.shape, 1 / len(labels), device=labels.device)
        return ops.gated_ce_forward_with_grad(upstream, logits, labels, *options)

    return function


def plain_function(function: Function) -> Callable[[], Function]:
    """How to build what needs no building."""
    return lambda: function


@dataclass(frozen=True)
class Contender:
    """A loss of (logits, labels), or a copy of (source, target).

    ``build`` makes the function anew, so that what is compiled is compiled for one case alone.
    ``module`` is what must be installed for it, ``compiles`` whether its first call takes long, and
    ``shape`` the only shape that it is measured at; such contenders stand in a table of their own.
    It is measured in ``dtypes``.
    """

    name: str
    title: str
    build: Callable[[], Function]
    runner: type[Runner] = Runner
    overwrites_logits: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str = ""
    compiles: bool = False
    shape: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = DTYPES

    @property
    def is_loss(self) -> bool:
        """Whether it is not a copy."""
        return self.runner is not CopyRunner

    @property
    def is_ours(self) -> bool:
        """Whether it calls this package."""
        return self.name.startswith(("gated_ce", "linear_gated_ce", "single_pass", "operators"))

    def make_runner(self) -> Runner:
        """Build its function, to be called."""
        return self.runner(self)

    def takes_part(self, case: Case, device: str) -> bool:
        """Whether it is measured in a case on a device, if it can be."""
        is_its_shape = self.shape in (None, (case.num_rows, case.vocab_size))
        return is_its_shape and device in self.devices and case.dtype in self.dtypes


# What k costs is measured where the bounds are held, by the operators alone.
SWEEP_SHAPE = (8192, 151_936)
SWEEP = {k: f"operators_k{k}" for k in (2, 8, 20, 64, 128)}
GPU = ("cuda",)

CONTENDERS = (
    Contender(
        "copy",
        "copy into existing memory",
        plain_function(lambda source, target: target.copy_(source)),
        CopyRunner,
    ),
    Contender(
        "clone",
        "copy into fresh memory",
        plain_function(lambda source, _: source.clone()),
        CopyRunner,
        devices=("cpu",),  # elsewhere the allocator keeps what was freed
    ),
    Contender("gated_ce", "`gated_ce`", plain_function(eaft_ext.gated_ce)),
    Contender(
        "gated_ce_inplace",
        "`gated_ce`, in place",
        plain_function(partial(eaft_ext.gated_ce, inplace_backward=True)),
        overwrites_logits=True,
    ),
    Contender(
        "gated_ce_fused",
        "`gated_ce`, gradient in forward",
        plain_function(partial(eaft_ext.gated_ce, gradient_in_forward=True)),
        devices=GPU,
    ),
    Contender(
        "gated_ce_fused_inplace",
        "`gated_ce`, gradient in forward, in place",
        plain_function(partial(eaft_ext.gated_ce, gradient_in_forward=True, inplace_backward=True)),
        overwrites_logits=True,
        devices=GPU,
    ),
    Contender(
        "single_pass",
        "`gated_ce_forward_with_grad`",
        single_pass,
        SinglePassRunner,
        devices=GPU,
    ),
    Contender("cross_entropy", "`F.cross_entropy`", plain_function(F.cross_entropy)),
    Contender("eager", "eager EAFT", plain_function(eager_eaft)),
    Contender(
        "compiled",
        "compiled EAFT",
        lambda: torch.compile(eager_eaft, dynamic=False),
        compiles=True,
    ),
    Contender(
        "liger",
        "Liger-Kernel, no gate, in place",
        peers.liger,
        overwrites_logits=True,
        devices=GPU,
        module="liger_kernel",
    ),
    Contender(
        "quack",
        "QuACK, no gate",
        peers.quack,
        devices=GPU,
        module="quack",
        compiles=True,
    ),
    Contender(
        "flash_attn",
        "flash-attn, no gate",
        peers.flash_attn,
        devices=GPU,
        module="flash_attn",
    ),
    Contender(
        "transformer_engine",
        "Transformer Engine, no gate",
        peers.transformer_engine,
        overwrites_logits=True,
        devices=GPU,
        module="transformer_engine",
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
