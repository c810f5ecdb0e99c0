"""Which tokens are confident conflicts, and of which a model is sure."""

from __future__ import annotations

import math

import torch

CONFLICT_PROBABILITY = 0.1
CONFLICT_ENTROPY = 0.3
"""A token is a confident conflict if p(y) < 0.1 and its entropy is below 0.3 ln k."""


def confident_conflicts(nll: torch.Tensor, entropy: torch.Tensor, k: int) -> torch.Tensor:
    """Return which tokens the model finds improbable while it is sure of something else."""
    return (nll > -math.log(CONFLICT_PROBABILITY)) & sure(entropy, k)


def sure(entropy: torch.Tensor, k: int) -> torch.Tensor:
    """Return for which tokens the model's entropy, in nats, is that of being sure.

    Of one logit, k = 1, it is 0, and the model is sure.
    """
    return entropy < CONFLICT_ENTROPY * math.log(k) if k > 1 else entropy <= 0
