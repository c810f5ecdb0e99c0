"""The texts of a study as tokens: answers to learn, held-out answers, and prose to forget."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eaft_ext.cli.batches import (
    IGNORE_INDEX,
    Batch,
    Example,
    batched,
    collate,
    evaluation_batches,
    examples,
)
from eaft_ext.cli.demo.planted import PLANTED_SHARE, plant, sure_and_right
from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.model import forward
from eaft_ext.cli.records import read_records

from .study import Preset

K = 20
EDITED_WORDS = 16
TRAIN, TARGET, DRIFT = "gsm8k_train.jsonl", "gsm8k_test.jsonl", "wikitext2_test.txt"


@dataclass(frozen=True)
class Texts:
    """Rows to train on, and batches to measure on."""

    train: list[Example]
    target: list[Batch]
    drift: list[Batch]


def read(folder: Path, tokenizer: Any, preset: Preset) -> Texts:
    """Read the data sets of a folder: of the rows that are not too long, the first."""

    def rows(file: str, count: int) -> list[Example]:
        found = []
        for row in examples(read_records(folder / file), tokenizer, preset.length + 1):
            if len(row.tokens) <= preset.length:
                found.append(row)
            if len(found) == count:
                return found
        raise CommandError(
            f"{folder / file}: {len(found)} rows of at most {preset.length} tokens, {count} needed"
        )

    drift = evaluation_batches(
        read_records(folder / DRIFT),
        tokenizer,
        batch_size=1,
        length=preset.length,
        max_tokens=preset.drift_tokens,
    )
    return Texts(rows(TRAIN, preset.rows), batched(rows(TARGET, preset.target_rows), 1), drift)


def plantable(base: Any, rows: list[Example]) -> list[torch.Tensor]:
    """For each row where the base model is sure and right, a mask over its positions."""
    batches = [collate([row]) for row in rows]
    return [sure_and_right(forward(base, batch), batch.labels, K)[0] for batch in batches]


def planted(
    rows: list[Example], candidates: list[torch.Tensor], seed: int
) -> tuple[list[torch.Tensor], int]:
    """The labels of each row, some of them wrong, and how many are."""
    generator = torch.Generator().manual_seed(seed)
    labels = [collate([row]).labels[0] for row in rows]
    words = torch.cat(labels)
    words = words[words != IGNORE_INDEX]
    changed = [
        plant(of_row, mask, words, PLANTED_SHARE, generator)
        for of_row, mask in zip(labels, candidates, strict=True)
    ]
    count = sum(int((a != b).sum()) for a, b in zip(labels, changed, strict=True))
    return changed, count


def edits(rows: list[Example], candidates: list[torch.Tensor]) -> torch.Tensor:
    """Which words are to become which: [words, 2].

    They are the words that the base model is most often sure of and right about, each followed by
    the next one, and the last one by the first.
    """
    labels = torch.cat([collate([row]).labels[0] for row in rows])
    counts = labels[torch.cat(candidates)].bincount()
    words = counts.topk(min(EDITED_WORDS, int((counts > 0).sum())))[1]
    return torch.stack([words, words.roll(-1)], dim=1)


def edited(labels: torch.Tensor, mask: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """The labels, shaped as the mask, with the edits where it holds."""
    found = labels.clone()
    for old, new in words.tolist():
        found[mask & (labels == old)] = new
    return found


def steps_of(
    rows: list[Example], candidates: list[torch.Tensor], preset: Preset, arm: str, seed: int
) -> tuple[list[Batch], int]:
    """A batch for each step: all rows in random order, then all again; how many labels are wrong.

    In the planted arm some candidates of :func:`plantable` are, in the counterfactual one all that
    have one of the words of :func:`edits`.
    """
    labels, wrong = None, 0
    if arm == "planted":
        labels, wrong = planted(rows, candidates, seed)
    elif arm == "counterfactual":
        words = edits(rows, candidates)
        before = [collate([row]).labels[0] for row in rows]
        labels = [edited(*pair, words) for pair in zip(before, candidates, strict=True)]
        wrong = sum(int((a != b).sum()) for a, b in zip(before, labels, strict=True))
    order = random.Random(seed)
    indices: list[int] = []
    count = preset.measured_at[-1] * preset.rows_a_step
    while len(indices) < count:
        indices += order.sample(range(len(rows)), len(rows))
    found = []
    for start in range(0, count, preset.rows_a_step):
        chosen = indices[start : start + preset.rows_a_step]
        batch = collate([rows[index] for index in chosen])
        for place, index in enumerate(chosen):
            if labels is not None:
                batch.labels[place, : len(labels[index])] = labels[index]
        found.append(batch)
    return found, wrong
