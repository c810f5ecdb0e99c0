"""What is compared: plain copies of the logits, and losses with their backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from cases import Batch
from torch import Tensor

import eaft_ext

Function = Callable[[Tensor, Tensor], Tensor]


def eager_eaft(logits: Tensor, labels: Tensor, k: int = 20) -> Tensor:
    """EAFT's loss as training frameworks write it: the kernels' formula, operation by operation.

    They also gather the rows that are not ignored; there is none to leave out here.
    """
    logits = logits.float()
    nll = F.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():
        top = logits.topk(k, dim=-1).values
        log_q = top - top.logsumexp(dim=-1, keepdim=True)
        entropy = -(log_q.exp() * log_q).sum(dim=-1)
        weight = entropy / math.log(k)
    return (weight * nll).mean()


@dataclass(frozen=True)
class Contender:
    """A loss of (logits, labels), or a copy of (source, target).

    ``build`` makes the function anew, so that what is compiled is compiled for one case alone.
    """

    name: str
    title: str
    build: Callable[[], Function]
    is_loss: bool = True
    overwrites_logits: bool = False


CONTENDERS = (
    Contender(
        "copy",
        "copy into existing memory",
        lambda: lambda source, target: target.copy_(source),
        is_loss=False,
    ),
    Contender(
        "clone",
        "copy into fresh memory",
        lambda: lambda source, _: source.clone(),
        is_loss=False,
    ),
    Contender("gated_ce", "`gated_ce`", lambda: eaft_ext.gated_ce),
    Contender(
        "gated_ce_inplace",
        "`gated_ce`, in place",
        lambda: partial(eaft_ext.gated_ce, inplace_backward=True),
        overwrites_logits=True,
    ),
    Contender("cross_entropy", "`F.cross_entropy`", lambda: F.cross_entropy),
    Contender("eager", "eager EAFT", lambda: eager_eaft),
    Contender("compiled", "compiled EAFT", lambda: torch.compile(eager_eaft, dynamic=False)),
)


class Runner:
    """A contender's function, and its call on a batch in two steps.

    ``forward`` is the call of the loss on logits that require a gradient (or the copy),
    ``backward`` is ``.backward()`` of the scalar that it returned. The leaf is made by ``prepare``
    and has no gradient yet, so nothing is accumulated.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._function = contender.build()

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The arguments of ``forward``; not part of what is timed."""
        if not self.contender.is_loss:
            return batch.logits, batch.workspace
        source = batch.workspace if self.contender.overwrites_logits else batch.logits
        return source.detach().requires_grad_(), batch.labels

    def forward(self, arguments: tuple[Tensor, Tensor]) -> Tensor:
        """The loss, or the copy."""
        return self._function(*arguments)

    def backward(self, result: Tensor) -> None:
        """The gradient of the loss, into the leaf."""
        result.backward()
