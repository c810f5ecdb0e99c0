"""Which calls the compiled operators take; the others are for :mod:`eaft_ext.reference`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from eaft_ext._library import has_kernel

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Fake tensors have no kernels but are registered for all operators.
_KERNEL_DEVICES = {
    op: frozenset(["meta", *(d for d in ("cpu", "cuda") if has_kernel(op, d))])
    for op in ("gated_ce_forward", "gated_ce_forward_with_grad", "gated_ce_merge", "topk")
}


def takes_kernel(op: str, logits: Tensor) -> bool:
    """Whether operator ``op`` is for these logits; if not, the reference is.

    float64 is for the CPU, where gradcheck runs.
    """
    device = logits.device.type
    if device not in _KERNEL_DEVICES[op] or (device == "cuda" and logits.dtype == torch.float64):
        return False
    return not is_transformed(logits)


def _are_transforms_active() -> bool:
    """Whether the call is within a transform of ``torch.func``, eager or compiled."""
    return torch._C._are_functorch_transforms_active()


# Dynamo enters the transforms that it traces, and compiles anew where others are active: it may ask
# while it traces, and leave the question out of the graph, which could not be cached with it. This
# is all that torch.compiler.assume_constant_result does, but that imports the compiler.
_are_transforms_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_transformed(*inputs: Tensor | None) -> bool:
    """Whether function transforms (``torch.func``) or forward mode are at work.

    They need formulas that autograd can see through.
    """
    if _are_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    # Dynamo compiles anew for another level, but does not know which tensors are dual.
    return torch.compiler.is_compiling() or any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in inputs
    )


def is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Without the import of the class, which takes half a second: whoever has one has paid it."""
    return hasattr(tensor, "device_mesh")
