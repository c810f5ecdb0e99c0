"""Wrong labels where the base model is sure and right: conflicts that are known to be wrong."""

from __future__ import annotations

import torch

import eaft_ext
from eaft_ext._conflicts import sure

PLANTED_SHARE = 0.2
"""Of the tokens that the base model is sure of and right about, those that get a wrong label."""


def sure_and_right(logits: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Return, shaped like the labels, where a model expects the label and little else."""
    _, stats = eaft_ext.gated_ce(logits, labels, k, gate=eaft_ext.NoGate(), return_stats=True)
    assert stats.correct is not None
    return stats.valid & stats.correct & sure(stats.entropy, k)


def plant(
    labels: torch.Tensor,
    candidates: torch.Tensor,
    words: torch.Tensor,
    share: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the labels with a share of the candidates, a mask, replaced by other words.

    The words, a list of token ids, are drawn evenly: from a text's own labels as often as there.
    """
    chosen = candidates & (torch.rand(labels.shape, generator=generator) < share)
    drawn = words[torch.randint(len(words), labels.shape, generator=generator)]
    return torch.where(chosen & (drawn != labels), drawn, labels)
