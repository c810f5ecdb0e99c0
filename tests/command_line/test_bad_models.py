"""What ``--model`` refuses: a broken folder is one sentence, and nothing that it holds is run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_tiny_model import tiny_folder

from eaft_ext.cli import model
from eaft_ext.cli.errors import CommandError

__all__ = ["tiny_folder"]

Change = Callable[[Path], Any]

LONGEST = 400


def holds(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def half(name: str) -> Change:
    def change(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return change


def configured(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def pickled(content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return change


BROKEN: dict[str, Change] = {
    "half of the weights": half("model.safetensors"),
    "no bytes of weights": holds("model.safetensors", b""),
    "weights of other bytes": holds("model.safetensors", b"\xff" * 64),
    "weights that are no pickle": pickled(b"garbage"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half a config": half("config.json"),
    "a config that is a list": holds("config.json", b"[]"),
    "an empty config": holds("config.json", b"{}"),
    "a config in Latin-1": holds("config.json", b'{"a": "\xe9"}'),
    "a size below 0": configured(hidden_size=-1),
    "a size that is text": configured(hidden_size="a"),
    "no heads": configured(num_attention_heads=0),
    "another vocabulary": configured(vocab_size=7),
    "an unknown model": configured(model_type="nothing"),
    "half a tokenizer": half("tokenizer.json"),
    "a tokenizer that is a list": holds("tokenizer.json", b"[]"),
    "an empty tokenizer": holds("tokenizer.json", b"{}"),
    "a tokenizer's config that is a list": holds("tokenizer_config.json", b"[]"),
}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refused(folder: Path) -> str:
    with pytest.raises(CommandError) as error:
        model.load(str(folder))
    sentence = str(error.value)
    start = f"cannot load --model {folder}: "
    assert sentence.startswith(start) and len(sentence) > len(start)
    assert "\n" not in sentence and len(sentence.replace(str(folder), "")) < LONGEST
    return sentence


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_broken_folders(folder: Path, change: Change) -> None:
    change(folder)
    refused(folder)


def test_the_reason_is_told(folder: Path) -> None:
    configured(hidden_size="a")(folder)
    assert "expected int, got str" in refused(folder)


class Creates:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Creates(tmp_path / "made")}, folder / "pytorch_model.bin")
    refused(folder)
    assert not (tmp_path / "made").exists()


def test_no_code_of_a_model_is_run_and_nobody_is_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"import os\nos.mkdir({str(tmp_path / 'made')!r})\n"
    (folder / "theirs.py").write_text(code)
    theirs = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    configured(model_type="theirs", auto_map=theirs)(folder)
    assert "custom code" in refused(folder)
    assert not (tmp_path / "made").exists()
    assert "[y/N]" not in capsys.readouterr().out
