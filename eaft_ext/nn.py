"""The loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from eaft_ext._checks import check_gradient_in_forward, check_options
from eaft_ext.functional import gated_ce
from eaft_ext.gates import EntropyGate, Gate, GateFunction
from eaft_ext.reference import Reduction


class GatedCrossEntropyLoss(nn.Module):
    """:func:`eaft_ext.gated_ce` with its options kept; ``forward(logits, labels)`` gives the loss.

    Takes logits (..., V) and labels (...), which for ``torch.nn.CrossEntropyLoss`` would have to be
    (N, V) and (N). Arguments, formula and errors are those of :func:`eaft_ext.gated_ce`.
    """

    def __init__(
        self,
        k: int = 20,
        *,
        alpha: float = 1.0,
        normalizer: float | None = None,
        gate: Gate | GateFunction | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        inplace_backward: bool = False,
        gradient_in_forward: bool = False,
    ) -> None:
        super().__init__()
        check_options(type(self).__name__, k, alpha, normalizer, gate, reduction)
        check_gradient_in_forward(type(self).__name__, gradient_in_forward, reduction)
        self.k = k
        self.alpha = alpha
        self.normalizer = normalizer
        self.gate = gate
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.inplace_backward = inplace_backward
        self.gradient_in_forward = gradient_in_forward

    def forward(
        self, logits: Tensor, labels: Tensor, num_items_in_batch: float | Tensor | None = None
    ) -> Tensor:
        """The loss of ``logits`` (..., V) against ``labels`` (...)."""
        return gated_ce(
            logits,
            labels,
            self.k,
            alpha=self.alpha,
            normalizer=self.normalizer,
            gate=self.gate,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
            inplace_backward=self.inplace_backward,
            gradient_in_forward=self.gradient_in_forward,
        )

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        gate = EntropyGate(self.alpha, self.normalizer) if self.gate is None else self.gate
        return (
            f"k={self.k}, gate={gate}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, inplace_backward={self.inplace_backward}, "
            f"gradient_in_forward={self.gradient_in_forward}"
        )
