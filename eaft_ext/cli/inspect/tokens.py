"""What a model thinks of each token that it is to predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import eaft_ext
from eaft_ext import _landscape
from eaft_ext.cli.batches import Batch, Example, collate
from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.model import forward

from .pieces import Pieces

CONTEXT_TOKENS = 12
"""Tokens before another that are shown with it."""

LIKELIEST = 5
"""Of the model's own, as many are kept."""


@dataclass(frozen=True)
class View:
    """What a model thinks of a token. Entropies and losses are in nats.

    ``likeliest`` are what the model would have said, with their probabilities.
    ``normalized_entropy`` is the entropy over ln k, where k is at most the vocabulary;
    ``gradient`` the norm of the cross-entropy's gradient by the logits, |p - onehot(y)|; ``region``
    the token's in the plane of probability and entropy.
    """

    probability: float
    nll: float
    entropy: float
    normalized_entropy: float
    gate: float
    gradient: float
    region: str
    likeliest: list[tuple[str, float]]

    @property
    def muted(self) -> float:
        """The part of its cross-entropy that is not learned from; below 0 for a gate above 1."""
        return 0.0 if self.gate == 1 else (1 - self.gate) * self.nll

    @property
    def is_conflict(self) -> bool:
        """Whether the model is sure, and of something else."""
        return self.region == "conflict"


@dataclass(frozen=True)
class Token:
    """A token of the text. ``row`` and ``position`` are those of the token it was to follow.

    ``after`` is what another model thinks of it, such as a tuned one.
    """

    row: int
    position: int
    before: str
    token: str
    view: View
    after: View | None = None


@dataclass(frozen=True)
class Reader:
    """A model with the loss whose gate is looked at."""

    model: Any
    pieces: Pieces
    k: int
    gate: eaft_ext.EntropyGate

    def __call__(self, batch: Batch) -> list[View]:
        """The view of each token that is to be predicted, row by row."""
        return list(self._views(batch))

    @torch.no_grad()
    def _views(self, batch: Batch) -> Iterator[View]:
        predicted = batch.labels >= 0
        labels = batch.labels[predicted]
        logits = forward(self.model, batch)[predicted]
        within = min(self.k, logits.size(-1))
        _, stats = eaft_ext.gated_ce(logits, labels, self.k, gate=self.gate, return_stats=True)
        if bool(stats.gate.isnan().any() | stats.nll.isnan().any()):
            raise CommandError("the model's logits are NaN: it cannot be looked at")
        log_p = logits.float().log_softmax(-1)
        of_label = (-stats.nll).exp()
        likeliest = eaft_ext.topk(logits, min(LIKELIEST, logits.size(-1)))[1]
        columns = [
            tensor.tolist()
            for tensor in (
                of_label,
                stats.nll,
                stats.entropy,
                stats.entropy / math.log(within) if within > 1 else stats.entropy,
                stats.gate,
                gradient_norm(log_p, of_label),
                _landscape.regions(stats.nll, stats.entropy, within),
                likeliest,
                log_p.gather(-1, likeliest).exp(),
            )
        ]
        rows = batch.input_ids.tolist()
        places = predicted.nonzero().tolist()
        for (row, position), values in zip(places, zip(*columns, strict=True), strict=True):
            *numbers, region, ids, chances = values
            before = rows[row][position : position + 1]
            texts = [self.pieces.after(before, [one]) for one in ids]
            said = list(zip(texts, chances, strict=True))
            p, nll, entropy, normalized, gate, gradient = numbers
            name = _landscape.REGIONS[region]
            yield View(p, nll, entropy, normalized, gate, gradient, name, said)


def gradient_norm(log_p: torch.Tensor, of_label: torch.Tensor) -> torch.Tensor:
    """Return |p - onehot(y)| of each row of ln p; ``of_label`` are the p(y)."""
    squares = log_p.mul(2).exp_().sum(-1)
    return (squares - 2 * of_label + 1).clamp(min=0).sqrt()


def read(
    rows: list[Example],
    first_row: int,
    pieces: Pieces,
    look: Callable[[Batch], list[tuple[View, ...]]],
) -> Iterator[Token]:
    """Yield the tokens of some rows that are to be predicted; ``look`` gives the views of each."""
    batch = collate(rows)
    places = (batch.labels >= 0).nonzero().tolist()
    texts = [pieces.of(row.tokens) for row in rows]
    for (row, position), views in zip(places, look(batch), strict=True):
        begin = max(0, position + 1 - CONTEXT_TOKENS)
        before = "".join(texts[row][begin : position + 1])
        yield Token(first_row + row, position, before, texts[row][position + 1], *views)
