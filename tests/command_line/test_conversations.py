"""Which tokens of a conversation are learned, with chat templates of several kinds."""

from __future__ import annotations

import copy
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from data_files import FORMS, conversation, write_lines

MISSING = "needs transformers and rich; pip install 'eaft_ext[demo]' brings them"
pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("rich", reason=MISSING)

from demo_tiny_model import Demo, demo, tiny_folder, tokenizer  # noqa: E402

from eaft_ext.cli import batches  # noqa: E402
from eaft_ext.cli.batches import IGNORE_INDEX, Example, collate  # noqa: E402
from eaft_ext.cli.conversations import conversation_rows  # noqa: E402
from eaft_ext.cli.errors import CommandError  # noqa: E402
from eaft_ext.cli.main import main  # noqa: E402
from eaft_ext.cli.records import Record  # noqa: E402

__all__ = ["demo", "tiny_folder", "tokenizer"]

BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CHATML = EACH + "{{ m.content }}<|im_end|>\n{% endfor %}" + BEGIN
MARKED = (
    EACH + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    + BEGIN
)
STRIPPING = (
    EACH + "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + BEGIN
)
MARKED_STRIPPING = (
    EACH + "{% if m.role == 'assistant' %}{% generation %}{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}" + BEGIN
)
SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[U] {{ m.content }} [A]"
    "{% else %}{{ m.content }} <|im_end|>{% endif %}{% endfor %}"
)
UNENDED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}" + BEGIN
REFUSING = "{{ raise_exception('Only user and assistant, in turn') }}"

THREE = conversation("which order?", "the order", "é or\nnot?", "é, the class", "so", "end")


@pytest.fixture
def chat(tokenizer: Any) -> Any:
    """The tokenizer with the marks of ChatML, which are not its end of a text."""
    found = copy.deepcopy(tokenizer)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


def record(messages: list[dict[str, Any]]) -> Record:
    return Record(messages[-1]["content"], tuple(messages[:-1]), "data.jsonl, line 3")


def parts(row: Example, tokenizer: Any) -> list[tuple[bool, str]]:
    """The text of a row in parts, with whether they are learned."""
    pairs = zip(row.learned, row.tokens, strict=True)
    return [
        (learned, tokenizer.decode([token for _, token in run]))
        for learned, run in groupby(pairs, key=lambda pair: pair[0])
    ]


def learned_of(row: Example, tokenizer: Any) -> list[str]:
    return [text for learned, text in parts(row, tokenizer) if learned]


@pytest.mark.parametrize(
    ("template", "end", "last"),
    [
        (None, "", "<eos>"),
        (CHATML, "<|im_end|>", "<|im_end|>"),
        (MARKED, "<|im_end|>", "<|im_end|>"),
        (SPACED, " <|im_end|>", " <|im_end|>"),
        (UNENDED, "", "<eos>"),
    ],
)
def test_every_answer_is_learned_to_its_end(
    chat: Any, template: str | None, end: str, last: str
) -> None:
    """What begins after it is not, even if that is a special token."""
    chat.chat_template = template
    (row,) = conversation_rows(record(THREE), chat, 1000, "all")
    answers = [message["content"] for message in THREE[1::2]]
    assert learned_of(row, chat) == [*(a + end for a in answers[:-1]), answers[-1] + last]
    whole = chat.decode(row.tokens)
    if template is None:
        assert whole == "\n".join(m["content"] for m in THREE) + "<eos>"
    else:
        rendered = chat.apply_chat_template(THREE, tokenize=False)
        assert rendered.rstrip("\n") == whole.removesuffix("<eos>").rstrip("\n")


@pytest.mark.parametrize("template", [None, CHATML, MARKED, UNENDED])
def test_of_one_answer_all_is_the_last(chat: Any, template: str | None) -> None:
    chat.chat_template = template
    chat.eos_token = "<|im_end|>"
    one = record(THREE[:2])
    rows = [conversation_rows(one, chat, 1000, turns) for turns in ("last", "all")]
    assert rows[0] == rows[1]


def test_marks_and_prefixes_give_the_same(chat: Any) -> None:
    rows = []
    for template in (CHATML, MARKED):
        chat.chat_template = template
        rows += conversation_rows(record(THREE), chat, 1000, "all")
    assert rows[0] == rows[1]


@pytest.mark.parametrize("template", [STRIPPING, MARKED_STRIPPING])
def test_answers_that_change_later_have_rows_of_their_own(chat: Any, template: str) -> None:
    """Each is learned as it was given, after the prompt of its turn."""
    chat.chat_template = template
    chat.eos_token = "<|im_end|>"
    thinking = conversation("a?", "<think>x</think>one", "b?", "<think>y</think>two")
    rows = conversation_rows(record(thinking), chat, 1000, "all")
    answers = ["<think>x</think>one<|im_end|>", "<think>y</think>two<|im_end|>"]
    assert [learned_of(row, chat) for row in rows] == [[answer] for answer in answers]
    assert rows[1] == conversation_rows(record(thinking), chat, 1000, "last")[0]
    prompt = chat.decode(rows[1].tokens[: rows[1].prompt_length])
    assert "think" not in prompt and "one" in prompt


def test_a_template_that_refuses_is_told_with_the_place(chat: Any) -> None:
    chat.chat_template = REFUSING
    for turns in ("last", "all"):
        with pytest.raises(CommandError) as error:
            conversation_rows(record(THREE), chat, 100, turns)
        told = "data.jsonl, line 3: the model's chat template does not take messages of user"
        assert str(error.value).startswith(told)
        assert str(error.value).endswith("Only user and assistant, in turn")


@pytest.mark.parametrize("length", range(2, 100))
def test_a_long_conversation_is_cut_at_its_end(chat: Any, length: int) -> None:
    """What is left has the context that it had, and a row without an answer is left out."""
    chat.chat_template = CHATML
    (whole,) = conversation_rows(record(THREE), chat, 1000, "all")
    rows = conversation_rows(record(THREE), chat, length, "all")
    if length <= whole.prompt_length:
        assert rows == []
    else:
        (row,) = rows
        assert row.tokens == whole.tokens[:length]
        assert row.learned == whole.learned[:length]


def test_labels_are_those_of_learned_tokens_alone(chat: Any) -> None:
    chat.chat_template = CHATML
    (row,) = conversation_rows(record(THREE), chat, 1000, "all")
    text = Example(list(range(5)))
    batch = collate([row, text])
    count = len(row.tokens)
    for place in range(count - 1):
        wanted = row.tokens[place + 1] if row.learned[place + 1] else IGNORE_INDEX
        assert batch.labels[0, place] == wanted
    assert (batch.labels[0, count - 1 :] == IGNORE_INDEX).all()
    assert batch.labels[1, :4].tolist() == [1, 2, 3, 4]
    between = Example([7, 8, 9, 10, 11], 1, (range(2, 4), range(9, 12)))
    assert collate([between]).labels.tolist() == [[8, -100, -100, 11, -100]]


def test_rows_left_out_are_counted(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(conversation("q" * 50, "a")), record(conversation("q", "a"))]
    rows = batches.evaluation_rows(records, tokenizer, length=16, max_tokens=99, turns="all")
    assert [learned_of(row, tokenizer) for row in rows] == [["a<eos>"]]
    assert "their first answer begins after 16 tokens, where a row is cut: 1\n" in (
        capsys.readouterr().err
    )
    with pytest.raises(CommandError, match="too short"):
        batches.evaluation_rows(records[:1], tokenizer, length=16, max_tokens=99, turns="all")


def test_the_commands_learn_what_they_are_told(
    tiny_folder: Path, tmp_path: Path, demo: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "tokens.jsonl"
    varied = [conversation(f"which {i}?", "the order", "and?", f"class {i}") for i in range(9)]
    write_lines(data, [FORMS["sharegpt"](messages) for messages in varied])
    counts = []
    for turns in ("last", "all"):
        options = ["--model", str(tiny_folder), "--data", str(data), "--turns", turns]
        options += ["--sequence-length", "64"]
        assert main(["inspect", *options, "--device", "cpu", "--output", str(output)]) == 0
        counts.append(output.read_text().count('"row"'))
        status, results = demo("--data", str(data), "--turns", turns, output=turns)
        assert status == 0 and results["settings"]["turns"] == turns
    assert counts[1] == counts[0] + 9 * 2  # "the", " order"
    with pytest.raises(SystemExit):
        main(["inspect", "--turns", "first"])
    assert "invalid choice: 'first'" in capsys.readouterr().err
