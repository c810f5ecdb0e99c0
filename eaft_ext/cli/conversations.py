"""A conversation as tokens, and which of them are learned: the last answer, or every one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from .errors import CommandError
from .records import Message, Record

TURNS = ("last", "all")
"""Which answers of a conversation are learned."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark in a chat template where an answer begins."""


@dataclass(frozen=True)
class Example:
    """One row: its tokens, of which the first ``prompt_length`` are not to be learned.

    Nor are those of the ranges ``between``, which come later: what is said between two answers.
    """

    tokens: list[int]
    prompt_length: int = 0
    between: tuple[range, ...] = ()

    @property
    def learned(self) -> list[bool]:
        """Of each token, whether it is learned; the first of a row cannot be predicted."""
        first = max(1, self.prompt_length)
        found = [place >= first for place in range(len(self.tokens))]
        for places in self.between:
            for place in places[: max(0, len(self.tokens) - places.start)]:
                found[place] = False
        return found

    def cut(self, length: int) -> Example:
        """Return the first ``length`` tokens at most."""
        between = tuple(places for places in self.between if places.start < length)
        return Example(self.tokens[:length], min(self.prompt_length, length), between)


def conversation_rows(record: Record, tokenizer: Any, length: int, turns: str) -> list[Example]:
    """Return the rows of a conversation, none longer than ``length`` tokens.

    To learn the last answer is to have one row, of which a long prompt loses its beginning. To
    learn ``all`` is to have one that is cut at its end, so that what is learned has all of its
    context; none if no answer is left. Where a template shows earlier answers otherwise than as
    they were given, each answer has a row of its own, as if it were the last.

    Raises:
        CommandError: the chat template refuses the conversation.
    """
    if turns == "last":
        return [_last_answer(record, tokenizer, length)]
    messages = [*record.conversation, {"role": "assistant", "content": record.text}]
    whole = _marked(messages, tokenizer, record) or _by_prefixes(messages, tokenizer, record)
    if whole is None:
        return [
            _last_answer(
                Record(message["content"], tuple(messages[:place]), record.where), tokenizer, length
            )
            for place, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    row = whole.cut(length)
    return [row] if any(row.learned) else []


def end_of_text(tokenizer: Any) -> list[int]:
    """Return the token that ends a text, if there is one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _last_answer(record: Record, tokenizer: Any, length: int) -> Example:
    prompt = _prompt_tokens(_prompt(record.conversation, tokenizer, record), tokenizer)
    answer = _tokens(record.text, tokenizer)
    answer = (answer + end_of_text(tokenizer))[: length - 1]
    prompt = prompt[-(length - len(answer)) :]  # a long prompt loses its beginning
    return Example(prompt + answer, prompt_length=len(prompt))


def _marked(messages: list[Message], tokenizer: Any, record: Record) -> Example | None:
    """Return the row of a template that marks the answers, if what it marks are the answers."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template or not GENERATION.search(template) or not tokenizer.is_fast:
        return None
    found = _rendered(
        messages,
        tokenizer,
        record,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    tokens, mask = list(found["input_ids"]), found["assistant_masks"]
    runs = []
    for is_answer, places in groupby(range(len(tokens)), lambda place: bool(mask[place])):
        if is_answer:
            first, *rest = places
            runs.append(range(first, first + 1 + len(rest)))
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if len(runs) != len(answers):
        return None
    for run, answer in zip(runs, answers, strict=True):
        text = tokenizer.decode(tokens[run.start : run.stop], clean_up_tokenization_spaces=False)
        if answer.strip() not in text:
            return None
    return _example(tokens, runs)


def _by_prefixes(messages: list[Message], tokenizer: Any, record: Record) -> Example | None:
    """Return the row in which each answer follows its prompt, or None.

    It is None where a prompt does not begin with the one before and its answer. Prompts and answers
    are tokenized apart, as they are for generation.
    """
    tokens: list[int] = []
    answers: list[range] = []
    before = end = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _prompt(messages[:place], tokenizer, record)
        if not prompt.startswith(before + end):
            return None
        part = prompt[len(before + end) :]
        tokens += _tokens(part, tokenizer) if answers else _prompt_tokens(part, tokenizer)
        before = prompt + message["content"]
        end = _end_of_turn(messages[: place + 1], before, tokenizer, record)
        first = len(tokens)
        tokens += _tokens(message["content"], tokenizer) + _tokens(end, tokenizer)
        answers.append(range(first, len(tokens)))
    if not end:
        tokens += end_of_text(tokenizer)
    return _example(tokens, [*answers[:-1], range(answers[-1].start, len(tokens))])


def _end_of_turn(messages: list[Message], text: str, tokenizer: Any, record: Record) -> str:
    """Return the special token, and blanks before it, that a template has after an answer.

    ``text`` is the prompt and the answer.
    """
    if not tokenizer.chat_template:
        return ""
    whole = str(_rendered(messages, tokenizer, record, tokenize=False))
    if not whole.startswith(text):
        return ""
    after = whole[len(text) :]
    blanks = after[: len(after) - len(after.lstrip())]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [token for token in special if after.startswith(token, len(blanks))]
    return blanks + max(found, key=len) if found else ""


def _example(tokens: list[int], answers: list[range]) -> Example:
    """Return a row that ends with its last answer."""
    between = (range(a.stop, b.start) for a, b in pairwise(answers))
    return Example(tokens[: answers[-1].stop], answers[0].start, tuple(between))


def _prompt(messages: Sequence[Message], tokenizer: Any, record: Record) -> str:
    if tokenizer.chat_template:
        options = {"tokenize": False, "add_generation_prompt": True}
        return str(_rendered(messages, tokenizer, record, **options))
    return "".join(message["content"] + "\n" for message in messages)


def _rendered(messages: Sequence[Message], tokenizer: Any, record: Record, **options: Any) -> Any:
    template_error = importlib.import_module("jinja2").TemplateError
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (template_error, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        where = f"{record.where}: " if record.where else ""
        raise CommandError(
            f"{where}the model's chat template does not take messages of {roles}: {error}"
        ) from None


def _prompt_tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
