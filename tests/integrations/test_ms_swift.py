"""ms-swift's own trainer with our loss type."""

# ruff: noqa: E402, without ms-swift there is nothing to import for.

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs ms-swift, in an environment of its own: pip install ms-swift"
pytest.importorskip("swift", reason=MISSING)

import transformers
from data_parallel import WAYS, assert_same_training, kept, options_of, trained
from small_model import V, save_model
from swift import SftArguments, sft_main
from swift.loss import loss_map
from transformers_models import shifted

from eaft_ext import reference

STEPS = 3
LEARNING_RATE = 0.1
MAX_LENGTH = 32


@pytest.fixture(autouse=True)
def _numbers_of_its_own() -> None:
    """What an earlier test set is still there after a training, though monkeypatch undid it."""
    for name in ("EAFT_K", "EAFT_ALPHA", "EAFT_NORMALIZER"):
        os.environ.pop(name, None)


@pytest.fixture
def plugin() -> str:
    return path_of_plugin()


def path_of_plugin() -> str:
    """By the command that the user types."""
    command = [sys.executable, "-m", "eaft_ext.cli.main", "plugin", "ms-swift"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path)


def fill(folder: Path, without: Any = ()) -> Path:
    """A small model, its tokenizer, and a data set; the rows ``without`` are cut before labels."""
    save_model(folder / "model")
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 14, (16,), generator=generator).tolist()
    with (folder / "rows.jsonl").open("w") as file:
        for row, length in enumerate(lengths):
            tokens = torch.randint(3, V, (length + 4,), generator=generator).tolist()
            text = [f"w{token}" for token in tokens]
            answer = " " + " ".join(text[4:])
            question = text[:4] * (MAX_LENGTH if row in without else 1)
            messages = [
                {"role": "user", "content": " ".join(question)},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


def run(
    folder: Path, name: str, seen: list[torch.Tensor] | None = None, **changes: Any
) -> tuple[list[float], Path]:
    """Losses of three steps, and where the model is; ``seen`` takes the labels of our loss."""
    arguments = SftArguments(**options_for(folder, name) | changes)
    if seen is not None:
        own = loss_map["eaft"]

        class Recording(own):  # type: ignore[misc, valid-type]
            def __call__(self, outputs: Any, labels: torch.Tensor, **given: Any) -> torch.Tensor:
                seen.append(labels.clone())
                return super().__call__(outputs, labels, **given)  # type: ignore[no-any-return]

        loss_map["eaft"] = Recording
    sft_main(arguments)
    (checkpoint,) = (folder / name).glob("**/checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry], checkpoint


def options_for(folder: Path, name: str) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "model_type": "llama",
        "template": "dummy",
        "dataset": [str(folder / "rows.jsonl")],
        "tuner_type": "full",
        "output_dir": str(folder / name),
        "add_version": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": [],
        "split_dataset_ratio": 0.0,
        "torch_dtype": "float32",
        "use_cpu": True,
        "train_dataloader_shuffle": False,
        "dataset_shuffle": False,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "padding_side": "right",
        "max_length": MAX_LENGTH,
        "truncation_strategy": "right",
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_without_a_gate_it_is_its_own(
    plugin: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAFT's gate to the power of 0."""
    expected, its_folder = run(folder, "own", loss_type="cross_entropy")
    monkeypatch.setenv("EAFT_ALPHA", "0")
    found, ours = run(folder, "ours", external_plugins=[plugin], loss_type="eaft")
    assert len(found) == STEPS and found == pytest.approx(expected, rel=1e-4)
    close(weights(ours), weights(its_folder))


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, {"normalizer": 3.0}),
        ({"EAFT_K": "all", "EAFT_NORMALIZER": "ln k", "EAFT_ALPHA": "2"}, {"k": None, "alpha": 2}),
    ],
    ids=str,
)
def test_a_training(
    environment: dict[str, str],
    options: dict[str, Any],
    plugin: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen: list[tuple[Any, Any]] = []
    all_labels: list[torch.Tensor] = []
    forward = transformers.LlamaForCausalLM.forward

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            seen.append((kwargs["input_ids"], kwargs["attention_mask"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", recording)
    found, ours = run(folder, "ours", all_labels, external_plugins=[plugin], loss_type="eaft")
    monkeypatch.undo()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    assert len(seen) == 2 * STEPS
    for step, loss in enumerate(found):
        batches = []
        for i in (2 * step, 2 * step + 1):
            assert (all_labels[i] == -100).any() and (all_labels[i] != -100).any()
            batches.append((*seen[i], shifted(all_labels[i])))
        num_items = sum((labels != -100).sum() for _, _, labels in batches)
        optimizer.zero_grad()
        total = 0.0
        for tokens, mask, labels in batches:
            logits = model(tokens, attention_mask=mask).logits
            part = reference.gated_ce(logits, labels, num_items_in_batch=num_items, **options)
            part.backward()
            total += part.item()
        assert loss == pytest.approx(total, rel=1e-4)
        optimizer.step()
    close(weights(ours), dict(model.named_parameters()))


# A step of four rows, in the first of which the second of two processes has no labels.
AT_ONCE: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "loss_type": "eaft",
}


def train_in_process(way: str, folder: Path) -> dict[str, Any]:
    changes = AT_ONCE | options_of(way, LEARNING_RATE) | {"external_plugins": [path_of_plugin()]}
    if way == "fsdp2":  # ms-swift's own configuration: recomputed layers, rank 0 loads the model
        del changes["fsdp_config"]
        changes |= {"fsdp": "fsdp2", "gradient_checkpointing": False}
    with kept(way) as found:
        sft_main(SftArguments(**options_for(folder, "two") | changes))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_processes(way: str, plugin: str, tmp_path: Path) -> None:
    """As one."""
    folder = fill(tmp_path, without=(2, 3))
    changes = AT_ONCE | {"per_device_train_batch_size": 4, "external_plugins": [plugin]}
    with kept() as expected:
        sft_main(SftArguments(**options_for(folder, "one") | changes))
    for of_process in trained(__file__, way, folder):
        assert_same_training(of_process, expected, "loss")


def test_what_is_refused(plugin: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"external_plugins": [plugin], "loss_type": "eaft"}
    with pytest.raises(ValueError, match="enable_dft_loss are two losses"):
        run(folder, "dft", enable_dft_loss=True, **options)
    with pytest.raises(ValueError, match="leave label_smoothing_factor 0"):
        run(folder, "smoothed", label_smoothing_factor=0.1, **options)
    monkeypatch.setenv("EAFT_NORMALIZER", "much")
    with pytest.raises(ValueError, match="EAFT_NORMALIZER must be a number or 'ln k', got 'much'"):
        run(folder, "much", **options)
