"""A sum of token losses whose gradient is computed together with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from eaft_ext._registration import ops


class ScalarLoss(torch.autograd.Function):
    """``sum(loss) / divisor``, and nll, entropy and gate of each token.

    One operator reads the logits and writes ``d sum(loss) / divisor``; the backward multiplies that
    by the gradient of the scalar, which the device skips where it is 1. The logits are not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        divisor: float | Tensor,
        k: int,
        gate: str,
        gate_parameters: Sequence[float],
        ignore_index: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        upstream = torch.ones((), device=logits.device).div(divisor).expand(labels.shape)
        source = logits.detach()
        arguments = (upstream, source, labels, k, gate, gate_parameters, ignore_index)
        if inplace:
            loss, nll, entropy, weight = ops.gated_ce_forward_with_grad_(*arguments)
            gradient = source
        else:
            loss, nll, entropy, weight, gradient = ops.gated_ce_forward_with_grad(*arguments)
        ctx.mark_non_differentiable(nll, entropy, weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        return loss.sum() / divisor, nll, entropy, weight

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 8
        if torch.is_grad_enabled():
            _no_double_backward()
        (gradient,) = ctx.saved_tensors
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # There may be another backward, which needs the gradient as it is.
            gradient = gradient * grad_total
        else:
            ops.scale_gradient_(gradient, grad_total)
        return gradient.detach(), *(None,) * 7


def _no_double_backward() -> NoReturn:
    raise RuntimeError(
        "eaft_ext: gradient_in_forward leaves no graph of the backward; drop create_graph=True or "
        "gradient_in_forward=True"
    )
