"""The gates that are set beside one another, under the losses' short names."""

from __future__ import annotations

import eaft_ext
from eaft_ext._conflicts import CONFLICT_ENTROPY, CONFLICT_PROBABILITY

GATES: dict[str, eaft_ext.Gate] = {
    "sft": eaft_ext.NoGate(),
    "eaft": eaft_ext.EntropyGate(),
    "eaft3": eaft_ext.EntropyGate(alpha=3.0),
    "sigmoid": eaft_ext.SigmoidGate(),
    "mask": eaft_ext.ConflictGate(CONFLICT_ENTROPY, CONFLICT_PROBABILITY),
    "dft": eaft_ext.ProbabilityGate(),
}
