"""Gates, and the family's other options, that tests go through."""

from __future__ import annotations

from typing import Any

import torch

from eaft_ext import (
    ConflictGate,
    EntropyGate,
    FocalGate,
    HardGate,
    NoGate,
    PowerGate,
    ProbabilityGate,
    SigmoidGate,
    ThresholdGate,
)

BUILT_IN = [
    EntropyGate(),
    EntropyGate(2.0),
    EntropyGate(0.5, 3.0),
    SigmoidGate(),
    HardGate(0.4),
    ConflictGate(0.6, 0.1),
    ProbabilityGate(),
    PowerGate(0.5),
    ThresholdGate(0.02),
    FocalGate(2.0),
    NoGate(),
]

# The same with other parameters, and one that is not built in.
GATES = [
    EntropyGate(),
    EntropyGate(alpha=2.0),
    EntropyGate(alpha=0.5, normalizer=3.0),
    EntropyGate(alpha=0.0),
    SigmoidGate(),
    SigmoidGate(beta=0.6, slope=-5.0),
    HardGate(0.5),
    ConflictGate(0.5, 0.1),
    ProbabilityGate(),
    PowerGate(0.5),
    PowerGate(3.0),
    ThresholdGate(0.1),
    FocalGate(2.0),
    FocalGate(0.5),
    NoGate(),
    lambda nll, entropy: nll / (1 + entropy),
]

# Gates that do not move with the logits, so that a numerical derivative has them fixed as well.
FIXED_GATES: dict[str, Any] = {
    "none": NoGate(),
    "hard": HardGate(0.5),
    "alpha_0": EntropyGate(alpha=0.0),
    "callable": lambda nll, entropy: torch.linspace(-1, 2, nll.numel()).to(nll).view_as(nll),
}

# Options of the family beside a gate.
FAMILY: list[dict[str, Any]] = [
    {"softcap": 30.0},
    {"softcap": 2.0, "logit_scale": 3.0},
    {"logit_scale": 0.0625},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.1},
    {"softcap": 15.0, "logit_scale": 0.5, "label_smoothing": 0.2, "z_loss": 1e-2},
]
