"""What a model has learned and forgotten, row by row, against the base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import eaft_ext
from eaft_ext._conflicts import confident_conflicts, sure
from eaft_ext.cli.batches import IGNORE_INDEX, Batch
from eaft_ext.cli.demo.planted import sure_and_right

from .texts import K, Texts, edited

REGIONS = ("sure", "conflict", "unsure")
"""Of held-out tokens, by the base model: sure and not in conflict, in conflict, the rest."""


@dataclass
class Measured:
    """Sums over the tokens of each row, in nats; counts are those of ``Counts``.

    ``new_nll`` and ``old_nll`` are of the target's tokens that the counterfactual arm would edit,
    with the word that they would have, and with their own.
    """

    step: int
    target_nll: dict[str, list[float]] = field(default_factory=lambda: {r: [] for r in REGIONS})
    target_kl: list[float] = field(default_factory=list)
    drift_nll: list[float] = field(default_factory=list)
    drift_kl: list[float] = field(default_factory=list)
    new_nll: list[float] = field(default_factory=list)
    old_nll: list[float] = field(default_factory=list)


@dataclass
class Counts:
    """Tokens of each row."""

    target: dict[str, list[int]] = field(default_factory=lambda: {r: [] for r in REGIONS})
    drift: list[int] = field(default_factory=list)
    edited: list[int] = field(default_factory=list)


class Ruler:
    """Measures models on fixed text, with the base model's log-probabilities in a file.

    They are in float16: normalised again, KL(base || base) is below 1e-6 nats.
    """

    def __init__(
        self, base: Any, texts: Texts, words: torch.Tensor, precision: str, file: Path
    ) -> None:
        self._texts = texts
        self._precision = precision
        self.counts = Counts()
        self._regions: list[torch.Tensor] = []
        self._edited: list[torch.Tensor] = []
        kept = []
        base.eval()
        for batch in texts.target:
            logits, labels = self._logits(base, batch)
            stats = stats_of(logits, labels)
            regions = _region(stats.nll, stats.entropy)
            self._regions.append(regions)
            for index, name in enumerate(REGIONS):
                self.counts.target[name].append(int((regions == index).sum()))
            self._edited.append(edited(labels, sure_and_right(logits, labels, K), words))
            self.counts.edited.append(int((self._edited[-1] != labels).sum()))
            kept.append(logits.float().log_softmax(-1).half())
        for batch in texts.drift:
            logits, labels = self._logits(base, batch)
            self.counts.drift.append(len(labels))
            kept.append(logits.float().log_softmax(-1).half())
        torch.save(kept, file)
        self._base = torch.load(file, mmap=True)
        self.base = self.measure(base, 0)

    @torch.no_grad()
    def measure(self, model: Any, step: int) -> Measured:
        """Measure a model after so many steps."""
        was_training = model.training
        model.eval()
        found = Measured(step)
        kept = iter(self._base)
        of_target = zip(self._texts.target, self._regions, self._edited, strict=True)
        for batch, regions, new in of_target:
            logits, labels = self._logits(model, batch)
            nll = stats_of(logits, labels).nll
            for index, name in enumerate(REGIONS):
                found.target_nll[name].append(float(nll[regions == index].double().sum()))
            changed = new != labels
            new_nll = stats_of(logits[changed], new[changed]).nll
            found.new_nll.append(float(new_nll.double().sum()))
            found.old_nll.append(float(nll[changed].double().sum()))
            found.target_kl.append(_kl(next(kept), logits))
        for batch in self._texts.drift:
            logits, labels = self._logits(model, batch)
            nll = stats_of(logits, labels).nll
            found.drift_nll.append(float(nll.double().sum()))
            found.drift_kl.append(_kl(next(kept), logits))
        model.train(was_training)
        return found

    @torch.no_grad()
    def _logits(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_of(model, batch, self._precision)


def logits_of(model: Any, batch: Batch, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and labels of the tokens that have a label, [tokens, V] and [tokens]."""
    device = batch.input_ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        valid = batch.labels != IGNORE_INDEX
        logits = model.get_output_embeddings()(hidden[valid])
    return logits, batch.labels[valid]


@torch.no_grad()
def stats_of(logits: torch.Tensor, labels: torch.Tensor) -> eaft_ext.TokenStats:
    """What is known of each token, whatever its weight."""
    _, stats = eaft_ext.gated_ce(logits, labels, K, gate=eaft_ext.NoGate(), return_stats=True)
    return stats


def _region(nll: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """Which of ``REGIONS`` each token is in."""
    regions = torch.where(sure(entropy, K), 0, 2)
    regions[confident_conflicts(nll, entropy, K)] = 1
    return regions


def _kl(base: torch.Tensor, logits: torch.Tensor) -> float:
    """KL(base || tuned), the sum over the tokens."""
    log_p = base.float().log_softmax(-1)
    log_q = logits.float().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
