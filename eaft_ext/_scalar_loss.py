"""A sum of token losses whose gradient is computed together with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eaft_ext._library import has_kernel
from eaft_ext._options import Reduce, TokenLoss
from eaft_ext._registration import called, ops

_NO_DOUBLE_BACKWARD = (
    "eaft_ext: gradient_in_forward leaves no graph of the backward; drop create_graph=True or "
    "gradient_in_forward=True"
)


class ScalarLoss(torch.autograd.Function):
    """``sum(token_weight * loss) / divisor``, and nll, entropy, gate and more of each token.

    One operator reads the logits and writes ``d sum(loss) / divisor``; the backward multiplies that
    by the gradient of the scalar, which the device skips where it is 1. The logits are not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        divisor: float | Tensor,
        reduce: Reduce,
        of_token: TokenLoss,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones((), dtype=torch.float32, device=logits.device)
        upstream = reduce.weighted(one.div(divisor).expand(labels.shape))
        source = logits.detach()
        arguments = (
            upstream,
            source,
            labels,
            *of_token.kernel_arguments(),
            of_token.family(),
            of_token.num_extra,
        )
        if inplace:
            outputs = called(ops.gated_ce_forward_with_grad_, *arguments)
            (loss, nll, entropy, weight, extra), gradient = outputs, source
        else:
            outputs = called(ops.gated_ce_forward_with_grad, *arguments)
            loss, nll, entropy, weight, extra, gradient = outputs
        ctx.mark_non_differentiable(nll, entropy, weight, extra)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        return reduce.weighted(loss).sum() / divisor, nll, entropy, weight, extra

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 6
        (gradient,) = scaled(ctx.saved_tensors, grad_total, _NO_DOUBLE_BACKWARD)
        return gradient, *(None,) * 5


def scaled(gradients: Sequence[Tensor], factor: Tensor, refusal: str) -> list[Tensor]:
    """``factor * gradient`` of each, in a backward whose gradients were computed in the forward.

    In their own memory, unless there may be another backward, which needs them as they are.
    ``refusal`` is the error where a graph of the backward is asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(refusal)
    # A compiler traces with tensors of other types, and decides about memory itself; vmap has
    # several factors.
    is_traced = type(factor) is not Tensor or torch._C._are_functorch_transforms_active()
    if is_traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return [gradient * factor for gradient in gradients]
    for gradient in gradients:
        if gradient.numel() == 0:  # of a shard without words
            continue
        # A gradient may be stored by columns, as what it is of: its rows are those of its memory.
        by_rows = gradient.permute(_as_stored(gradient))
        if factor.dtype == torch.float32 and has_kernel("scale_gradient_", gradient.device.type):
            called(ops.scale_gradient_, by_rows, factor)
        else:
            gradient.mul_(factor)
    # New tensors on the same memory: autograd then keeps them as gradients without a copy.
    return [gradient.detach() for gradient in gradients]


def _as_stored(tensor: Tensor) -> list[int]:
    """The dimensions from the slowest to the fastest, where the fastest is contiguous.

    Else, as with a vocabulary of one word in rows that are apart, as they are.
    """
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return order if strides[order[-1]] == 1 else list(range(tensor.dim()))
