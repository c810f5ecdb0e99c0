"""What a demo run found: the comparison, the table and the files that hold every number."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from eaft_ext._conflicts import CONFLICT_ENTROPY, CONFLICT_PROBABILITY

from .evaluation import Evaluation
from .memory import DEFINITIONS, LossMemory, NotMeasured
from .settings import Settings
from .training import TOLERANCE, Run, Step


@dataclass
class Results:
    """Everything measured so far. ``environment`` and ``texts`` describe what was run on what.

    ``memory`` is None unless the output layer is fused with the loss.
    """

    settings: Settings
    environment: dict[str, str]
    texts: dict[str, str]
    base: Evaluation
    held_out_conflicts: int
    runs: list[Run]
    interrupted: bool = False
    seconds: float = 0.0
    memory: LossMemory | NotMeasured | None = None

    def largest_difference(self) -> float:
        """Return the fused loss's largest distance from the reference over all steps, relative."""
        return max((step.difference for run in self.runs for step in run.steps), default=0.0)


@dataclass(frozen=True)
class EqualLoss:
    """The drift of each run, by name, where its held-out target loss first was ``target_loss``."""

    target_loss: float
    drift_kl: dict[str, float]


def at_equal_loss(runs: list[Run]) -> EqualLoss | None:
    """Compare drift at the lowest held-out loss that every run reached.

    Between two measurements both quantities are interpolated linearly. Returns None unless there
    are two runs and each has improved on the base model.
    """
    if len(runs) < 2 or not all(run.evaluations for run in runs):
        return None
    level = max(min(point.target_loss for point in run.evaluations) for run in runs)
    if level >= runs[0].evaluations[0].target_loss:
        return None
    return EqualLoss(level, {run.name: _drift_at(level, run.evaluations) for run in runs})


def _drift_at(level: float, points: list[Evaluation]) -> float:
    first = next(index for index, point in enumerate(points) if point.target_loss <= level)
    before, after = points[first - 1], points[first]
    share = (before.target_loss - level) / (before.target_loss - after.target_loss)
    return before.drift_kl + share * (after.drift_kl - before.drift_kl)


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the final table, one column for each run."""
    base = results.base
    runs = [run for run in results.runs if run.steps]
    rows: list[list[str]] = []

    def add(label: str, of_base: str, of_run: Callable[[Run], str]) -> None:
        rows.append([label, of_base, *(of_run(run) for run in runs)])

    def mean(name: str, run: Run) -> float:
        values: list[float] = [getattr(step, name) for step in run.steps]
        return sum(values) / len(values)

    add("after steps", "0", lambda run: str(run.evaluations[-1].step))
    add(
        "held-out target loss (nats/token)",
        f"{base.target_loss:.4f}",
        lambda run: f"{run.evaluations[-1].target_loss:.4f}",
    )
    add(
        "  on its confident conflicts",
        _optional_loss(base.conflict_loss),
        lambda run: _optional_loss(run.evaluations[-1].conflict_loss),
    )
    add(
        "  where the base is sure and right",
        _optional_loss(base.sure_loss),
        lambda run: _optional_loss(run.evaluations[-1].sure_loss),
    )
    add(
        "drift: KL(base || tuned) (nats/token)",
        "0",
        lambda run: f"{run.evaluations[-1].drift_kl:.4f}",
    )
    add(
        "drift: change in loss (nats/token)",
        "0",
        lambda run: f"{run.evaluations[-1].drift_loss - base.drift_loss:+.4f}",
    )
    equal = at_equal_loss(runs)
    if equal is not None:
        add(
            f"drift KL at equal target loss {equal.target_loss:.4f}",
            "",
            lambda run: f"{equal.drift_kl[run.name]:.4f}",
        )
    add("mean gate in training", "", lambda run: f"{mean('gate', run):.3f}")
    add("confident conflicts in training", "", lambda run: f"{mean('conflicts', run):.2%}")
    add(
        "largest |fused - reference| / loss",
        "",
        lambda run: f"{max(step.difference for step in run.steps):.1e}",
    )
    add(
        "seconds per step (median)",
        "",
        lambda run: f"{statistics.median(step.seconds for step in run.steps):.2f}",
    )
    return ["", "base", *(run.name for run in runs)], rows


def explanation(results: Results) -> list[str]:
    """Return the sentences that say what the table's rows mean."""
    fused = results.settings.fused_linear
    sentences = [
        f"Target: {results.texts['held-out']}. Drift: {results.texts['drift']}.",
        f"Trained on {results.texts['labels']}; all held-out labels are right.",
        f"Confident conflicts: tokens with p(y) < {CONFLICT_PROBABILITY} and entropy below "
        f"{CONFLICT_ENTROPY} ln {results.settings.k}; of the held-out tokens "
        f"{results.held_out_conflicts}, as the base model sees them.",
        f"At every step {'linear_gated_ce' if fused else 'gated_ce'} was checked against "
        f"eaft_ext.reference on the same logits (tolerance {TOLERANCE:.0e}).",
        "Short runs show the mechanism; differences of a few percent change with the seed.",
    ]
    if results.memory is not None:
        sentences.append(results.memory.sentence())
    return sentences


def write_json(results: Results, path: Path) -> None:
    """Write every raw number."""
    content = {
        "settings": {key: _plain(value) for key, value in asdict(results.settings).items()},
        "environment": results.environment,
        "texts": results.texts,
        "definitions": {
            "losses": "nats per token",
            "conflict_loss": "loss on held-out tokens that are conflicts of the base model",
            "sure_loss": "loss on held-out tokens that the base model is sure of and right about",
            "drift_kl": "KL(base || tuned), nats per token",
            "conflicts": f"share of tokens with p(y) < {CONFLICT_PROBABILITY} "
            f"and H < {CONFLICT_ENTROPY} ln k",
            "difference": "|loss - reference_loss| / max(1, reference_loss)",
            **(DEFINITIONS if results.memory else {}),
        },
        "interrupted": results.interrupted,
        "seconds": results.seconds,
        "tolerance": TOLERANCE,
        "largest_difference": results.largest_difference(),
        "held_out_conflicts": results.held_out_conflicts,
        **({"memory": results.memory.as_json()} if results.memory else {}),
        "base": asdict(results.base),
        "runs": {
            run.name: {
                "steps": [asdict(step) | {"difference": step.difference} for step in run.steps],
                "evaluations": [asdict(point) for point in run.evaluations],
            }
            for run in results.runs
        },
        "at_equal_target_loss": _optional(at_equal_loss(results.runs)),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_csv(results: Results, path: Path) -> None:
    """Write one line for each run and step, with the measurements where there are any."""
    step_columns = [field.name for field in fields(Step)]
    measured_columns = [field.name for field in fields(Evaluation) if field.name != "step"]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(
            stream, ["run", *step_columns, "difference", *measured_columns], lineterminator="\n"
        )
        writer.writeheader()
        for run in results.runs:
            steps = {
                step.step: asdict(step) | {"difference": step.difference} for step in run.steps
            }
            points = {point.step: asdict(point) for point in run.evaluations}
            for number in sorted(steps.keys() | points.keys()):
                line = {"run": run.name, **points.get(number, {}), **steps.get(number, {})}
                writer.writerow(line)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _optional(value: EqualLoss | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _optional_loss(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"
