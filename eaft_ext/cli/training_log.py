"""What a training with ``EAFTCallback`` has left of its log: read, and reported.

A history is a list of entries as in the ``log_history`` of a Trainer: numbers by their names, and
the ``step``. What is of an evaluation has a prefix, most often ``eval_``.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CommandError
from .options import require_extras
from .training_report import draw, print_log
from .written import written_whole

__all__ = ["draw", "print_log", "read_log", "run_log"]

History = list[dict[str, Any]]
STATE, JSONL, EVENTS = "trainer_state.json", "trainer_log.jsonl", "events.out.tfevents.*"


def run_log(folder: Path, plot: Path | None, console: Any) -> None:
    """Print the table of the training in ``folder``, and write its picture to ``plot``.

    Raises:
        CommandError: there is no such log, or the picture cannot be written.
    """
    require_extras(("rich",) if plot is None else ("rich", "matplotlib"))
    found = _find(folder)
    console.print(f"The log of {found.source}", highlight=False, markup=False)
    print_log(console, found.history)
    if plot is None:
        return
    with written_whole(plot, "--plot") as unfinished:
        draw(found.history, unfinished)
    console.print(f"Its picture is {plot}", highlight=False, markup=False)


def read_log(folder: Path) -> History:
    """Return the history of the training in ``folder``.

    It is that of the trainer's state, there or in the newest checkpoint, of LLaMA-Factory's
    ``trainer_log.jsonl``, or of TensorBoard's files there or in a folder below: of these, the one
    with most steps that have our values.

    Raises:
        CommandError: none has any.
    """
    return _find(folder).history


@dataclass
class _Found:
    source: Path
    history: History = field(default_factory=list)
    problem: str = ""
    """Why it could not be read, if so."""

    @property
    def steps(self) -> int:
        """Those with values of the callback, which logs all of them or none."""
        ours = (e for e in self.history if any(name.endswith("eaft_gate") for name in e))
        return len({entry["step"] for entry in ours})


def _find(folder: Path) -> _Found:
    if not folder.is_dir():
        raise CommandError(f"{folder} is not a folder: pass the output_dir of a training")
    found = [*_states(folder), *_llama_factory(folder), *_tensorboard(folder)]
    best = max(found, key=lambda one: one.steps, default=None)  # of equals, the first
    if best is None:
        raise CommandError(
            f"no log in {folder}: pass the output_dir of a training, which has a {STATE}, a "
            "checkpoint or TensorBoard's files"
        )
    if best.steps > 0:
        return best
    for one in found:
        if one.problem:
            raise CommandError(f"cannot read {one.source}: {one.problem}")
    raise CommandError(
        f"{best.source} has no values of EAFTCallback, such as eaft_gate: train with "
        "callbacks=[EAFTCallback()]"
    )


def _states(folder: Path) -> Iterator[_Found]:
    """The state in the folder, and that of the newest checkpoint of which it can be read."""
    if (folder / STATE).is_file():
        yield _read_state(folder / STATE)
    numbers = {
        path: int(match[1])
        for path in folder.glob(f"checkpoint-*/{STATE}")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    }
    for path in sorted(numbers, key=numbers.__getitem__, reverse=True):
        found = _read_state(path)
        yield found
        if not found.problem:
            return


def _read_state(path: Path) -> _Found:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return _Found(path, problem=f"not the state of a trainer: {error}")
    entries = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(entries, list):
        return _Found(path, problem="not the state of a trainer: no log_history")
    return _Found(path, _entries(entries))


def _entries(entries: list[Any]) -> History:
    """Those with a step, of which numbers are left."""
    return [
        {
            name: value
            for name, value in entry.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("step"), int)
    ]


def _llama_factory(folder: Path) -> Iterator[_Found]:
    """Its lines have other names for some; one that is being written is left out."""
    path = folder / JSONL
    if not path.is_file():
        return
    entries = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                entries.append({"step": entry.get("current_steps"), **entry})
    except (OSError, ValueError) as error:
        yield _Found(path, problem=str(error))
        return
    yield _Found(path, _entries(entries))


def _tensorboard(folder: Path) -> Iterator[_Found]:
    """Each folder with TensorBoard's files is a training."""
    folders = sorted({path.parent for path in folder.rglob(EVENTS)})
    if folders and importlib.util.find_spec("tensorboard") is None:
        missing = "tensorboard is not installed: pip install tensorboard"
        yield _Found(folders[0], problem=missing)
        return
    for path in folders:
        yield _Found(path, _read_events(path))


def _read_events(folder: Path) -> History:
    from tensorboard.backend.event_processing import event_accumulator as events

    # All numbers, and one of all else, which is not looked at.
    kinds = (events.IMAGES, events.TENSORS, events.HISTOGRAMS, events.AUDIO)
    sizes = {events.SCALARS: 0, **dict.fromkeys(kinds, 1)}
    accumulator = events.EventAccumulator(str(folder), size_guidance=sizes)
    accumulator.Reload()
    by_step: dict[int, dict[str, Any]] = {}
    for tag in accumulator.Tags()[events.SCALARS]:
        group, _, name = tag.partition("/")
        # As the trainer of transformers names them.
        name = {"train": name, "eval": f"eval_{name}", "test": f"test_{name}"}.get(group, tag)
        for event in accumulator.Scalars(tag):
            by_step.setdefault(event.step, {"step": event.step})[name] = event.value
    return [by_step[step] for step in sorted(by_step)]
