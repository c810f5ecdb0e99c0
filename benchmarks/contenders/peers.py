"""Fused cross-entropies of other projects, imported when they are built. None has a gate."""

import importlib.metadata
import importlib.util
import pkgutil
from typing import Any

# The module that is imported, and the distribution that brings it.
PEERS = {
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "flash_attn": "flash-attn",
    "transformer_engine": "transformer-engine",
    "cut_cross_entropy": "cut-cross-entropy",
}


def distribution_version(name: str) -> str:
    """The version of what is installed, "" where it is not; it is not imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """The peers that are installed, by module."""
    return {
        module: distribution_version(name) or "unknown"
        for module, name in PEERS.items()
        if importlib.util.find_spec(module)
    }


def transformer_engine() -> Any:
    """The Triton cross-entropy of Transformer Engine; some releases overwrite the logits."""
    loss = pkgutil.resolve_name("transformer_engine.pytorch.cross_entropy:parallel_cross_entropy")
    # Logits, labels, label smoothing, mean, process group, ignored label; by position in all
    # releases. They are (batch, sequence, vocabulary) there.
    return lambda logits, labels: loss(logits[None], labels[None], 0.0, True, None, -100)


def liger_linear() -> Any:
    """Liger-Kernel: chunks of tokens, whose gradients are computed in the forward."""
    loss = pkgutil.resolve_name("liger_kernel.transformers:LigerFusedLinearCrossEntropyLoss")()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)
