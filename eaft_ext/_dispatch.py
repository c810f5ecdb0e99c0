"""Which calls the compiled operators take; the others are for :mod:`eaft_ext.reference`."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from eaft_ext._library import has_kernel
from eaft_ext.gates import BUILT_IN, Gate, GateFunction

# Fake tensors have no kernels but are registered for all operators.
_KERNEL_DEVICES = {
    op: frozenset(["meta", *(d for d in ("cpu", "cuda") if has_kernel(op, d))])
    for op in ("gated_ce_forward", "gated_ce_forward_with_grad", "gated_ce_merge", "topk")
}


def takes_kernel(op: str, logits: Tensor) -> bool:
    """Whether operator ``op`` is for these logits; if not, the reference is.

    float64 is for the CPU, where gradcheck runs. Function transforms (``torch.func``) and forward
    mode need formulas that autograd can see through.
    """
    device = logits.device.type
    if device not in _KERNEL_DEVICES[op] or (device == "cuda" and logits.dtype == torch.float64):
        return False
    if torch.compiler.is_compiling():
        return True
    transformed = torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad.unpack_dual(logits).tangent is None


def is_built_in(gate: Gate | GateFunction) -> TypeGuard[Gate]:
    """Whether the kernels know the gate; a subclass may be another function."""
    return isinstance(gate, BUILT_IN) and type(gate) in BUILT_IN
