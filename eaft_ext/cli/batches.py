"""Text to token batches: packing, prompt masking and the shift of the labels."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .errors import CommandError
from .records import Record

IGNORE_INDEX = -100

Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """One row: its tokens, of which the first ``prompt_length`` are not to be learned."""

    tokens: list[int]
    prompt_length: int = 0


@dataclass(frozen=True)
class Batch:
    """Token ids [b, s] and, already shifted by one, the label of every position [b, s]."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(self.input_ids.to(device), self.labels.to(device))


def training_batches(
    records: list[Record], tokenizer: Any, *, steps: int, batch_size: int, length: int, seed: int
) -> list[Batch]:
    """Return one batch for each step: rows in random order, every one used before any again.

    The same seed gives the same batches.
    """
    order = random.Random(seed)
    needed = steps * batch_size
    enough = needed * length  # records, were each a single token
    pool = order.sample(records, min(len(records), enough))
    rows = _rows(pool, tokenizer, length)
    chosen: list[Example] = []
    while len(chosen) < needed:
        chosen += order.sample(rows, len(rows))
    return batched(chosen[:needed], batch_size)


def evaluation_batches(
    records: list[Record], tokenizer: Any, *, batch_size: int, length: int, max_tokens: int
) -> list[Batch]:
    """Return the batches of :func:`evaluation_rows`."""
    rows = evaluation_rows(records, tokenizer, length=length, max_tokens=max_tokens)
    return batched(rows, batch_size)


def evaluation_rows(
    records: list[Record], tokenizer: Any, *, length: int, max_tokens: int
) -> list[Example]:
    """Return rows of ``max_tokens`` tokens in all, prompts among them, or all that there are.

    They are spread evenly over the records, and two tokens are the least. The last row is cut off
    at its end: what is left has the context that it had.
    """
    rows = _rows(_spread(records, max_tokens), tokenizer, length)
    room = max(2, max_tokens)
    count = min(len(rows), max(1, len(rows) * room // count_tokens(rows)))
    while count < len(rows) and count_tokens(_spread(rows, count)) < room:
        count += 1
    chosen: list[Example] = []
    for row in _spread(rows, count):
        if room > 0:
            chosen.append(Example(row.tokens[:room], min(row.prompt_length, room)))
            room -= len(chosen[-1].tokens)
    return chosen


def count_tokens(rows: list[Example]) -> int:
    """Return how many tokens a model reads."""
    return sum(len(row.tokens) for row in rows)


def examples(records: Iterable[Record], tokenizer: Any, length: int) -> Iterator[Example]:
    """Yield rows of at most ``length`` tokens.

    Running text is packed end to end; a conversation has a row of its own.
    """
    packed: list[int] = []
    for record in records:
        if record.conversation:
            yield _conversation(record, tokenizer, length)
            continue
        packed += tokenizer(record.text)["input_ids"] + _end_of_text(tokenizer)
        while len(packed) >= length:
            yield Example(packed[:length])
            del packed[:length]
    if len(packed) > 1:
        yield Example(packed)


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
        first_label = max(1, row.prompt_length)
        input_ids[index, : len(tokens)] = tokens
        labels[index, first_label - 1 : len(tokens) - 1] = tokens[first_label:]
    return Batch(input_ids, labels)


def _conversation(record: Record, tokenizer: Any, length: int) -> Example:
    prompt_text = _prompt(record, tokenizer)
    prompt = tokenizer(prompt_text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    answer = tokenizer(record.text, add_special_tokens=False)["input_ids"]
    answer = (answer + _end_of_text(tokenizer))[: length - 1]
    prompt = prompt[-(length - len(answer)) :]  # a long prompt loses its beginning
    return Example(prompt + answer, prompt_length=len(prompt))


def _prompt(record: Record, tokenizer: Any) -> str:
    messages = list(record.conversation)
    if tokenizer.chat_template:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    return "\n".join(message["content"] for message in messages) + "\n"


def _rows(records: list[Record], tokenizer: Any, length: int) -> list[Example]:
    rows = list(examples(records, tokenizer, length))
    if not rows:
        raise CommandError("the text is too short: it gives fewer than 2 tokens")
    return rows


def _spread(items: list[Item], count: int) -> list[Item]:
    """Return ``count`` of the items at even distances, or all if there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _end_of_text(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
