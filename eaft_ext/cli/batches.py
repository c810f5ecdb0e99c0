"""Text to token batches: packing, prompt masking and the shift of the labels."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .conversations import TURNS, Example, conversation_rows, end_of_text
from .errors import CommandError
from .records import Record

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Example",
    "batched",
    "collate",
    "count_tokens",
    "evaluation_batches",
    "evaluation_rows",
    "examples",
    "training_batches",
]

IGNORE_INDEX = -100

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Token ids [b, s] and, already shifted by one, the label of every position [b, s]."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(self.input_ids.to(device), self.labels.to(device))


def training_batches(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    steps: int,
    batch_size: int,
    length: int,
    seed: int,
    turns: str = TURNS[0],
) -> list[Batch]:
    """Return one batch for each step: rows in random order, every one used before any again.

    The same seed gives the same batches. ``turns`` is as for
    :func:`~eaft_ext.cli.conversations.conversation_rows`.
    """
    order = random.Random(seed)
    needed = steps * batch_size
    enough = needed * length  # records, were each a single token
    pool = order.sample(range(len(records)), min(len(records), enough))
    rows = _rows((records[index] for index in pool), tokenizer, length, turns)
    chosen: list[Example] = []
    while len(chosen) < needed:
        chosen += order.sample(rows, len(rows))
    return batched(chosen[:needed], batch_size)


def evaluation_batches(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    batch_size: int,
    length: int,
    max_tokens: int,
    turns: str = TURNS[0],
) -> list[Batch]:
    """Return the batches of :func:`evaluation_rows`."""
    rows = evaluation_rows(records, tokenizer, length=length, max_tokens=max_tokens, turns=turns)
    return batched(rows, batch_size)


def evaluation_rows(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    length: int,
    max_tokens: int,
    turns: str = TURNS[0],
) -> list[Example]:
    """Return rows of ``max_tokens`` tokens in all, prompts among them, or all that there are.

    They are spread evenly over the records, and two tokens are the least. The last row is cut off
    at its end: what is left has the context that it had.
    """
    rows = _rows(_spread(records, max_tokens), tokenizer, length, turns)
    room = max(2, max_tokens)
    count = min(len(rows), max(1, len(rows) * room // count_tokens(rows)))
    while count < len(rows) and count_tokens(list(_spread(rows, count))) < room:
        count += 1
    chosen: list[Example] = []
    for row in _spread(rows, count):
        if room > 0:
            chosen.append(row.cut(room))
            room -= len(chosen[-1].tokens)
    return chosen


def count_tokens(rows: list[Example]) -> int:
    """Return how many tokens a model reads."""
    return sum(len(row.tokens) for row in rows)


def examples(
    records: Iterable[Record], tokenizer: Any, length: int, turns: str = TURNS[0]
) -> Iterator[Example]:
    """Yield rows of at most ``length`` tokens.

    Running text is packed end to end; a conversation has a row of its own, or several. How many
    have none, since nothing that is learned is left of them, is said on standard error.
    """
    packed: list[int] = []
    left_out = 0
    for record in records:
        if record.conversation:
            rows = conversation_rows(record, tokenizer, length, turns)
            left_out += not rows
            yield from rows
            continue
        packed += tokenizer(record.text)["input_ids"] + end_of_text(tokenizer)
        while len(packed) >= length:
            yield Example(packed[:length])
            del packed[:length]
    if len(packed) > 1:
        yield Example(packed)
    if left_out:
        print(
            "conversations that are left out, since their first answer begins after "
            f"{length} tokens, where a row is cut: {left_out}",
            file=sys.stderr,
        )


def batched(rows: list[Example], batch_size: int) -> list[Batch]:
    """Return the rows in batches, the last of which may be smaller."""
    return [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def collate(rows: list[Example]) -> Batch:
    """Pad rows on the right and shift the labels, so that the logits need no slice.

    Padding needs no attention mask: causal attention never looks to the right.
    """
    width = max(len(row.tokens) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        learned = torch.tensor(row.learned[1:], dtype=torch.bool)
        input_ids[index, : len(tokens)] = tokens
        labels[index, : len(tokens) - 1][learned] = tokens[1:][learned]
    return Batch(input_ids, labels)


def _rows(records: Iterable[Record], tokenizer: Any, length: int, turns: str) -> list[Example]:
    rows = list(examples(records, tokenizer, length, turns))
    if not rows:
        raise CommandError("the text is too short: it gives fewer than 2 tokens to a row")
    return rows


def _spread(items: Sequence[Item], count: int) -> Iterator[Item]:
    """Yield ``count`` of the items at even distances, or all if there are fewer."""
    count = min(count, len(items))
    return (items[index * len(items) // count] for index in range(count))
