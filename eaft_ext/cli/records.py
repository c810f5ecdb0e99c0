"""The user's text: JSONL records of several forms, or a plain text file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CommandError

Message = dict[str, str]

JSONL_SUFFIXES = {".jsonl", ".ndjson", ".json"}
PROMPT_AND_ANSWER = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))


@dataclass(frozen=True)
class Record:
    """Running text, or the last answer of a conversation with the messages before it."""

    text: str
    conversation: tuple[Message, ...] = ()


def read_records(path: Path) -> list[Record]:
    """Return the records of a JSONL file, or a plain text file as one record."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{path}: byte {error.start} is {error.object[error.start]:#04x}, which is not UTF-8"
        ) from None
    if not text.strip():
        raise CommandError(f"{path} is empty")
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
        raise CommandError(
            f"{where}: not JSON ({error.msg} at column {error.colno}): {_shown(line)}"
        ) from None
    if not isinstance(fields, dict):
        raise CommandError(f"{where}: expected a JSON object, got {_shown(fields)}")
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
    raise CommandError(
        f"{where}: expected the fields text, messages, {expected}; got {_shown(sorted(fields))}"
    )


def _parse_messages(messages: Any, where: str) -> Record:
    if not isinstance(messages, list) or len(messages) < 2:
        raise CommandError(f"{where}: messages must be a list of 2 or more, got {_shown(messages)}")
    for message in messages:
        if not isinstance(message, dict):
            raise CommandError(f"{where}: a message must be an object, got {_shown(message)}")
    parsed = [
        _message(_text(message, "role", where), _text(message, "content", where))
        for message in messages
    ]
    if parsed[-1]["role"] != "assistant":
        raise CommandError(
            f"{where}: the last message must be the assistant's, got role {parsed[-1]['role']!r}"
        )
    return Record(parsed[-1]["content"], tuple(parsed[:-1]))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise CommandError(f"{where}: {name!r} must be text that is not empty, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
