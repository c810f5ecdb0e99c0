"""Trainings of a Trainer of transformers, and the same written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers_models import batch, shifted

import eaft_ext.integrations.trainer as of_trainers

STEPS = 3
LEARNING_RATE = 0.1
OWN_LOGS = "eaft_"


class InOrder(transformers.Trainer):
    """Takes the examples as they come."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def examples(rows: int = 12) -> list[dict[str, Any]]:
    """Two by two they are a micro-batch, with uneven numbers of labels, and one of none."""
    tokens, labels = batch(rows=rows)
    for row in range(rows):
        labels[row, : row % 5 * 2] = -100
    labels[2:4] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    """Of steps of two micro-batches of two rows each."""
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",  # Adam makes large steps of what rounding leaves
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return transformers.TrainingArguments(str(folder), **options | changes)


def written_out(
    model: Any, loss_of: Callable[[Any, Tensor, Tensor, Tensor], Tensor], size: int = 2
) -> list[float]:
    """The losses of the same steps; ``loss_of`` model, tokens, next labels and number of items.

    ``size``: rows of a micro-batch.
    """
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    data = examples()
    losses = []
    for step in range(STEPS):
        rows = data[4 * step : 4 * step + 4]
        tokens = torch.stack([row["input_ids"] for row in rows])
        labels = shifted(torch.stack([row["labels"] for row in rows]))
        num_items = (labels != -100).sum()
        total = 0.0
        for first in range(0, 4, size):
            part = slice(first, first + size)
            loss = loss_of(model, tokens[part], labels[part], num_items)
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def logged(trainer: transformers.Trainer, name: str) -> list[float]:
    """Of each log that has it."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@contextmanager
def kept_landscapes() -> Iterator[list[tuple[str, Tensor, int]]]:
    """What loggers of images are given in a block: its name, the tokens in each cell, the step."""
    kept: list[tuple[str, Tensor, int]] = []
    own = of_trainers.log_image

    def keep(callbacks: Any, name: str, cells: Tensor, step: int) -> bool:
        own(callbacks, name, cells, step)
        kept.append((name, cells, step))
        return True

    of_trainers.log_image = keep
    try:
        yield kept
    finally:
        of_trainers.log_image = own
