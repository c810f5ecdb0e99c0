"""The history of a training as a table and as a picture: what the gate did, over its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .palette import LOGGED

ROWS = 12
"""Steps in the table, at most, spread over the training."""

PERCENT = frozenset({"eaft_confident_conflicts"})
"""Shares, which are shown in percent."""

EVALUATION_MARKERS = "oDv^Ps"
"""One for each prefix of evaluations, in turn."""

Points = dict[int, float]
"""Values by their steps."""


@dataclass(frozen=True)
class Panel:
    """Quantities of one unit over the steps."""

    title: str
    unit: str
    names: tuple[str, ...]


PANELS = (
    Panel("Loss", "nats per token", ("loss", "eaft_nll")),
    Panel("Mean gate", "weight of a token", ("eaft_gate",)),
    Panel("Entropy of the largest k logits", "nats", ("eaft_entropy",)),
    Panel("Confident conflicts", "percent of tokens", ("eaft_confident_conflicts",)),
)


def prefixes(history: Iterable[dict[str, Any]]) -> list[str]:
    """Return what stands before our names: "" of the training, "eval_" and others of evaluations.

    That of the training is the first.
    """
    names = {name for entry in history for name in entry}
    return sorted({name.removesuffix("eaft_gate") for name in names if name.endswith("eaft_gate")})


def points(history: Iterable[dict[str, Any]], name: str) -> Points:
    """Return what was logged by a name, in the order of the steps; of a step, the last."""
    scale = 100.0 if any(name.endswith(share) for share in PERCENT) else 1.0
    found = {entry["step"]: scale * entry[name] for entry in history if name in entry}
    return {step: found[step] for step in sorted(found)}


def print_log(console: Any, history: list[dict[str, Any]]) -> None:
    """Print a table of some steps, and from where to where the training and evaluations went."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    view = Table("", "step", box=SIMPLE_HEAD)
    for name, paint in LOGGED.items():
        view.add_column(f"{paint.title}{' %' if name in PERCENT else ''}")
    for column in view.columns[1:]:
        column.justify = "right"
    ends = []
    for prefix in prefixes(history):
        columns = [points(history, prefix + name) for name in LOGGED]
        steps = list(points(history, f"{prefix}eaft_gate"))
        title = escape(_shown_prefix(prefix))
        if not prefix:
            for step in _spread(steps):
                values = [_shown(column.get(step)) for column in columns]
                view.add_row(title, str(step), *values)
        first, last = steps[0], steps[-1]
        if first == last:
            values = [_shown(column.get(last)) for column in columns]
            ends.append([title, str(last), *values])
            continue
        values = [
            f"{_shown(column.get(first))} -> {_shown(column.get(last))}" for column in columns
        ]
        ends.append([title, f"{first} -> {last}", *values])
    view.add_section()
    for row in ends:
        view.add_row(*row)
    console.print(view)
    console.print(
        "Means over the tokens since the log before, in nats but for the gate and the share of "
        "conflicts; the losses of training and evaluation are gated.",
        highlight=False,
    )


def _spread(steps: list[int]) -> list[int]:
    """At most ``ROWS`` of them, the first and the last among them."""
    if len(steps) <= ROWS:
        return steps
    return [steps[round(row * (len(steps) - 1) / (ROWS - 1))] for row in range(ROWS)]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _shown_prefix(prefix: str) -> str:
    """What a prefix stands for: "eval_" of an evaluation, "eval_code_" of that of a data set."""
    if not prefix:
        return "training"
    return f"evaluation {prefix.removeprefix('eval_').rstrip('_')}".rstrip()


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """Write the picture: losses, gate, entropy and share of conflicts over the steps.

    A line is of the training; hollow points, in the same colour, are of evaluations.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(2, 2, figsize=(11, 7.4), dpi=120, sharex=True)
    try:
        for panel, axes in zip(PANELS, all_axes.flat, strict=True):
            for name in panel.names:
                for number, prefix in enumerate(prefixes(history)):
                    _draw_points(axes, points(history, prefix + name), name, prefix, number)
            axes.set(title=panel.title, ylabel=panel.unit)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(frameon=False)
        for axes in all_axes[-1]:
            axes.set_xlabel("training step")
        figure.tight_layout()
        figure.savefig(path)
    finally:
        pyplot.close(figure)


def _draw_points(axes: Any, found: Points, name: str, prefix: str, number: int) -> None:
    values = [value if math.isfinite(value) else math.nan for value in found.values()]
    if all(map(math.isnan, values)):
        return
    paint = LOGGED[name]
    # A single point has no line to be seen.
    style: dict[str, Any] = {"linewidth": 1.8, "marker": paint.sign if len(found) == 1 else ""}
    title = paint.title
    if prefix:
        marker = EVALUATION_MARKERS[number % len(EVALUATION_MARKERS)]
        style = {"linestyle": "", "marker": marker, "markerfacecolor": "white", "markersize": 6}
        title = f"{paint.title}, {_shown_prefix(prefix)}"
    axes.plot(list(found), values, color=paint.light, label=title, **style)
