"""Where the demo's text comes from, and its division into training and held-out text."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DemoError

Message = dict[str, str]

JSONL_SUFFIXES = {".jsonl", ".ndjson", ".json"}
PROMPT_AND_ANSWER = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
HELD_OUT_SHARE = 5  # one part in five


@dataclass(frozen=True)
class Record:
    """Running text, or the last answer of a conversation with the messages before it."""

    text: str
    conversation: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Records to train on and records kept back, with no text in both."""

    name: str
    train: list[Record]
    held_out: list[Record]


def language_reference() -> Corpus:
    """Return the Python language reference that ships with CPython, divided by topic.

    Topics quote one another, so a paragraph that stands in a held-out topic is left out of the
    training topics, and no paragraph is used twice.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError(
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

    JSONL records are divided by a hash of their content; plain text is cut once, so that its
    last fifth is held out.
    """
    records = read_records(path)
    if path.suffix.lower() in JSONL_SUFFIXES:
        unique = list(dict.fromkeys(_content(record) for record in records))
        if len(unique) < 2:
            raise DemoError(f"{path}: {len(unique)} different record is too few, 2 are needed")
        chosen, _ = _divide(unique)
        kept_back = set(chosen)
        train = [record for record in records if _content(record) not in kept_back]
        held_out = [record for record in records if _content(record) in kept_back]
        return Corpus(path.name, train, held_out)
    paragraphs = [part for part in records[0].text.split("\n\n") if part.strip()]
    if len(paragraphs) < 2:
        paragraphs = [line for line in records[0].text.splitlines() if line.strip()]
    if len(paragraphs) < 2:
        raise DemoError(f"{path}: one line is too little text to divide, 2 paragraphs are needed")
    cut = len(paragraphs) - max(1, len(paragraphs) // HELD_OUT_SHARE)
    return Corpus(
        path.name,
        train=[Record("\n\n".join(paragraphs[:cut]))],
        held_out=[Record("\n\n".join(paragraphs[cut:]))],
    )


def read_records(path: Path) -> list[Record]:
    """Return the records of a JSONL file, or a plain text file as one record."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DemoError(
            f"{path}: byte {error.start} is {error.object[error.start]:#04x}, which is not UTF-8"
        ) from None
    if not text.strip():
        raise DemoError(f"{path} is empty")
    if path.suffix.lower() not in JSONL_SUFFIXES:
        return [Record(text)]
    return [
        _parse_record(line, f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _parse_record(line: str, where: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DemoError(
            f"{where}: not JSON ({error.msg} at column {error.colno}): {_shown(line)}"
        ) from None
    if not isinstance(fields, dict):
        raise DemoError(f"{where}: expected a JSON object, got {_shown(fields)}")
    if "messages" in fields:
        return _parse_messages(fields["messages"], where)
    for prompt, answer in PROMPT_AND_ANSWER:
        if prompt in fields and answer in fields:
            request = _text(fields, prompt, where)
            if fields.get("input"):  # the optional third field of instruction data
                request += "\n\n" + _text(fields, "input", where)
            return Record(_text(fields, answer, where), (_message("user", request),))
    if "text" in fields:
        return Record(_text(fields, "text", where))
    expected = ", ".join(f"{prompt}/{answer}" for prompt, answer in PROMPT_AND_ANSWER)
    raise DemoError(
        f"{where}: expected the fields text, messages, {expected}; got {_shown(sorted(fields))}"
    )


def _parse_messages(messages: Any, where: str) -> Record:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DemoError(f"{where}: messages must be a list of 2 or more, got {_shown(messages)}")
    for message in messages:
        if not isinstance(message, dict):
            raise DemoError(f"{where}: a message must be an object, got {_shown(message)}")
    parsed = [
        _message(_text(message, "role", where), _text(message, "content", where))
        for message in messages
    ]
    if parsed[-1]["role"] != "assistant":
        raise DemoError(
            f"{where}: the last message must be the assistant's, got role {parsed[-1]['role']!r}"
        )
    return Record(parsed[-1]["content"], tuple(parsed[:-1]))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DemoError(f"{where}: {name!r} must be text that is not empty, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _content(record: Record) -> str:
    return json.dumps([*record.conversation, record.text], ensure_ascii=False)


def _divide(items: list[str]) -> tuple[list[str], list[str]]:
    """Divide into (held-out, training) by SHA-256, the same on every machine and in every run."""
    order = sorted(items, key=lambda item: hashlib.sha256(item.encode()).hexdigest())
    cut = max(1, len(order) // HELD_OUT_SHARE)
    return order[:cut], order[cut:]
