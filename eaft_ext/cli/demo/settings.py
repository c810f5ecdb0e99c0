"""The options of one demo run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the command line asked for, with the device resolved."""

    model: str | None
    data: Path | None
    drift_data: Path | None
    output: Path
    steps: int
    seed: int
    k: int
    learning_rate: float
    batch_size: int
    sequence_length: int
    turns: str
    fused_linear: bool
    natural: bool
    device: str
