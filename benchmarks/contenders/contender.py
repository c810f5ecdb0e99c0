"""A contender, and its call in two steps, forward and backward."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import DTYPES, Batch, Case

Function = Callable[..., Any]
Build = Callable[[], Function]
CPU, GPU = ("cpu",), ("cuda",)
ANY = CPU + GPU
# The first words of the names of what calls this package.
OURS = ("gated_ce", "linear_gated_ce", "single_pass", "operators", "vocab_parallel_gated_ce")


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
    build: Build
    runner: "type[Runner]"
    overwrites_logits: bool = False
    devices: tuple[str, ...] = ANY
    module: str = ""
    compiles: bool = False
    shape: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = DTYPES

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    def make_runner(self) -> Any:
        return self.runner(self)

    def takes_part(self, case: Case, device: str) -> bool:
        """Whether it is measured in a case on a device, if it can be."""
        is_its_shape = self.shape in (None, (case.num_rows, case.vocab_size))
        return is_its_shape and device in self.devices and case.dtype in self.dtypes


def imported(name: str) -> Build:
    """How to build another project's function, or module."""

    def build() -> Function:
        found = pkgutil.resolve_name(name)
        return found() if isinstance(found, type) else found

    return build


def plain(function: Function) -> Build:
    return lambda: function


class Runner:
    """A contender's function, and its call on a batch in two steps.

    ``prepare``, which is not timed, makes a leaf of the logits, without a gradient yet, so that
    nothing is accumulated. ``forward`` gives what ``backward`` needs, which is ``.backward()`` of
    the loss.
    """

    has_backward = True
    is_loss = True
    # Of an outcome.
    parts: tuple[str, ...] = ("loss", "gradient")

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.name = contender.name
        self.function = contender.build()

    def source(self, batch: Batch) -> Tensor:
        """The logits, or a copy of them for who overwrites them."""
        return batch.workspace if self.contender.overwrites_logits else batch.logits

    def prepare(self, batch: Any) -> Any:
        return self.source(batch).detach().requires_grad_(), batch.labels

    def forward(self, arguments: Any) -> Any:
        return self.function(*arguments)

    def backward(self, result: Any) -> Any:
        """The gradient, to be held while memory is measured."""
        result.backward()

    def outcome(self, batch: Any) -> tuple[Tensor, ...] | None:
        """Loss and gradients, to be compared between contenders; None where there are none.

        What the batch's logits are overwritten with stays in its workspace.
        """
        arguments = self.prepare(batch)
        loss = self.forward(arguments)
        self.backward(loss)
        return loss.detach(), arguments[0].grad


class GradientRunner(Runner):
    """Of leaves that stand in for a model's tensors.

    :func:`torch.autograd.grad` hands their gradients on, as a model's backward would, where
    ``.backward()`` would copy those that it cannot keep, for some contenders and not for others.
    """

    def leaves(self, batch: Any) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """What gradients are wanted of, labels, and the gradient of the loss if it is no scalar."""
        raise NotImplementedError

    def prepare(self, batch: Any) -> Any:
        leaves, labels, upstream = self.leaves(batch)
        return [leaf.detach().requires_grad_() for leaf in leaves], labels, upstream

    def forward(self, arguments: Any) -> Any:
        leaves, labels, upstream = arguments
        return leaves, upstream, self.function(*leaves, labels)

    def backward(self, result: Any) -> tuple[Tensor, ...]:
        leaves, upstream, loss = result
        return torch.autograd.grad(loss, leaves, upstream)

    def outcome(self, batch: Any) -> tuple[Tensor, ...]:
        result = self.forward(self.prepare(batch))
        return result[-1].detach(), *self.backward(result)


class BareRunner(Runner):
    """Of what records no graph and has one step: a copy, products, an operator."""

    has_backward = False
    is_loss = False

    def prepare(self, batch: Any) -> Any:
        return batch.logits, batch.workspace

    def outcome(self, batch: Any) -> tuple[Tensor, ...] | None:
        return None
