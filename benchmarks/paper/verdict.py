"""Forgetting at equal target loss: frontiers, and how sure the difference of two losses is.

A run's path goes from the base model through its checkpoints; between two of them target loss and
forgetting are interpolated linearly. A loss's forgetting at a target loss is where its path first
comes down to it. Two losses are compared at the lowest target loss that both reach. The intervals
are of a bootstrap over what could have been otherwise: the seeds, paired, and the rows that are
measured on, the same for both losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .measurements import REGIONS
from .study import Run

Array = NDArray[np.float64]

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Path:
    """Sums over tokens of a run at each checkpoint and row, [checkpoints, rows]; and the counts."""

    steps: list[int]
    target_nll: Array
    target_kl: Array
    sure_nll: Array
    drift_nll: Array
    drift_kl: Array
    target_tokens: Array
    sure_tokens: Array
    drift_tokens: Array

    def target(self, rows: Any = slice(None)) -> Array:
        """The held-out loss of the target at each checkpoint, in nats a token."""
        return _mean(self.target_nll, self.target_tokens, rows)

    def sure(self, rows: Any = slice(None)) -> Array:
        """The same of the tokens that the base model was sure of."""
        return _mean(self.sure_nll, self.sure_tokens, rows)

    def kl_target(self, rows: Any = slice(None)) -> Array:
        """KL(base || tuned) on the held-out answers, in nats a token."""
        return _mean(self.target_kl, self.target_tokens, rows)

    def kl(self, rows: Any = slice(None)) -> Array:
        """KL(base || tuned) on the other text, in nats a token."""
        return _mean(self.drift_kl, self.drift_tokens, rows)

    def other(self, rows: Any = slice(None)) -> Array:
        """The loss on the other text, in nats a token."""
        return _mean(self.drift_nll, self.drift_tokens, rows)


def path_of(results: dict[str, Any], run: Run) -> Path | None:
    """The path of a run; None if it was not done."""
    found = results["runs"].get(run.name)
    if found is None:
        return None
    counts, measured = results["counts"], found["measured"]

    def rows(of: Any) -> Array:
        return np.array([of(one) for one in measured], dtype=np.float64)

    by_region = {r: rows(lambda one, r=r: one["target_nll"][r]) for r in REGIONS}
    return Path(
        steps=[one["step"] for one in measured],
        target_nll=sum(by_region.values(), start=np.zeros(())),
        target_kl=rows(lambda one: one["target_kl"]),
        sure_nll=by_region["sure"],
        drift_nll=rows(lambda one: one["drift_nll"]),
        drift_kl=rows(lambda one: one["drift_kl"]),
        target_tokens=np.sum([counts["target"][r] for r in REGIONS], axis=0, dtype=np.float64),
        sure_tokens=np.array(counts["target"]["sure"], dtype=np.float64),
        drift_tokens=np.array(counts["drift"], dtype=np.float64),
    )


def forgetting_at(level: float, target: Array, forgetting: Array) -> float | None:
    """The forgetting where a path first comes down to a target loss; None if it never does."""
    below = np.flatnonzero(target <= level)
    if not len(below):
        return None
    after = int(below[0])
    if after == 0:
        return float(forgetting[0])
    share = (target[after - 1] - level) / (target[after - 1] - target[after])
    return float(forgetting[after - 1] + share * (forgetting[after] - forgetting[after - 1]))


def frontier(level: float, paths: Iterable[Path]) -> float | None:
    """The least forgetting at a target loss, over the paths of one loss at several rates."""
    found = [forgetting_at(level, path.target(), path.kl()) for path in paths]
    return min((one for one in found if one is not None), default=None)


@dataclass(frozen=True)
class Comparison:
    """Forgetting of a loss divided by another's at equal target loss, with its interval.

    ``level`` is the mean target loss over the seeds; ``seeds`` how many there were.
    """

    ratio: float
    low: float
    high: float
    level: float
    seeds: int


def compare(pairs: list[tuple[Path, Path]], draws: np.random.Generator) -> Comparison | None:
    """Compare two losses, a pair of paths for each seed; None if they have no level in common."""
    whole = _ratio(pairs, slice(None), slice(None))
    if whole is None:
        return None
    target_rows = len(pairs[0][0].target_tokens)
    drift_rows = len(pairs[0][0].drift_tokens)
    ratios = []
    for _ in range(RESAMPLES):
        chosen = [pairs[i] for i in draws.integers(len(pairs), size=len(pairs))]
        targets = draws.integers(target_rows, size=target_rows)
        drifts = draws.integers(drift_rows, size=drift_rows)
        if (found := _ratio(chosen, targets, drifts)) is not None:
            ratios.append(found[0])
    low, high = np.percentile(ratios, INTERVAL)
    return Comparison(whole[0], float(low), float(high), whole[1], len(pairs))


def interval(values: Array, draws: np.random.Generator) -> tuple[float, float]:
    """Of the mean of [runs, items], had there been other runs and other items."""
    runs, items = values.shape
    means = []
    for _ in range(RESAMPLES):
        of_items = values[draws.integers(runs, size=runs)].mean(axis=0)
        means.append(of_items[draws.integers(items, size=items)].mean())
    low, high = np.percentile(means, INTERVAL)
    return float(low), float(high)


def _ratio(pairs: list[tuple[Path, Path]], targets: Any, drifts: Any) -> tuple[float, float] | None:
    """The ratio of the mean forgetting over the seeds, and the mean level."""
    found = []
    for one, other in pairs:
        losses = one.target(targets), other.target(targets)
        level = max(float(loss.min()) for loss in losses)
        if level >= losses[0][0]:  # one has learned nothing
            return None
        amounts = [
            forgetting_at(level, loss, path.kl(drifts))
            for loss, path in zip(losses, (one, other), strict=True)
        ]
        found.append((*amounts, level))
    mean = np.mean(np.array(found, dtype=np.float64), axis=0)
    return float(mean[0] / mean[1]), float(mean[2])


def _mean(sums: Array, tokens: Array, rows: Any) -> Array:
    """Of each checkpoint; NaN where there are no tokens."""
    count = float(tokens[rows].sum())
    return np.asarray(sums[:, rows].sum(axis=1) / (count or np.nan))
