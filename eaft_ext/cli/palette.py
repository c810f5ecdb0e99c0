"""Names and colours: the same in the report, the plots, the demo and the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paint:
    """What something is called, its colours on light and on dark ground, and its sign.

    The sign says in print, or to who does not see the colour, what the colour says.
    """

    title: str
    light: str
    dark: str
    sign: str


LOSSES = {
    "sft": Paint("cross-entropy (SFT)", "#e76f51", "#f4a261", "o"),
    "eaft": Paint("EAFT", "#1b4f8a", "#7fb3ff", "s"),
    "mask": Paint("conflict mask", "#2a9d8f", "#5fd3c4", "D"),
    "dft": Paint("DFT (weight p)", "#b8860b", "#e9c46a", "^"),
    "eaft3": Paint("EAFT, alpha 3", "#7048a8", "#c3a6f5", "v"),
    "sigmoid": Paint("EAFT, sigmoid", "#0e7490", "#67d3ec", "P"),
    "shuffled": Paint("EAFT's gates, shuffled", "#6c757d", "#adb5bd", "X"),
}
"""By the losses' short names. Signs are matplotlib's markers."""

REGIONS = {
    "conflict": Paint("confident conflict", "#c2255c", "#ff8fb8", "\N{MULTIPLICATION X}"),
    "known": Paint("known", "#495057", "#ced4da", "\N{BLACK CIRCLE}"),
    "unlikely": Paint(
        "uncertain, unlikely", "#6741d9", "#b9a5ff", "\N{BLACK UP-POINTING TRIANGLE}"
    ),
    "open": Paint("uncertain, likely", "#237032", "#8ce99a", "\N{WHITE CIRCLE}"),
}
"""Of the plane of probability and entropy, by their names in ``eaft_ext._landscape.REGIONS``."""

REGION_BOUNDS = {
    "conflict": "p < 0.1, H < 0.3 ln k",
    "known": "p >= 0.1, H < 0.3 ln k",
    "unlikely": "p < 0.1, H >= 0.3 ln k",
    "open": "p >= 0.1, H >= 0.3 ln k",
}

LOGGED = {
    "loss": Paint("loss", LOSSES["eaft"].light, LOSSES["eaft"].dark, "s"),
    "eaft_nll": Paint("cross-entropy (nll)", LOSSES["sft"].light, LOSSES["sft"].dark, "o"),
    "eaft_gate": Paint("gate", LOSSES["eaft"].light, LOSSES["eaft"].dark, "s"),
    "eaft_entropy": Paint("entropy", REGIONS["unlikely"].light, REGIONS["unlikely"].dark, "^"),
    "eaft_confident_conflicts": Paint(
        "confident conflicts", REGIONS["conflict"].light, REGIONS["conflict"].dark, "X"
    ),
}
"""What a training logs, by the names in its log. Signs are matplotlib's markers."""
