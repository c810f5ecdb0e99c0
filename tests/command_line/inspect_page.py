"""A model that is sure of itself, hostile texts, and the page that ``inspect`` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo_tiny_model import save_tiny_model

from eaft_ext.cli.main import main

PLAIN = [f"the order of {i} classes is the statement {i * i}" for i in range(20)]

HOSTILE = [
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">",
    "</div></article></script><!-- {{ 7 * 7 }} {% raw %} & &amp; &#0; \\u003c ]]>",
    "a \N{RIGHT-TO-LEFT OVERRIDE}evil\N{POP DIRECTIONAL FORMATTING} "
    "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}",
    "emoji \N{GRINNING FACE} and \N{FAMILY}, NUL \0, bell \a, return \r\n, \N{LINE SEPARATOR} end",
    "x" * 100_000,
]


def save_sure_model(folder: Path, seed: int = 0) -> None:
    """A model that was trained for some steps, so that tokens of ``PLAIN`` are in every region."""
    save_tiny_model(folder, seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step, word in enumerate(["the", "a", "of", "in", "to", "is"] * 7):
        text = f"the statement is the order of {word} classes {step % 12}"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def sure_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sure")
    save_sure_model(folder)
    return folder


@pytest.fixture(scope="session")
def tuned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("tuned")
    save_sure_model(folder, seed=1)
    return folder


def write_texts(path: Path, texts: list[str]) -> Path:
    """Questions with the texts as answers; a long one is read up to the row's length."""
    records = [{"question": f"which {i}", "answer": text} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def inspect(model: Path, data: Path, *options: str) -> int:
    """Run the command on the CPU with short rows."""
    usual = ["--model", str(model), "--data", str(data), "--device", "cpu", "--tokens", "all"]
    return main(["inspect", *usual, "--sequence-length", "100", *options])


def tokens_of(path: Path) -> list[dict[str, Any]]:
    """The tokens of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
