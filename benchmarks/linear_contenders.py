"""What is compared where the output layer is part of the loss; each gives both its gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
import torch.nn.functional as F
from cases import IGNORED, Case, LinearBatch, LinearCase
from contenders import CONTENDERS, GPU, Contender, Function, Runner
from contenders import plain_function as plain
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import eaft_ext
from eaft_ext.cli.bench import eager_eaft, eager_eaft_sum
from eaft_ext.linear._chunks import default_chunk_size

PRODUCTS = "products"
OURS = "linear_gated_ce"
FLOAT32 = f"{OURS}_float32"
NO_GATE = f"{OURS}_no_gate"
UNFUSED = "gated_ce_of_linear"
UNFUSED_INPLACE = f"{UNFUSED}_inplace"
EAGER = "eager"
CHUNKED = "chunked_eager"
COMPILED = "chunked_compiled"
LIGER = "liger_linear"
CUT = "cut_cross_entropy"
# Who computes the same as whom.
SAME = {
    **dict.fromkeys((OURS, FLOAT32, UNFUSED, UNFUSED_INPLACE, EAGER, COMPILED), CHUNKED),
    **dict.fromkeys((LIGER, CUT), NO_GATE),
}


class LinearRunner(Runner):
    """A contender on hidden, weight and labels.

    The leaves stand in for a model's tensors: :func:`torch.autograd.grad` hands their gradients on,
    where ``.backward()`` would copy those that it cannot keep.
    """

    def prepare(self, batch: LinearBatch) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Hidden and weight as leaves without a gradient, and the labels."""
        leaves = [tensor.detach().requires_grad_() for tensor in (batch.hidden, batch.weight)]
        return *leaves, batch.labels

    def forward(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The loss, after what its backward needs."""
        hidden, weight, _ = arguments
        return hidden, weight, self._function(*arguments)

    def backward(self, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of hidden and weight."""
        hidden, weight, loss = result
        return torch.autograd.grad(loss, (hidden, weight))

    def outcome(self, batch: LinearBatch) -> Any:  # type: ignore[override]
        """The loss, and the gradients of hidden and weight."""
        result = self.forward(self.prepare(batch))
        return result[-1].detach(), *self.backward(result)


class ProductsRunner(LinearRunner):
    """The products that no loss of a whole batch can do without, and nothing between them."""

    has_backward = False

    def prepare(self, batch: LinearBatch) -> tuple[Tensor, ...]:  # type: ignore[override]
        """No graph is recorded."""
        return batch.hidden, batch.weight

    def forward(self, arguments: tuple[Tensor, ...]) -> Any:
        """What would be the gradients if the logits were their own."""
        return self._function(*arguments)

    def outcome(self, batch: LinearBatch) -> None:  # type: ignore[override]
        """There is no loss."""


def products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the whole batch, and their products with the weight and with the hidden."""
    logits = torch.mm(hidden, weight.t())
    return torch.mm(logits, weight), torch.mm(logits.t(), hidden)


def of_logits(loss: Function) -> Callable[[], Function]:
    """How to build a loss of all logits."""
    return lambda: lambda hidden, weight, labels: loss(F.linear(hidden, weight), labels)


def chunk_tokens(case: Case, device: str) -> int:
    """How many tokens ours has in a chunk if none is ignored."""
    row_bytes = case.logits_bytes // case.num_rows
    return default_chunk_size(case.num_rows, row_bytes, torch.device(device))


def chunked(of_chunk: Function) -> Function:
    """A loss as training frameworks chunk it, in chunks as long as ours.

    ``of_chunk`` gives the sum of the losses of some tokens. The logits of a chunk are dropped after
    its forward, and computed anew for its backward.
    """

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        row_bytes = len(weight) * hidden.element_size()
        size = default_chunk_size(len(hidden), row_bytes, hidden.device)
        total = torch.zeros((), device=hidden.device)
        for rows, targets in zip(hidden.split(size), labels.split(size), strict=True):
            total = total + checkpoint(
                of_chunk, rows, weight, targets, use_reentrant=False, preserve_rng_state=False
            )
        return total / (labels != IGNORED).sum()

    return function


def linear_eaft_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of EAFT's losses of some tokens, operation by operation."""
    return eager_eaft_sum(F.linear(hidden, weight), labels)


def ours(**options: Any) -> Callable[[], Function]:
    """How to build our loss."""
    return plain(partial(eaft_ext.linear_gated_ce, **options))


LINEAR_CONTENDERS = (
    Contender(PRODUCTS, "three bare products", plain(products), ProductsRunner),
    Contender(OURS, "`linear_gated_ce`", ours(), LinearRunner),
    Contender(
        FLOAT32,
        "the same, summed in float32",
        ours(accumulate_in_float32=True),
        LinearRunner,
        dtypes=("bfloat16",),
    ),
    Contender(
        NO_GATE,
        "the same, no gate",
        ours(gate=eaft_ext.NoGate()),
        LinearRunner,
        devices=GPU,  # as its peers
    ),
    Contender(UNFUSED, "`gated_ce` of all logits", of_logits(eaft_ext.gated_ce), LinearRunner),
    Contender(
        UNFUSED_INPLACE,
        "the same, in place",
        of_logits(partial(eaft_ext.gated_ce, inplace_backward=True)),
        LinearRunner,
    ),
    Contender(EAGER, "eager EAFT of all logits", of_logits(eager_eaft), LinearRunner),
    Contender(CHUNKED, "eager EAFT in chunks", plain(chunked(linear_eaft_sum)), LinearRunner),
    Contender(
        COMPILED,
        "compiled EAFT in chunks",
        lambda: chunked(torch.compile(linear_eaft_sum, dynamic=False)),
        LinearRunner,
        devices=GPU,
        compiles=True,
    ),
    Contender(
        LIGER,
        "Liger-Kernel, no gate",
        peers.liger_linear,
        LinearRunner,
        devices=GPU,
        module="liger_kernel",
    ),
    Contender(
        CUT,
        "cut-cross-entropy, no gate",
        peers.cut_cross_entropy,
        LinearRunner,
        devices=GPU,
        module="cut_cross_entropy",
        dtypes=("bfloat16",),
    ),
)


def contenders_of(case: Case) -> tuple[Contender, ...]:
    """All that may be measured in such a case."""
    return LINEAR_CONTENDERS if isinstance(case, LinearCase) else CONTENDERS
