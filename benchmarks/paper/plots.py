"""Pictures of the results: frontiers, and the gradient over the plane of the paper."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from eaft_ext.cli.palette import LOSSES as PAINTS

from .report import seeds_of
from .study import ARMS, PRESETS, Run, runs_of
from .verdict import path_of
from .weights import LOSSES

STAMP = "Source"
SMOOTHED = 20
"""Steps of which a training loss is shown as the mean."""
DOTS_PER_INCH = 110
SHOWN = ("sft", "eaft", "mask", "dft", "shuffled")
"""The losses whose frontiers are drawn."""

MARKERS = "osD^"
TITLES = {"natural": "The labels as they are", "planted": "A fifth of the known labels are wrong"}


def stamp(results: dict[str, Any]) -> str:
    """What tells one result from another."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def frontiers(results: dict[str, Any]) -> Figure:
    """Forgetting against the held-out target loss; a marker for each rate, thin for other seeds."""
    preset = PRESETS[results["preset"]]
    figure = Figure((11, 5), dpi=DOTS_PER_INCH, layout="constrained")
    for panel, arm in zip(figure.subplots(1, len(ARMS)), ARMS, strict=True):
        for loss in SHOWN:
            for rate, marker in zip(preset.rates, MARKERS, strict=False):
                for seed in range(preset.seeds):
                    path = path_of(results, Run(arm, loss, rate, seed))
                    if path is None:
                        continue
                    label = f"{LOSSES[loss].title}, {rate:g}" if seed == 0 else None
                    style = {
                        "color": PAINTS[loss].light,
                        "marker": marker,
                        "markersize": 4,
                        "label": label,
                    }
                    panel.plot(path.target(), path.kl(), alpha=0.4 if seed else 1, **style)
        panel.set(title=TITLES[arm], xlabel="held-out target loss, nats a token")
        panel.set_yscale("symlog", linthresh=0.05)
        panel.set_ylabel("forgetting: KL(base || tuned) on WikiText, nats a token")
        losses = [
            path.target()
            for run in runs_of(preset)
            if run.arm == arm and (path := path_of(results, run)) is not None
        ]
        start = float(losses[0][0])
        panel.set_xlim(1.05 * start, min(map(min, losses)) - 0.05 * start)
        panel.grid(alpha=0.3)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    title = f"{results['model']} on GSM8K: lower and further right is better"
    figure.suptitle(f"{title}; what leaves to the left has lost the target")
    return figure


def regions(results: dict[str, Any]) -> Figure:
    """The share of the gradient's norm in each region, for the untouched model."""
    shown = [
        (name, gate) for name in results["runs"] if "-sft-" in name for gate in ("sft", "eaft")
    ]
    figure = Figure((11, 8), dpi=DOTS_PER_INCH, layout="constrained")
    columns = len(shown) // 2
    for panel, (name, gate) in zip(figure.subplots(2, columns).flat, shown, strict=True):
        cells = np.array(results["runs"][name]["start"][gate])
        share = 100 * cells / cells.sum()
        panel.imshow(share, origin="lower", norm=LogNorm(0.1, 100), cmap="Blues")
        for (row, column), value in np.ndenumerate(share):
            dark = "white" if value > 10 else "black"
            panel.text(column, row, f"{value:.1f}", ha="center", va="center", color=dark)
        arm = name.partition("-")[0]
        panel.set_title(f"{TITLES[arm]}: {LOSSES[gate].title}", fontsize=10)
        for axis, edges in ((panel.xaxis, "probability"), (panel.yaxis, "entropy")):
            names = [f"{a:g} to {b:g}" for a, b in pairwise(results[edges])]
            axis.set_ticks(range(len(names)), names, fontsize=8)
        panel.set(xlabel="p(label)", ylabel="H / ln k")
    figure.suptitle("Share of the gradient's norm before training, in percent")
    return figure


def muted(results: dict[str, Any]) -> Figure:
    """Training loss, smoothed, and held-out loss: a line for each seed, with and without."""
    figure = Figure((11, 4), dpi=DOTS_PER_INCH, layout="constrained")
    training, held_out = figure.subplots(1, 2)
    styles = zip(seeds_of(results).items(), ("sft", "eaft"), ("-", "--"), strict=False)
    for (share, runs), paint, line in styles:
        for number, run in enumerate(runs):
            label = f"drop_below={share}" if number == 0 else None
            style = {"color": PAINTS[paint].light, "linestyle": line, "alpha": 0.7, "label": label}
            loss = np.array(run["steps"]["loss"])
            width = min(SMOOTHED, len(loss))
            means = np.convolve(loss, np.full(width, 1 / width), "valid")
            training.plot(np.arange(width, len(loss) + 1), means, **style)
            steps = [one["step"] for one in run["measured"]]
            nll = [one["nll"] for one in run["measured"]]
            held_out.plot(steps, nll, marker=PAINTS[paint].sign, markersize=4, **style)
    training.set(xlabel="step", ylabel="EAFT loss", title=f"Training, means of {SMOOTHED} steps")
    held_out.set(xlabel="step", ylabel="nats a token", title="Held-out cross-entropy")
    for panel in (training, held_out):
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    return figure
