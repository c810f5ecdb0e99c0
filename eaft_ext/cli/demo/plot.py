"""The picture of a demo run: what was learned, what was muted, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_ext.cli.palette import LOSSES

from .results import Results

# EAFT is drawn thin over a broad SFT, so that both are seen where they agree.
STYLES: dict[str, dict[str, Any]] = {
    "SFT": {"color": LOSSES["sft"].light, "linewidth": 5, "label": LOSSES["sft"].title},
    "EAFT": {
        "color": LOSSES["eaft"].light,
        "linewidth": 1.8,
        "marker": "o",
        "label": LOSSES["eaft"].title,
    },
}


@dataclass(frozen=True)
class Panel:
    """One quantity over the steps of the runs."""

    quantity: str
    title: str
    unit: str


LEARNED = Panel("target_loss", "What was learned: loss on held-out target text", "nats per token")
MUTED = Panel("conflict_loss", "What EAFT mutes: loss on its confident conflicts", "nats per token")
KNOWN = Panel(
    "sure_loss", "What was known: loss where the base is sure and right", "nats per token"
)
COST = Panel(
    "drift_kl", "What it cost: drift from the base model on other text", "KL(base || tuned)"
)


def panels_of(results: Results) -> list[Panel]:
    """Return what says most of the labels as they are, or of labels of which some are wrong."""
    chosen = (LEARNED, MUTED if results.settings.natural else KNOWN, COST)
    return [panel for panel in chosen if getattr(results.base, panel.quantity) is not None]


def write_plot(results: Results, path: Path) -> None:
    """Save the plot as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = panels_of(results)
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.8), dpi=120)
    for panel, axes in zip(panels, all_axes, strict=True):
        states = [f"base {getattr(results.base, panel.quantity):.3f}"]
        for run in results.runs:
            steps = [point.step for point in run.evaluations]
            values = [getattr(point, panel.quantity) for point in run.evaluations]
            axes.plot(steps, values, **STYLES[run.name])
            states.append(f"{run.name} {values[-1]:.3f}")
        axes.set(title=f"{panel.title}\n{', '.join(states)}", ylabel=panel.unit)
        axes.set_xlabel("training step")
        axes.title.set_fontsize(10.5)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    state = " (interrupted)" if results.interrupted else ""
    texts = results.texts
    figure.suptitle(f"{texts['model']} tuned on: {texts['target']}{state}\n{texts['labels']}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
