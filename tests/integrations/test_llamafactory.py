"""LLaMA-Factory's own trainer, with its own EAFT and DFT and with ours."""

# ruff: noqa: E402, without LLaMA-Factory there is nothing to import for.

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs LLaMA-Factory, in an environment of its own: pip install llamafactory"
pytest.importorskip("llamafactory", reason=MISSING)

import transformers
from data_parallel import LOGS, WAYS, assert_same_training, kept, options_of, trained
from llamafactory.train.tuner import run_exp
from peak_memory import all_measured, measure
from small_model import V, save_model
from spawned import environment

from eaft_ext.integrations.llamafactory import train

LEARNING_RATE = 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path)


def fill(
    folder: Path, lengths: tuple[int, int] = (3, 14), without: Any = (), **changes: Any
) -> Path:
    """A small model, its tokenizer, and a data set of answers of lengths between these.

    The rows of ``without`` have none.
    """
    save_model(folder / "model", **changes)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in torch.randint(*lengths, (16,), generator=generator).tolist():
        tokens = torch.randint(3, V, (length + 4,), generator=generator).tolist()
        text = [f"w{token}" for token in tokens]
        answer = " " + " ".join(text[4:])
        rows.append({"instruction": " ".join(text[:4]), "input": "", "output": answer})
    for row in without:
        rows[row]["output"] = ""
    (folder / "rows.json").write_text(json.dumps(rows))
    info = {"rows": {"file_name": "rows.json"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def run(how: Any, folder: Path, name: str, **changes: Any) -> tuple[list[float], Any, float]:
    """Losses of three steps, the weights, and the loss of an evaluation after them."""
    output = folder / name
    how(options(folder, name) | changes)
    state = json.loads((output / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    found = json.loads((output / "all_results.json").read_text())
    if changes.get("finetuning_type") == "lora" or "eval_loss" not in found:
        return losses, {}, found.get("eval_loss", 0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    return losses, dict(model.named_parameters()), found["eval_loss"]


def options(folder: Path, name: str) -> dict[str, Any]:
    return {
        "stage": "sft",
        "do_train": True,
        "do_eval": True,
        "finetuning_type": "full",
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder),
        "dataset": "rows",
        "eval_dataset": "rows",
        "template": "empty",
        "cutoff_len": 64,
        "output_dir": str(folder / name),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": "none",
        "disable_shuffling": True,
        "use_cpu": True,
        "overwrite_cache": True,
        "save_strategy": "no",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"use_eaft_loss": True},
        {"use_eaft_loss": True, "eaft_alpha": 2.0},
        {"use_dft_loss": True},
        {"use_eaft_loss": True, "finetuning_type": "lora", "lora_rank": 4},
    ],
    ids=str,
)
def test_as_its_own(changes: dict[str, Any], folder: Path) -> None:
    expected, its_weights, evaluated = run(run_exp, folder, "own", **changes)
    found, weights, ours_evaluated = run(train, folder, "ours", **changes)
    assert len(found) == 3 and found == pytest.approx(expected, rel=1e-4)
    assert ours_evaluated == pytest.approx(evaluated, rel=1e-4)
    for name, weight in its_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "neither use_eaft_loss nor use_dft_loss is set"),
        ({"use_eaft_loss": True, "use_asft_loss": True}, "use_asft_loss is another loss"),
        ({"use_eaft_loss": True, "stage": "pt"}, "the loss is for stage sft, got pt"),
    ],
    ids=str,
)
def test_what_would_not_take_it(changes: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(train, folder, "ours", **changes)


# Of four rows; in the first, the second of two processes has no answers.
AT_ONCE: dict[str, Any] = {"gradient_accumulation_steps": 1, "use_eaft_loss": True}
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}


def train_in_process(way: str, folder: Path) -> dict[str, Any]:
    changes = AT_ONCE | EVALUATED | options_of(way, LEARNING_RATE)
    with kept(way) as found:
        train(options(folder, "two") | changes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_processes(way: str, tmp_path: Path) -> None:
    """As one of LLaMA-Factory's own, which cannot train on a micro-batch without labels."""
    folder = fill(tmp_path, without=(2, 3))
    whole = AT_ONCE | {"per_device_train_batch_size": 4}
    with kept() as own:
        run(run_exp, folder, "own", **whole)
    with kept() as ours:
        run(train, folder, "ours", **whole, **EVALUATED)
    for of_process in trained(__file__, way, folder):
        assert_same_training(of_process, own, "loss")
        names = [of + name for of in ("eaft_", "eval_eaft_") for name in LOGS]
        assert_same_training(of_process, ours, *names)


@pytest.mark.slow
def test_the_command_starts_processes(tmp_path: Path) -> None:
    folder = fill(tmp_path, without=(2, 3))
    whole = AT_ONCE | {"per_device_train_batch_size": 4}
    expected, _, _ = run(run_exp, folder, "own", **whole)
    configuration = options(folder, "two") | AT_ONCE | {"ddp_backend": "gloo"}
    (folder / "two.yaml").write_text(json.dumps(configuration))
    command = [sys.executable, "-m", "eaft_ext.integrations.llamafactory", folder / "two.yaml"]
    launch = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    subprocess.run(command, check=True, env=environment() | launch, cwd=folder, timeout=240)
    state = json.loads((folder / "two" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("variable", ["USE_RAY", "USE_MCA", "USE_V1"])
def test_other_trainers(variable: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ValueError, match=f"with {variable} it is another trainer"):
        run(train, folder, "ours", use_eaft_loss=True)


LARGE: dict[str, Any] = {"vocab_size": 50_304, "max_position_embeddings": 600}


def measure_training(how: str, folder: str) -> None:
    """Of a vocabulary of 50,304, two rows of 512 tokens a step."""
    options = {"cutoff_len": 512, "do_eval": False, "eval_dataset": None}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    function = {"own": run_exp, "ours": train}[how]
    whole = {"use_eaft_loss": True, "save_strategy": "no", **options}
    measure(lambda: run(function, Path(folder), how, **whole))


def test_memory(tmp_path: Path, record_property: Any) -> None:
    """LLaMA-Factory holds float32 copies of all logits; here a chunk of them is held."""
    fill(tmp_path, (508, 509), **LARGE)
    calls = {how: f"measure_training({how!r}, {str(tmp_path)!r})" for how in ("own", "ours")}
    found = all_measured(__file__, calls, record_property)
    logits = 4 * 2 * 512 * LARGE["vocab_size"]
    assert found["own"]["bytes"] > 2.5 * logits
    assert found["ours"]["bytes"] < 0.5 * found["own"]["bytes"]
