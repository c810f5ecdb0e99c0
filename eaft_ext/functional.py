"""The public functions: arguments checked, kernels or reference chosen, the loss reduced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from eaft_ext import reference
from eaft_ext._checks import (
    check_label_values,
    check_labels,
    check_logits,
    check_placement,
    check_weight_values,
)
from eaft_ext._dispatch import is_dtensor, takes_kernel
from eaft_ext._library import MAX_TOP_K
from eaft_ext._options import (
    Keywords,
    Reduce,
    ReturnStats,
    TokenLoss,
    check_gradient_in_forward,
    check_k,
    checked,
    with_keywords,
)
from eaft_ext._registration import gated_ce_forward
from eaft_ext._registration import topk as topk_operator
from eaft_ext._scalar_loss import ScalarLoss
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _kernel_token_losses(
    logits: Tensor, labels: Tensor, of_token: TokenLoss, inplace_backward: bool
) -> tuple[Tensor, TokenStats]:
    """Per-token loss and stats by the compiled operators."""
    valid = labels != of_token.ignore_index
    # In a compiled graph the compiler decides about memory.
    has_backward = torch.is_grad_enabled() and logits.requires_grad
    inplace_backward = inplace_backward and has_backward and not torch.compiler.is_compiling()
    # Two losses of the same logits cannot both overwrite them.
    rest = of_token.z_loss_alone
    inplace_backward = inplace_backward and rest is None
    loss, nll, entropy, weight, _, _, extra = gated_ce_forward(
        logits,
        labels,
        *of_token.kernel_arguments(),
        inplace_backward,
        of_token.family(),
        of_token.num_extra,
    )
    if not of_token.is_known_to_kernels:
        # The loss of NoGate is ungated, with its gradient: any weight can be put on it.
        weight = of_token.gate_weights(logits.size(-1), nll, entropy, valid)
        loss = reference.weigh(loss, weight)
    if rest is not None:
        loss = loss + _kernel_token_losses(logits, labels, rest, False)[0]
    return loss, of_token.stats(nll, entropy, weight, valid, extra)


def _can_fuse(logits: Tensor) -> bool:
    """Whether the gradient of a scalar loss can be computed in the forward.

    Not for float16, whose gradient would be rounded before a loss scale lifts it.
    """
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and logits.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and takes_kernel("gated_ce_forward_with_grad", logits)
    )


def _fused_loss(
    logits: Tensor, labels: Tensor, of_token: TokenLoss, reduce: Reduce, inplace: bool
) -> tuple[Tensor, TokenStats]:
    """A scalar loss and stats, the gradient being computed at once."""
    valid = labels != of_token.ignore_index
    divisor = reduce.divisor(valid, torch.float32)
    loss, nll, entropy, weight, extra = ScalarLoss.apply(
        logits, labels, divisor, reduce, of_token, inplace
    )
    return loss, of_token.stats(nll, entropy, weight, valid, extra)


@overload
def gated_ce(
    logits: Tensor,
    labels: Tensor,
    k: int | None = ...,
    *,
    inplace_backward: bool = ...,
    gradient_in_forward: bool = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> Tensor: ...
@overload
def gated_ce(
    logits: Tensor,
    labels: Tensor,
    k: int | None = ...,
    *,
    inplace_backward: bool = ...,
    gradient_in_forward: bool = ...,
    return_stats: Literal[True, "full"],
    **options: Unpack[Keywords],
) -> tuple[Tensor, TokenStats]: ...
@with_keywords
def gated_ce(
    logits: Tensor,
    labels: Tensor,
    k: int | None = 20,
    *,
    inplace_backward: bool = False,
    gradient_in_forward: bool = False,
    return_stats: ReturnStats = False,
    **options: Unpack[Keywords],
) -> Tensor | tuple[Tensor, TokenStats]:
    r"""Token-gated cross-entropy: EAFT's loss (arXiv 2601.02151), and its family.

    For each token, with logits x, label y and the k largest logits t_1 >= ... >= t_k::

        nll  = -ln softmax(x)_y
        H    = entropy of softmax(t_1, ..., t_k), in nats          k = min(k, V), or V for k=None
        g    = (H / normalizer)^alpha                              normalizer: ln k unless given
        loss = g * nll                  dloss/dx = g * (softmax(x) - onehot(y))      g is detached

    and with the family's options, of which none is on unless it is given::

        x    -> logit_scale * x, or softcap * tanh(logit_scale * x / softcap)
        nll  -> (1 - label_smoothing) * nll + label_smoothing * (lse - mean_j x_j)     in the loss
        loss -> token_weight * (g * nll + z_loss * lse^2)          lse = ln sum_j exp(x_j)

    Args:
        logits: (..., V), float32, bfloat16 or float16, or float64 on the CPU. If the last dimension
            is contiguous, any other strides are read in place; else a contiguous copy is made. A
            DTensor may be divided by rows, by vocabulary, or both: ``k + 3`` numbers a token are
            exchanged for the vocabulary, sums and counts for the rows, and results are DTensors.
        labels: (...), int64 or int32, on the logits' device. They belong to the logits at the same
            place: shift them, not the logits, for next-token prediction.
        k: how many of the largest logits H is taken over, from 2 to 128. None: over all of them,
            the exact entropy of the softmax, which needs no selection and is divided by ln V.
        alpha, normalizer: shorthand for ``gate=EntropyGate(alpha, normalizer)``.
        gate: a gate of :mod:`eaft_ext.gates`, or any function of ``(nll, entropy)``, two detached
            tensors shaped like the labels and 0 where ignored, that returns the weights.
        ignore_index: tokens with this label have loss, gradient and stats 0; their logits are not
            read.
        reduction: "mean" over the tokens that are not ignored (not over the sum of the gates),
            "sum", or "none" for losses shaped like the labels.
        num_items_in_batch: what "mean" divides by instead, a number or a tensor with one, under
            gradient accumulation. A tensor on the logits' device costs no synchronisation.
        softcap: the cap of a model that caps its logits, such as Gemma 2; above 0.
        logit_scale: what a model multiplies its logits by, such as Cohere, or divides them by, such
            as Granite, whose ``1 / logits_scaling`` it is; above 0. The gradient is that of the
            logits as they are given.
        label_smoothing: from 0 to 1, as of ``F.cross_entropy``. The gate is still of the nll. Where
            a logit is -inf so is the mean, and the loss infinite, as there; its gradient is finite.
        z_loss: weight of the square of lse in the loss of each token. The gate is not on it: it
            holds the logits, and teaches nothing. Beside a gate of your own it takes a second read,
            or of hidden states a second product, its gradient is rounded by itself, and
            ``inplace_backward`` is left alone.
        token_weight: (...), at least 0: what loss and gradient of each token are multiplied by. A
            constant. A token of weight 0 counts in a "mean", and is otherwise as if its label were
            ignored. A negative one raises on the CPU, and elsewhere with ``EAFT_EXT_CHECKS=1``.
        inplace_backward: let the gradient overwrite the logits' memory, which halves the peak. The
            logits must have a contiguous last dimension and rows that share no memory, must not be
            used afterwards, nor may other parts of the same tensor take part in another such call.
            Left to the compiler under ``torch.compile``.
        gradient_in_forward: compute the gradient of a "mean" or "sum" together with the loss: the
            logits are read once instead of twice, and not kept. Worth it where ``.backward()`` is
            called on the loss itself; the gradient of a loss that is scaled before takes one more
            read and write, and a second rounding. With ``inplace_backward`` the logits are
            overwritten in the forward already. Left alone for float16, for DTensors, for gates of
            your own, where no gradient is asked for and under ``torch.compile``.
        return_stats: also return :class:`TokenStats`; "full": with the entropy over the whole
            vocabulary beside that of the k largest, which takes no other read.

    Returns:
        The loss: float32 (float64 for float64 logits), whatever the logits' dtype. If every label
        is ignored, or there are none, it is 0.0 and still connected to the graph. With
        ``return_stats``, a pair of the loss and :class:`TokenStats`. The gradient has the logits'
        dtype, rounded once.

    Raises:
        TypeError: an unsupported dtype; ``gate`` together with ``alpha`` or ``normalizer``.
        ValueError: shapes, devices, k, reduction, ``gradient_in_forward`` of "none"; a label
            outside [0, V) other than ``ignore_index``. On CUDA such a label gives NaN instead, for
            its token alone, unless the environment has ``EAFT_EXT_CHECKS=1``.
        RuntimeError: from a second derivative; :mod:`eaft_ext.reference` has one.

    NaN logits give NaN for their own row. Devices without kernels take :mod:`eaft_ext.reference`.
    """
    op = "gated_ce"
    if is_dtensor(logits):
        from eaft_ext.parallel.dtensor import gated_ce_of_dtensor

        loss, stats = gated_ce_of_dtensor(
            op, logits, labels, k, options, inplace_backward, gradient_in_forward, return_stats
        )
        return (loss, stats) if return_stats else loss
    check_logits(op, logits)
    check_labels(op, labels)
    of_token, reduce = checked(op, k, logits, return_stats=return_stats, **options)
    check_gradient_in_forward(op, gradient_in_forward, reduce.reduction)
    check_placement(op, labels, logits)
    check_weight_values(op, reduce.token_weight, labels, of_token.ignore_index)
    labels, reduce = reduce.without_muted(labels, of_token)
    by_kernel = takes_kernel("gated_ce_forward", logits)
    if not (by_kernel and labels.device.type == "cpu"):  # whose kernels check them
        check_label_values(op, labels, logits.size(-1), of_token.ignore_index)
    if gradient_in_forward and of_token.is_known_to_kernels and _can_fuse(logits):
        loss, stats = _fused_loss(logits, labels, of_token, reduce, inplace_backward)
        return (loss, stats) if return_stats else loss
    if by_kernel:
        loss, stats = _kernel_token_losses(logits, labels, of_token, inplace_backward)
    else:
        loss, stats = reference.token_losses(
            logits,
            labels,
            of_token.k,
            of_token.gate,
            of_token.ignore_index,
            **of_token.reference_options(),
            tells_entropy=of_token.tells_entropy,
        )
    loss = reduce.reduced(loss, stats.valid)
    return (loss, stats) if return_stats else loss


def topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of every row, the largest first.

    Args:
        logits: (..., V), float32, bfloat16 or float16, or float64 on the CPU.
        k: from 1 to the smaller of V and 128.

    Returns:
        values (..., k) in the logits' dtype, and indices (..., k), int64: the lowest index first
        among equals. NaN counts as larger than any number, as in ``torch.topk``. Differentiable in
        the values.

    Raises:
        TypeError, ValueError: for a dtype, a shape or a k outside these.
    """
    check_logits("topk", logits)
    check_k("topk", k, 1, min(logits.size(-1), MAX_TOP_K))
    if takes_kernel("topk", logits):
        values, indices = topk_operator(logits, k)
        return values, indices
    return reference.topk(logits, k)
