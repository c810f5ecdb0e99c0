"""The landscape: how many tokens are where, what each region is, and what the gate keeps of it."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import torch

import eaft_ext
from eaft_ext._conflicts import CONFLICT_ENTROPY, CONFLICT_PROBABILITY
from eaft_ext._landscape import CELLS, FAINTEST, REGIONS, counts
from eaft_ext.cli.palette import REGIONS as PAINTS
from eaft_ext.cli.written import written_whole

from .shares import Columns, kept, shares

LEVELS = (0.25, 0.5, 0.75)
"""Of the gate, where a line is drawn."""

THEMES: dict[str, dict[str, Any]] = {
    "light": {"ink": "#212529", "ground": "#ffffff", "colours": "Blues"},
    "dark": {"ink": "#e9ecef", "ground": "#14171a", "colours": "Blues_r"},
}
PLACES = {
    "conflict": ((0.05, 0.1), (0.13, 0.03), "left"),
    "known": ((0.95, 0.1), (0.87, 0.03), "right"),
    "unlikely": ((0.05, 0.9), (0.13, 0.97), "left"),
    "open": ((0.9, 0.93), (0.988, 0.97), "right"),
}
"""A point of each region; where its name is written, beside the tokens; its alignment."""


def landscape_svg(columns: Columns, gate: eaft_ext.EntropyGate, theme: str) -> str:
    """Return the landscape as an SVG element, the same for the same tokens."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": theme, **_ink(THEMES[theme])}
    with matplotlib.rc_context(settings):
        figure = Figure((7.2, 5.6), layout="constrained")
        figure.patch.set_alpha(0)
        draw_landscape(figure, figure.subplots(), columns, gate, theme)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def write_plot(columns: Columns, gate: eaft_ext.EntropyGate, title: str, path: Path) -> None:
    """Save the landscape, and bars of what each region has, as the suffix says: PNG, SVG, PDF."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_ink(THEMES["light"])):
        figure = Figure((13, 5.8), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1))
        draw_landscape(figure, left, columns, gate, "light")
        draw_bars(right, columns, gate)
        figure.suptitle(title, fontsize=11)
        with written_whole(path, "--plot") as unfinished:
            figure.savefig(unfinished)


def draw_landscape(
    figure: Any, axes: Any, columns: Columns, gate: eaft_ext.EntropyGate, theme: str
) -> None:
    """The density of tokens over probability and entropy, the regions, and lines of the gate."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    look = THEMES[theme]
    everywhere = torch.ones(len(columns), dtype=torch.bool)
    found = counts(columns.nll, columns.entropy, columns.k, everywhere).numpy()
    edges = torch.linspace(0, 1, CELLS + 1).numpy()
    ramp = colormaps[look["colours"]](torch.linspace(FAINTEST, 1, 256).numpy())
    mesh = axes.pcolormesh(
        edges,
        edges,
        np.ma.masked_equal(found, 0),
        cmap=LinearSegmentedColormap.from_list("landscape", ramp),
        norm=LogNorm(1, max(2, int(found.max()))),
        edgecolors="face",
        linewidth=0.2,
    )
    figure.colorbar(mesh, ax=axes, label="tokens in a cell", pad=0.02)
    axes.axvline(CONFLICT_PROBABILITY, color=look["ink"], linewidth=0.8)
    axes.axhline(CONFLICT_ENTROPY, color=look["ink"], linewidth=0.8)
    _draw_gate(axes, columns, gate, theme)
    of = shares(columns)
    for name, (point, place, side) in PLACES.items():
        paint = PAINTS[name]
        colour = getattr(paint, theme)
        axes.annotate(
            f"{paint.sign} {paint.title}\n{of[name].of_tokens:.1%} of tokens",
            point,
            place,
            ha=side,
            va="bottom" if place[1] < 0.5 else "top",
            color=colour,
            fontsize=9,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": colour, "shrinkB": 0},
            bbox={"facecolor": look["ground"], "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="p(label)", ylabel="H / ln k")


def _draw_gate(axes: Any, columns: Columns, gate: eaft_ext.EntropyGate, theme: str) -> None:
    """Lines where the gate, which knows the entropy alone, has a level."""
    look = THEMES[theme]
    ground = {"facecolor": look["ground"], "edgecolor": "none", "pad": 0.8}
    for level in LEVELS:
        entropy = level ** (1 / gate.alpha) * (gate.normalizer or math.log(columns.k))
        height = entropy / math.log(columns.k)
        if height >= 1:
            continue
        axes.axhline(height, color=look["ground"], linewidth=2.5)
        axes.axhline(height, color=look["ink"], linewidth=1, linestyle="dashed")
        axes.text(0.5, height, f"gate {level:g}", fontsize=8, ha="center", va="center", bbox=ground)


def draw_bars(axes: Any, columns: Columns, gate: eaft_ext.EntropyGate) -> None:
    """What each region has: of tokens, of the loss, and of the gradient under each gate."""
    of = shares(columns)
    by_gate = kept(columns, gate)
    bars: dict[str, dict[str, float]] = {
        "tokens": {name: of[name].of_tokens for name in REGIONS},
        "cross-entropy": {name: of[name].of_loss for name in REGIONS},
    }
    for one in by_gate.values():
        bars[f"gradient, {one.title}"] = one.share
    hatches = dict(zip(REGIONS, ("xxx", "", "///", "..."), strict=True))
    labels = list(bars)[::-1]
    left = torch.zeros(len(bars))
    for name in REGIONS:
        paint = PAINTS[name]
        widths = torch.tensor([100 * bars[label][name] for label in labels]).nan_to_num()
        drawn = axes.barh(
            labels,
            widths.numpy(),
            left=left.numpy(),
            color=paint.light,
            hatch=hatches[name],
            edgecolor="white",
            label=f"{paint.sign} {paint.title}",
        )
        texts = [f"{width:.0f}" if width >= 4 else "" for width in widths.tolist()]
        axes.bar_label(
            drawn,
            texts,
            label_type="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
        left += widths
    axes.set(xlim=(0, 100), xlabel="percent, by region")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=9)


def _ink(look: dict[str, Any]) -> Any:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {**dict.fromkeys(names, look["ink"]), "axes.facecolor": "none"}
