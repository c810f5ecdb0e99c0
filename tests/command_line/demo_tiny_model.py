"""A tiny model in a folder, and the demo run on it.

A test file has the fixtures that it imports, and imports ``tiny_folder`` with any other of them;
its ``__all__`` shows ruff that they are used.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from eaft_ext.cli.main import main

Demo = Callable[..., tuple[int, Any]]

VOCABULARY = 300


def save_tiny_model(folder: Path, seed: int = 0) -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the statement is executed in the order of the class"], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def base(tiny_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).float().eval()


@pytest.fixture
def demo(tiny_folder: Path, tmp_path: Path) -> Demo:
    """Run the demo on the tiny model; returns (exit status, results.json)."""

    def run(*options: str, output: str = "out") -> tuple[int, Any]:
        folder = tmp_path / output
        tiny = ["--model", str(tiny_folder), "--device", "cpu", "--steps", "2"]
        tiny += ["--sequence-length", "32", "--learning-rate", "0.01", "--output", str(folder)]
        status = main(["demo", *tiny, *options])
        written = folder / "results.json"
        return status, json.loads(written.read_text()) if written.exists() else None

    return run
