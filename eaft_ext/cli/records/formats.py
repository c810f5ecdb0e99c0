"""A record's fields, as several kinds of data name them, and what is an answer among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eaft_ext.cli.errors import CommandError

from .record import Message, Record

CONVERSATIONS = ("messages", "conversations")
PROMPT_AND_ANSWER = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
OPTIONAL = ("input", "system", "history")
FIELDS = {*CONVERSATIONS, *(name for pair in PROMPT_AND_ANSWER for name in pair), *OPTIONAL, "text"}
"""All that is read of a record; it may have more."""

SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
"""The roles of those who speak in ShareGPT's conversations."""


def parse_record(fields: object, where: str) -> Record:
    """Return the record that has these fields.

    Raises:
        CommandError: it is none; the message begins with ``where``.
    """
    if not isinstance(fields, Mapping):
        raise CommandError(f"{where}: expected a JSON object, got {shown(fields)}")
    for name in CONVERSATIONS:
        if fields.get(name) not in (None, ""):
            before = _system(fields, where) if name == "conversations" else []
            return _conversation([*before, *_messages(fields[name], name, where)], where)
    for prompt, answer in PROMPT_AND_ANSWER:
        if prompt in fields and answer in fields:
            return _answered(fields, prompt, answer, where)
    if "text" in fields:
        return Record(_text(fields, "text", where), where=where)
    pairs = (f"{prompt}/{answer}" for prompt, answer in PROMPT_AND_ANSWER)
    expected = ", ".join(["text", *CONVERSATIONS, *pairs])
    raise CommandError(f"{where}: expected the fields {expected}; got {shown(sorted(fields))}")


def parse_json(line: str, where: str) -> Record:
    """Return the record that a JSON object is, or raise as :func:`parse_record`."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise CommandError(
            f"{where}: not JSON ({error.msg} at column {error.colno}): {shown(line)}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, or too many levels
        raise CommandError(f"{where}: JSON that cannot be read ({error}): {shown(line)}") from None
    return parse_record(fields, where)


def shown(value: object) -> str:
    """Return a value as Python writes it, or the beginning of that."""
    value = value[:80] if isinstance(value, str) and len(value) > 80 else value
    written = repr(value)
    return written if len(written) <= 80 else written[:77] + "..."


def _answered(fields: Mapping[str, Any], prompt: str, answer: str, where: str) -> Record:
    """Return a request and its answer; TRL's may be a list of messages each."""
    before: list[Message] = []
    if prompt == "instruction":  # what LLaMA-Factory adds to instruction data
        before = [*_system(fields, where), *_history(fields, where)]
    if isinstance(fields[prompt], list):
        before += _messages(fields[prompt], prompt, where)
    else:
        request = _text(fields, prompt, where)
        if fields.get("input"):  # the optional third field of instruction data
            request += "\n\n" + _text(fields, "input", where)
        before.append(_message("user", request))
    if isinstance(fields[answer], list):
        messages = [*before, *_messages(fields[answer], answer, where)]
        return _conversation(messages, where)
    return Record(_text(fields, answer, where), tuple(before), where)


def _conversation(messages: list[Message], where: str) -> Record:
    *before, last = messages
    if last["role"] != "assistant":
        raise CommandError(
            f"{where}: the last message must be the assistant's, got role {shown(last['role'])}"
        )
    return Record(last["content"], tuple(before), where)


def _messages(found: Any, name: str, where: str) -> list[Message]:
    found = _unpacked(found)
    fewest = 2 if name in CONVERSATIONS else 1
    if not isinstance(found, list) or len(found) < fewest:
        raise CommandError(
            f"{where}: {name} must be a list of {fewest} or more, got {shown(found)}"
        )
    return [_parse_message(message, where) for message in found]


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise CommandError(f"{where}: a message must be an object, got {shown(message)}")
    if "from" not in message:
        return _message(_text(message, "role", where), _text(message, "content", where))
    speaker = _text(message, "from", where)
    if speaker not in SPEAKERS:
        raise CommandError(
            f"{where}: 'from' must be one of {', '.join(sorted(SPEAKERS))}, got {shown(speaker)}"
        )
    return _message(SPEAKERS[speaker], _text(message, "value", where))


def _system(fields: Mapping[str, Any], where: str) -> list[Message]:
    return [_message("system", _text(fields, "system", where))] if fields.get("system") else []


def _history(fields: Mapping[str, Any], where: str) -> list[Message]:
    """Return the earlier requests and answers, which are pairs."""
    messages = []
    pairs = _unpacked(fields.get("history") or [])
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise CommandError(
                f"{where}: 'history' must be a list of pairs of texts, got {shown(pair)}"
            )
        for role, content in zip(("user", "assistant"), pair, strict=True):
            messages.append(_message(role, _text({"history": content}, "history", where)))
    return messages


def _unpacked(value: Any) -> Any:
    """Return the list that a table's cell holds as JSON, or the value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise CommandError(f"{where}: {name!r} must be text that is not empty, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say half of a character
        raise CommandError(
            f"{where}: {name!r} has {value[error.start]!r} at character {error.start}, "
            "which is half of a character"
        ) from None
    return value
