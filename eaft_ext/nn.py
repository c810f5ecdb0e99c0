"""The loss as a module."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eaft_ext._options import (
    LOSS_DEFAULTS,
    LossKeywords,
    check_gradient_in_forward,
    checked,
    token_loss,
    with_keywords,
)
from eaft_ext.functional import gated_ce
from eaft_ext.reference import Reduction

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GatedCrossEntropyLoss(nn.Module):
    """:func:`eaft_ext.gated_ce` with its options kept; ``forward(logits, labels)`` gives the loss.

    Takes logits (..., V) and labels (...), which for ``torch.nn.CrossEntropyLoss`` would have to be
    (N, V) and (N). Arguments, formula and errors are those of :func:`eaft_ext.gated_ce`.
    """

    @with_keywords
    def __init__(
        self,
        k: int | None = 20,
        *,
        reduction: Reduction = "mean",
        inplace_backward: bool = False,
        gradient_in_forward: bool = False,
        **options: Unpack[LossKeywords],
    ) -> None:
        super().__init__()
        op = type(self).__name__
        checked(op, k, torch.empty(0), reduction=reduction)
        for name in {"num_items_in_batch", "token_weight"} & set(options):
            raise TypeError(f"{op}: {name} goes to a call, criterion(logits, labels, {name}=...)")
        token_loss(op, k, **options)
        check_gradient_in_forward(op, gradient_in_forward, reduction)
        self.k = k
        for name, default in LOSS_DEFAULTS.items():
            setattr(self, name, options.get(name, default))
        self.reduction: Reduction = reduction
        self.inplace_backward = inplace_backward
        self.gradient_in_forward = gradient_in_forward

    def _of_token(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LOSS_DEFAULTS}

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        num_items_in_batch: float | Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``logits`` (..., V) against ``labels`` (...)."""
        loss: Tensor = gated_ce(
            logits,
            labels,
            self.k,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
            token_weight=token_weight,
            inplace_backward=self.inplace_backward,
            gradient_in_forward=self.gradient_in_forward,
            **self._of_token(),
        )
        return loss

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        of_token = token_loss(type(self).__name__, self.k, **self._of_token())
        shown = ", ".join(
            f"{field.name}={getattr(of_token, field.name)}"
            for field in fields(of_token)
            if field.compare
        )
        return (
            f"{shown}, reduction={self.reduction!r}, inplace_backward={self.inplace_backward}, "
            f"gradient_in_forward={self.gradient_in_forward}"
        )
