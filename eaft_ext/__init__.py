"""Entropy-gated cross-entropy for fine-tuning (EAFT, arXiv 2601.02151), fused, for PyTorch.

loss = eaft_ext.gated_ce(logits, labels, k=20)
"""

from eaft_ext import reference
from eaft_ext._library import build_info
from eaft_ext.functional import gated_ce, topk
from eaft_ext.gates import (
    ConflictGate,
    EntropyGate,
    FocalGate,
    Gate,
    HardGate,
    NoGate,
    PowerGate,
    ProbabilityGate,
    SigmoidGate,
    ThresholdGate,
)
from eaft_ext.linear import linear_gated_ce, vocab_parallel_linear_gated_ce
from eaft_ext.nn import GatedCrossEntropyLoss
from eaft_ext.parallel import vocab_parallel_gated_ce
from eaft_ext.reference import TokenStats

__version__ = build_info()["version"]

__all__ = [
    "ConflictGate",
    "EntropyGate",
    "FocalGate",
    "Gate",
    "GatedCrossEntropyLoss",
    "HardGate",
    "NoGate",
    "PowerGate",
    "ProbabilityGate",
    "SigmoidGate",
    "ThresholdGate",
    "TokenStats",
    "__version__",
    "build_info",
    "gated_ce",
    "linear_gated_ce",
    "reference",
    "topk",
    "vocab_parallel_gated_ce",
    "vocab_parallel_linear_gated_ce",
]
