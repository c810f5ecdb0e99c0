"""Fused cross-entropies of other projects, imported when they are built. None has a gate.

The last two have the output layer in them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # gpu_check.py asks for versions before it asks for torch
    from torch import Tensor

Function = Callable[..., Any]

# The module that is imported, and the distribution that brings it.
PEERS = {
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "flash_attn": "flash-attn",
    "transformer_engine": "transformer-engine",
    "cut_cross_entropy": "cut-cross-entropy",
}


def version(module: str) -> str | None:
    """The version of a peer, None where it is not installed; it is not imported."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(PEERS[module])
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """The peers that are installed, by module."""
    return {module: found for module in PEERS if (found := version(module))}


def liger() -> Function:
    """Liger-Kernel: one kernel writes the gradient over the logits in the forward."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def quack() -> Function:
    """QuACK: CuTe kernels, a row on chip in a cluster of blocks."""
    from quack import cross_entropy

    return cross_entropy


def flash_attn() -> Function:
    """The Triton cross-entropy of flash-attn."""
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    return CrossEntropyLoss()


def transformer_engine() -> Function:
    """The Triton cross-entropy of Transformer Engine; some releases overwrite the logits."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def loss(logits: Tensor, labels: Tensor) -> Any:
        # logits, labels, label smoothing, mean, process group, ignored label; by position in all
        # releases. They are (batch, sequence, vocabulary) there.
        return parallel_cross_entropy(logits[None], labels[None], 0.0, True, None, -100)

    return loss


def liger_linear() -> Function:
    """Liger-Kernel: chunks of tokens, whose gradients are computed in the forward."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return module(weight, hidden, labels)

    return loss


def cut_cross_entropy() -> Function:
    """Apple's: logits stay on chip, and are computed anew in the backward.

    It leaves out blocks of the gradient in which everything would be rounded away.
    """
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy
