"""What a model knows of the target text, and how far it has drifted from the base model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import eaft_ext
from eaft_ext._conflicts import confident_conflicts
from eaft_ext.cli.batches import IGNORE_INDEX, Batch

from .planted import sure_and_right
from .precision import forward

ROWS_AT_ONCE = 128
"""Rows of logits whose float32 log-probabilities are held at the same time."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements after ``step`` steps, in nats per token.

    ``conflict_loss`` is the loss on those held-out tokens that are confident conflicts of the base
    model, ``sure_loss`` on those that it is sure of and right about; None if there are none.
    """

    step: int
    target_loss: float
    conflict_loss: float | None
    sure_loss: float | None
    drift_loss: float
    drift_kl: float


class Evaluator:
    """Measures models against the base model on fixed text.

    ``base`` is measured once. Of its predictions on the drift text the log-probabilities are
    kept, in float16: normalised again in float32 they give KL(base || base) below 1e-6.
    """

    def __init__(self, base: Any, target: list[Batch], drift: list[Batch], k: int) -> None:
        self._target = target
        self._drift = drift
        self._conflicts: list[torch.Tensor] = []
        self._sure: list[torch.Tensor] = []
        self._base_log_probs: list[torch.Tensor] = []
        target_nll, drift_nll = [], []
        for batch in target:
            logits = forward(base, batch)
            nll, entropy = _token_stats(logits, batch, k)
            target_nll.append(nll)
            valid = batch.labels != IGNORE_INDEX
            self._sure.append(sure_and_right(logits, batch.labels, k)[valid])
            self._conflicts.append(confident_conflicts(nll, entropy, k))
        for batch in drift:
            logits = forward(base, batch)
            drift_nll.append(_token_stats(logits, batch, k)[0])
            self._base_log_probs.extend(rows.half() for rows in _log_probs(logits, batch))
        self._k = k
        self.base = self._evaluation(0, target_nll, drift_nll, drift_kl=0.0)

    def measure(self, model: Any, step: int) -> Evaluation:
        """Return the measurements of ``model``, which has been tuned for ``step`` steps."""
        training = model.training
        model.eval()
        target_nll = [
            _token_stats(forward(model, batch), batch, self._k)[0] for batch in self._target
        ]
        drift_nll: list[torch.Tensor] = []
        divergences: list[torch.Tensor] = []
        kept = iter(self._base_log_probs)
        for batch in self._drift:
            logits = forward(model, batch)
            drift_nll.append(_token_stats(logits, batch, self._k)[0])
            divergences.extend(
                _kl(next(kept).float().log_softmax(-1), tuned)
                for tuned in _log_probs(logits, batch)
            )
        model.train(training)
        return self._evaluation(step, target_nll, drift_nll, drift_kl=_mean(divergences))

    def _evaluation(
        self,
        step: int,
        target_nll: list[torch.Tensor],
        drift_nll: list[torch.Tensor],
        drift_kl: float,
    ) -> Evaluation:
        return Evaluation(
            step,
            target_loss=_mean(target_nll),
            conflict_loss=_mean_where(target_nll, self._conflicts),
            sure_loss=_mean_where(target_nll, self._sure),
            drift_loss=_mean(drift_nll),
            drift_kl=drift_kl,
        )

    def conflicts(self) -> int:
        """Return how many held-out tokens are confident conflicts of the base model."""
        return sum(int(mask.sum()) for mask in self._conflicts)


def _token_stats(logits: torch.Tensor, batch: Batch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (nll, entropy) of the tokens that are not ignored, each [tokens]."""
    _, stats = eaft_ext.gated_ce(logits, batch.labels, k, gate=eaft_ext.NoGate(), return_stats=True)
    return stats.nll[stats.valid], stats.entropy[stats.valid]


def _log_probs(logits: torch.Tensor, batch: Batch) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities [rows, V] of the tokens that are not ignored, in float32."""
    rows = logits[batch.labels != IGNORE_INDEX]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE].float().log_softmax(-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    divergence = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    return divergence.sum(-1)


def _mean_where(values: list[torch.Tensor], masks: list[torch.Tensor]) -> float | None:
    chosen = [of_batch[mask] for of_batch, mask in zip(values, masks, strict=True)]
    return _mean(chosen) if sum(map(len, chosen)) else None


def _mean(values: list[torch.Tensor]) -> float:
    return float(torch.cat(values).double().mean())
