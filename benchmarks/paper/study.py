"""What a study trains on what, and in which order: presets, and the runs that they ask for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .weights import LOSSES

ARMS = ("natural", "planted")
"""As the answers are; and with wrong labels where the base model is sure and right."""
EDITED = "counterfactual"
"""With words that the base model is sure of and right about replaced, always by the same ones."""


@dataclass(frozen=True)
class Preset:
    """Sizes. A step takes ``rows_a_step`` answers, out of ``rows`` that come again in each epoch.

    ``rates`` begin with the one that all seeds and candidates run at. Held-out answers are counted
    in rows, the text that shows forgetting in tokens.
    """

    rows: int
    rows_a_step: int
    length: int
    measured_at: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: int
    target_rows: int
    drift_tokens: int
    losses: tuple[str, ...]
    candidates: tuple[str, ...]
    arms: tuple[str, ...] = ARMS
    warmup: int = 10


PRESETS = {
    # Seconds, of a model of a test.
    "tiny": Preset(
        rows=4,
        rows_a_step=2,
        length=128,
        measured_at=(1, 2),
        rates=(1e-2, 1e-3),
        seeds=2,
        target_rows=2,
        drift_tokens=64,
        losses=("sft", "eaft"),
        candidates=tuple(name for name in LOSSES if name not in ("sft", "eaft")),
        warmup=1,
    ),
    # Some 30 minutes of two CPU cores.
    "small": Preset(
        rows=40,
        rows_a_step=2,
        length=256,
        measured_at=(10, 20, 30),
        rates=(1e-4, 3e-4),
        seeds=1,
        target_rows=16,
        drift_tokens=1024,
        losses=("sft", "eaft", "mask", "dft", "shuffled"),
        candidates=(),
    ),
    # Some three hours of them.
    "medium": Preset(
        rows=80,
        rows_a_step=2,
        length=256,
        measured_at=(12, 24, 48),
        rates=(1e-4, 3e-4, 3e-5),
        seeds=3,
        target_rows=20,
        drift_tokens=1536,
        losses=("sft", "eaft", "mask", "dft", "shuffled"),
        candidates=("corner", "falling", "habit", "random", "eaft3", "sigmoid"),
    ),
    # A GPU: the paper's losses, five seeds, four rates.
    "full": Preset(
        rows=2000,
        rows_a_step=8,
        length=512,
        measured_at=(60, 125, 250, 500, 1000),
        rates=(1e-4, 3e-4, 3e-5, 1e-3),
        seeds=5,
        target_rows=400,
        drift_tokens=32768,
        losses=tuple(LOSSES),
        candidates=(),
    ),
}


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    arm: str
    loss: str
    rate: float
    seed: int
    precision: str = "bfloat16"

    @property
    def name(self) -> str:
        """Unlike that of every other run of a study."""
        return f"{self.arm}-{self.loss}-{self.rate:g}-seed{self.seed}-{self.precision}"


def runs_of(preset: Preset) -> list[Run]:
    """Those that say most first: one seed at two rates, other seeds, candidates, other rates."""

    def grid(losses: tuple[str, ...], rates: tuple[float, ...], seeds: range) -> list[Run]:
        product = itertools.product(seeds, rates, losses, preset.arms)
        return [Run(arm, loss, rate, seed) for seed, rate, loss, arm in product]

    first, others = preset.rates[:1], preset.rates[1:]
    runs = grid(preset.losses, preset.rates[:2], range(1))
    runs += grid(preset.losses, first, range(1, preset.seeds))
    # Whether bfloat16 changes anything.
    runs += [Run("planted", loss, preset.rates[0], 0, "float32") for loss in preset.losses[:2]]
    runs += grid(preset.candidates, first, range(1))
    losses = (*preset.losses, *preset.candidates)
    runs += [Run(EDITED, loss, preset.rates[0], 0) for loss in losses]
    runs += grid(preset.losses, others[1:], range(1))
    return runs
