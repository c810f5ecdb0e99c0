"""The losses of a study: each a weight of a token's cross-entropy, which knows nll, H and p.

Most are gates of the library. The others are made of its stats and go in as ``token_weight``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import eaft_ext
from eaft_ext._conflicts import CONFLICT_ENTROPY, CONFLICT_PROBABILITY, confident_conflicts
from eaft_ext.cli.gates_shown import GATES
from eaft_ext.cli.palette import LOSSES as PAINTS

Tensor = torch.Tensor


@dataclass
class Tokens:
    """What is known of the tokens of a step, each a vector: nats, labels, and how far the run is.

    ``progress`` goes from 0 to 1; ``memory`` is the run's own, and stays from step to step.
    """

    nll: Tensor
    entropy: Tensor
    labels: Tensor
    k: int
    progress: float
    generator: torch.Generator
    memory: dict[str, Tensor] = field(default_factory=dict)

    @property
    def normalized_entropy(self) -> Tensor:
        """H / ln k, which is EAFT's weight."""
        return self.entropy / math.log(self.k)

    @property
    def probability(self) -> Tensor:
        return (-self.nll).exp()

    @property
    def conflicts(self) -> Tensor:
        return confident_conflicts(self.nll, self.entropy, self.k)


Weigh = Callable[[Tokens], Tensor]


def shuffled(tokens: Tokens) -> Tensor:
    """EAFT's weights, handed out anew at random: as much is muted, but not what EAFT mutes."""
    order = torch.randperm(len(tokens.nll), generator=tokens.generator)
    return tokens.normalized_entropy[order]


def random_mask(tokens: Tokens) -> Tensor:
    """As many tokens as are confident conflicts are left out, any."""
    order = torch.randperm(len(tokens.nll), generator=tokens.generator)
    return (~tokens.conflicts[order]).float()


def corner(tokens: Tokens) -> Tensor:
    """A soft corner with a floor: 1 outside of the confident conflicts, 0.1 deep inside."""
    entropy = torch.sigmoid((CONFLICT_ENTROPY - tokens.normalized_entropy) / 0.05)
    probability = torch.sigmoid((math.log(CONFLICT_PROBABILITY) + tokens.nll) / 0.5)
    return 1 - 0.9 * entropy * probability


def falling(tokens: Tokens) -> Tensor:
    """EAFT at the start, cross-entropy at the end: alpha falls from 1 to 0 over the run."""
    return tokens.normalized_entropy.clamp(min=1e-6) ** (1 - tokens.progress)


def habit(tokens: Tokens) -> Tensor:
    """A conflict counts the more, the more often its label was one before: c / (c + 2).

    A habit of the new text comes back with the same label; a mistake does not.
    """
    words = tokens.labels[tokens.conflicts]
    counts = tokens.memory.setdefault("conflicts", torch.zeros(1 << 18))
    weight = torch.ones_like(tokens.nll)
    weight[tokens.conflicts] = counts[words] / (counts[words] + 2)
    counts.index_add_(0, words, torch.ones(len(words)))
    return weight


@dataclass(frozen=True)
class Loss:
    """A line of the tables: what it is called there, and a gate of the library or a function."""

    title: str
    weight: eaft_ext.Gate | Weigh


LOSSES: dict[str, Loss] = {
    **{name: Loss(PAINTS[name].title, gate) for name, gate in GATES.items()},
    "shuffled": Loss(PAINTS["shuffled"].title, shuffled),
    "random": Loss("random mask of the same share", random_mask),
    "corner": Loss("soft corner, floor 0.1", corner),
    "falling": Loss("EAFT, alpha falls to 0", falling),
    "habit": Loss("conflicts by how often they came back", habit),
}
