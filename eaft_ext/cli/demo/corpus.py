"""Where the demo's text comes from, and its division into training and held-out text."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.records import Part, Record, is_plain_text, read_records

HELD_OUT_SHARE = 5  # one part in five


@dataclass(frozen=True)
class Corpus:
    """Records to train on and records kept back, with no text in both."""

    name: str
    train: Sequence[Record]
    held_out: Sequence[Record]


def language_reference() -> Corpus:
    """Return the Python language reference that ships with CPython, divided by topic.

    Topics quote one another, so a paragraph that stands in a held-out topic is left out of the
    training topics, and no paragraph is used twice.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError(
            f"this Python has no pydoc_data.topics ({error}): pass --data with a JSONL or text file"
        ) from None
    held_out, train = _divide(sorted(topics))
    seen: set[str] = set()

    def unseen_paragraphs(topic: str) -> str:
        kept = []
        for paragraph in topics[topic].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                kept.append(paragraph)
        return "\n\n".join(kept).strip()

    # The held-out topics go first: what they contain is then seen when training topics are read.
    texts = {topic: unseen_paragraphs(topic) for topic in held_out + train}
    return Corpus(
        name="Python language reference (pydoc_data.topics)",
        train=[Record(texts[topic]) for topic in train if texts[topic]],
        held_out=[Record(texts[topic]) for topic in held_out if texts[topic]],
    )


def prose() -> list[Record]:
    """Return the passages of public-domain prose in ``prose.txt``."""
    text = importlib.resources.files(__package__).joinpath("prose.txt").read_text("utf-8")
    passages: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("#"):
            passages.append([])
        else:
            passages[-1].append(line)
    joined = ("\n".join(passage).strip() for passage in passages)
    return [Record(passage) for passage in joined if passage]


def read_corpus(path: Path) -> Corpus:
    """Return the user's own file, divided into training and held-out records.

    Records are divided by a hash of their content; plain text is cut once, so that its last fifth
    is held out.
    """
    records = read_records(path)
    if not is_plain_text(path):
        hashes = [_hash(_content(record)) for record in records]
        unique = sorted(set(hashes))
        if len(unique) < 2:
            raise CommandError(f"{path}: {len(unique)} different record is too few, 2 are needed")
        kept_back = set(unique[: _held_out(len(unique))])
        train, held_out = (
            Part(records, (i for i, found in enumerate(hashes) if (found in kept_back) == wanted))
            for wanted in (False, True)
        )
        return Corpus(path.name, train, held_out)
    paragraphs = [part for part in records[0].text.split("\n\n") if part.strip()]
    if len(paragraphs) < 2:
        paragraphs = [line for line in records[0].text.splitlines() if line.strip()]
    if len(paragraphs) < 2:
        raise CommandError(
            f"{path}: one line is too little text to divide, 2 paragraphs are needed"
        )
    cut = len(paragraphs) - max(1, len(paragraphs) // HELD_OUT_SHARE)
    return Corpus(
        path.name,
        train=[Record("\n\n".join(paragraphs[:cut]))],
        held_out=[Record("\n\n".join(paragraphs[cut:]))],
    )


def _content(record: Record) -> str:
    return json.dumps([*record.conversation, record.text], ensure_ascii=False)


def _divide(items: list[str]) -> tuple[list[str], list[str]]:
    """Divide into (held-out, training) by SHA-256, the same on every machine and in every run."""
    order = sorted(items, key=_hash)
    cut = _held_out(len(order))
    return order[:cut], order[cut:]


def _hash(item: str) -> bytes:
    return hashlib.sha256(item.encode()).digest()


def _held_out(count: int) -> int:
    """Of so many, how many are held out."""
    return max(1, count // HELD_OUT_SHARE)
