"""The public functions: arguments checked, kernels or reference chosen, the loss reduced."""

from __future__ import annotations

import os
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from eaft_ext import reference
from eaft_ext._library import MAX_TOP_K, MIN_TOP_K, has_kernel
from eaft_ext._registration import ops
from eaft_ext.gates import EntropyGate, Gate, GateFunction, NoGate
from eaft_ext.reference import Reduction, TokenStats

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KERNEL_DEVICES = frozenset(
    ["meta", *(d for d in ("cpu", "cuda") if has_kernel("gated_ce_forward", d))]
)


def _has_kernels(logits: Tensor) -> bool:
    """Whether the operators take these logits: float64 is for the CPU, where gradcheck runs."""
    device = logits.device.type
    return device in _KERNEL_DEVICES and (device != "cuda" or logits.dtype != torch.float64)


def _check_logits(op: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{op}: logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}"
        )
    if logits.dim() == 0 or logits.size(-1) == 0:
        raise ValueError(
            f"{op}: logits must be (..., V) with V of at least 1, got {tuple(logits.shape)}"
        )


def _check_labels(op: str, labels: Tensor, logits: Tensor, ignore_index: int) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: labels must have the shape of the logits without the last dimension, got "
            f"{tuple(labels.shape)} for logits {tuple(logits.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"{op}: labels are on {labels.device} and logits on {logits.device}")
    if not torch.compiler.is_compiling() and os.environ.get("EAFT_EXT_CHECKS") == "1":
        _check_label_values(op, labels, logits.size(-1), ignore_index)


def _check_label_values(op: str, labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """The check that the CPU kernels always make; elsewhere it costs a synchronisation."""
    outside = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    for position in outside.nonzero()[:1].tolist():
        raise ValueError(
            f"{op}: the label at position {position} is {labels[tuple(position)].item()}, outside "
            f"[0, {vocab_size}) and not ignore_index {ignore_index}"
        )


def _check_k(op: str, k: int, smallest: int, largest: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be an int, got {k!r}")
    if not smallest <= k <= largest:
        raise ValueError(f"{op}: k must be from {smallest} to {largest}, got {k}")


def _check_reduction(op: str, reduction: str, num_items_in_batch: float | Tensor | None) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"{op}: num_items_in_batch goes with reduction='mean', got reduction={reduction!r}"
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"{op}: num_items_in_batch must be one number, got a tensor of shape "
                f"{tuple(num_items_in_batch.shape)}"
            )
    elif not num_items_in_batch >= 0:
        raise ValueError(f"{op}: num_items_in_batch must be at least 0, got {num_items_in_batch}")


def _choose_gate(
    op: str, alpha: float, normalizer: float | None, gate: Gate | GateFunction | None
) -> Gate | GateFunction:
    if gate is None:
        return EntropyGate(alpha, normalizer)
    if alpha != 1.0 or normalizer is not None:
        raise TypeError(
            f"{op}: alpha and normalizer are shorthand for gate=EntropyGate(alpha, normalizer) and "
            f"cannot go with gate={gate!r}"
        )
    if isinstance(gate, type) or not (isinstance(gate, Gate) or callable(gate)):
        raise TypeError(
            f"{op}: gate must be a gate such as EntropyGate() or a function of (nll, entropy), got "
            f"{gate!r}"
        )
    return gate


def _kernel_token_losses(
    logits: Tensor,
    labels: Tensor,
    k: int,
    gate: Gate | GateFunction,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[Tensor, TokenStats]:
    """Per-token loss and stats by the compiled operators."""
    valid = labels != ignore_index
    inside = gate if isinstance(gate, Gate) else NoGate()
    # In a compiled graph the compiler decides about memory.
    has_backward = torch.is_grad_enabled() and logits.requires_grad
    inplace_backward = inplace_backward and has_backward and not torch.compiler.is_compiling()
    loss, nll, entropy, weight, _, _ = ops.gated_ce_forward(
        logits, labels, k, inside.name, inside.parameters(), ignore_index, inplace_backward
    )
    if inside is not gate:
        # The loss of NoGate is the nll, with its gradient: any weight can be put on it.
        weight = torch.where(valid, gate(nll, entropy).detach(), 0.0)  # type: ignore[operator]
        loss = reference.weigh(loss, weight)
    return loss, TokenStats(nll, entropy, weight, valid)


@overload
def gated_ce(
    logits: Tensor,
    labels: Tensor,
    k: int = ...,
    *,
    alpha: float = ...,
    normalizer: float | None = ...,
    gate: Gate | GateFunction | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    num_items_in_batch: float | Tensor | None = ...,
    inplace_backward: bool = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def gated_ce(
    logits: Tensor,
    labels: Tensor,
    k: int = ...,
    *,
    alpha: float = ...,
    normalizer: float | None = ...,
    gate: Gate | GateFunction | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    num_items_in_batch: float | Tensor | None = ...,
    inplace_backward: bool = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, TokenStats]: ...
def gated_ce(
    logits: Tensor,
    labels: Tensor,
    k: int = 20,
    *,
    alpha: float = 1.0,
    normalizer: float | None = None,
    gate: Gate | GateFunction | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    r"""Token-gated cross-entropy: EAFT's loss (arXiv 2601.02151), and its family.

    For each token, with logits x, label y and the k largest logits t_1 >= ... >= t_k::

        nll  = -ln softmax(x)_y
        H    = entropy of softmax(t_1, ..., t_k), in nats          k = min(k, V)
        g    = (H / normalizer)^alpha                              normalizer: ln k unless given
        loss = g * nll                  dloss/dx = g * (softmax(x) - onehot(y))      g is detached

    Args:
        logits: (..., V), float32, bfloat16 or float16, or float64 on the CPU. If the last dimension
            is contiguous, any other strides are read in place; else a contiguous copy is made.
        labels: (...), int64 or int32, on the logits' device. They belong to the logits at the same
            place: shift them, not the logits, for next-token prediction.
        k: how many of the largest logits H is taken over, from 2 to 128.
        alpha, normalizer: shorthand for ``gate=EntropyGate(alpha, normalizer)``.
        gate: a gate of :mod:`eaft_ext.gates`, or any function of ``(nll, entropy)``, two detached
            tensors shaped like the labels, that returns the weights.
        ignore_index: tokens with this label have loss, gradient and stats 0; their logits are not
            read.
        reduction: "mean" over the tokens that are not ignored (not over the sum of the gates),
            "sum", or "none" for losses shaped like the labels.
        num_items_in_batch: what "mean" divides by instead, a number or a tensor with one, under
            gradient accumulation. A tensor on the logits' device costs no synchronisation.
        inplace_backward: let the gradient overwrite the logits' memory, which halves the peak. The
            logits must have a contiguous last dimension and no memory in common, and must not be
            used afterwards. Left to the compiler under ``torch.compile``.
        return_stats: also return :class:`TokenStats`.

    Returns:
        The loss: float32 (float64 for float64 logits), whatever the logits' dtype. If every label
        is ignored, or there are none, it is 0.0 and still connected to the graph. With
        ``return_stats``, a pair of the loss and :class:`TokenStats`. The gradient has the logits'
        dtype, rounded once.

    Raises:
        TypeError: an unsupported dtype; ``gate`` together with ``alpha`` or ``normalizer``.
        ValueError: shapes, devices, k, reduction; a label outside [0, V) other than
            ``ignore_index``. On CUDA such a label gives NaN instead, for its token alone, unless
            the environment has ``EAFT_EXT_CHECKS=1``.
        RuntimeError: from a second derivative; :mod:`eaft_ext.reference` has one.

    NaN logits give NaN for their own row. Devices without kernels take :mod:`eaft_ext.reference`.
    """
    op = "gated_ce"
    _check_logits(op, logits)
    _check_labels(op, labels, logits, ignore_index)
    _check_k(op, k, MIN_TOP_K, MAX_TOP_K)
    _check_reduction(op, reduction, num_items_in_batch)
    chosen = _choose_gate(op, alpha, normalizer, gate)
    if _has_kernels(logits):
        loss, stats = _kernel_token_losses(
            logits, labels, k, chosen, ignore_index, inplace_backward
        )
    else:
        loss, stats = reference.token_losses(logits, labels, k, chosen, ignore_index)
    loss = reference.reduce_loss(loss, stats.valid, reduction, num_items_in_batch)
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
    _check_logits("topk", logits)
    _check_k("topk", k, 1, min(logits.size(-1), MAX_TOP_K))
    values, indices = ops.topk(logits, k) if _has_kernels(logits) else reference.topk(logits, k)
    return values, indices
