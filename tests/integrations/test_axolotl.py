"""axolotl's own trainer, with its own EAFT and with our plugin."""

# ruff: noqa: E402, without axolotl there is nothing to import for.

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs axolotl, in an environment of its own: pip install axolotl"
pytest.importorskip("axolotl", reason=MISSING)

import axolotl.train
import transformers
import yaml
from accelerate import ParallelismConfig
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import train
from data_parallel import WAYS, assert_same_training, kept, options_of, trained
from peak_memory import all_measured, measure
from small_model import V, save_model
from transformers_models import shifted

from eaft_ext import reference

LEARNING_RATE = 0.1
PLUGIN = "eaft_ext.integrations.axolotl.EAFTPlugin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path)


def fill(folder: Path, lengths: tuple[int, int] = (3, 14), **changes: Any) -> Path:
    """A small model, its tokenizer, and a data set of answers of lengths between these."""
    save_model(folder / "model", **changes)
    generator = torch.Generator().manual_seed(1)
    with (folder / "rows.jsonl").open("w") as file:
        for length in torch.randint(*lengths, (16,), generator=generator).tolist():
            tokens = torch.randint(3, V, (length + 4,), generator=generator).tolist()
            text = [f"w{token}" for token in tokens]
            parts = [
                {"label": False, "text": " ".join(text[:4])},
                {"label": True, "text": " " + " ".join(text[4:])},
            ]
            file.write(json.dumps({"segments": parts}) + "\n")
    return folder


def run(folder: Path, name: str, **changes: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of three steps, and the weights after them."""
    cfg, data = prepared(folder, name, **changes)
    model, _, trainer = train(cfg=cfg, dataset_meta=data)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(("eaft_gate" in entry) == (PLUGIN in changes.get("plugins", [])) for entry in logs)
    losses = [entry["loss"] for entry in logs]
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


def prepared(folder: Path, name: str, without: Any = (), **changes: Any) -> tuple[Any, Any]:
    """The configuration and the data of such a training; the rows ``without`` have no labels."""
    output = folder / name
    options: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "datasets": [
            {"path": str(folder / "rows.jsonl"), "type": "input_output", "ds_type": "json"}
        ],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(output),
        "sequence_len": 64,
        "max_steps": 3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "optimizer": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "saves_per_epoch": 0,
        "val_set_size": 0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "flash_attention": False,
        "use_cpu": True,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "seed": 0,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(options | changes))
    PluginManager.get_instance().plugins.clear()  # of earlier runs
    cfg = load_cfg(str(path))
    cfg.device_map = {"": "cpu"}  # for several processes axolotl writes a GPU's number
    data = load_datasets(cfg=cfg)
    if without:  # now: axolotl leaves such rows out

        def ignored(row: dict[str, Any], index: int) -> dict[str, Any]:
            return {"labels": [-100] * len(row["labels"])} if index in without else row

        data.train_dataset = data.train_dataset.map(ignored, with_indices=True)
    return cfg, data


@pytest.mark.parametrize(
    "changes", [{}, {"eaft_alpha": 2.0, "eaft_k": 10}, {"sample_packing": False}], ids=str
)
def test_as_its_own(changes: dict[str, Any], folder: Path) -> None:
    expected, its_weights = run(folder, "own", use_eaft=True, **changes)
    found, weights = run(folder, "ours", use_eaft=True, plugins=[PLUGIN], **changes)
    assert len(found) == 3 and found == pytest.approx(expected, rel=1e-4)
    for name, weight in its_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_another_normalizer(folder: Path) -> None:
    of_axolotl, _ = run(folder, "one", use_eaft=True, plugins=[PLUGIN])
    of_paper, _ = run(folder, "paper", use_eaft=True, plugins=[PLUGIN], eaft_normalizer="ln k")
    ratio = of_axolotl[0] / of_paper[0]
    assert ratio == pytest.approx(torch.tensor(20.0).log().item(), rel=1e-4)


def test_what_would_not_take_it(folder: Path) -> None:
    with pytest.raises(ValueError, match="EAFTPlugin: use_eaft is not set"):
        run(folder, "none", plugins=[PLUGIN])
    with pytest.raises(ValueError, match="EAFTPlugin: use_eaft is not set"):
        run(folder, "off", plugins=[PLUGIN], use_eaft=False)
    with pytest.raises(ValueError, match="leave perplexity out of eval_causal_lm_metrics"):
        metrics = {"do_causal_lm_eval": True, "eval_causal_lm_metrics": ["perplexity"]}
        run(folder, "perplexity", plugins=[PLUGIN], use_eaft=True, **metrics)


# A step of four rows, in the first of which the second of two processes has no labels.
AT_ONCE: dict[str, Any] = {"gradient_accumulation_steps": 1, "without": (2, 3)}
SHARDED: dict[str, Any] = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "SHARDED_STATE_DICT",
        "reshard_after_forward": True,
    },
}


def train_in_process(way: str, folder: Path) -> dict[str, Any]:
    # axolotl asks for a mesh of GPUs, and ends the group after a training.
    mesh = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, _: mesh(self, "cpu")
    axolotl.train.cleanup_distributed = lambda: None
    changes: dict[str, Any] = {"use_eaft": True} | (SHARDED if way == "fsdp2" else {})
    changes["learning_rate"] = options_of(way, LEARNING_RATE)["learning_rate"]
    plugin = {"plugins": [PLUGIN]}
    found = {}
    for name, more in {"own": {}, "ours": plugin, "without labels": AT_ONCE | plugin}.items():
        of_process = f"{name} {torch.distributed.get_rank()}"
        with kept(way) as found[name]:
            run(folder, of_process, output_dir=str(folder / name), **changes, **more)
    return found


def written_out(folder: Path) -> dict[str, Any]:
    """The same, where each of two processes divides by its own tokens, as axolotl has it."""
    _, data = prepared(folder, "written", use_eaft=True, **AT_ONCE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    log = []
    for step in range(3):
        losses, gates = [], []
        for process in range(2):
            total, count = torch.zeros(()), 0
            for index in (4 * step + 2 * process, 4 * step + 2 * process + 1):
                row = data.train_dataset[index]
                tokens, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
                total_of_row, stats = reference.gated_ce(
                    model(tokens).logits,
                    shifted(labels),
                    normalizer=1.0,
                    reduction="sum",
                    return_stats=True,
                )
                total, count = total + total_of_row, count + int(stats.valid.sum())
                gates.append(stats.gate[stats.valid])
            losses.append(total / max(count, 1))
        loss = sum(losses) / 2
        log.append({"loss": loss.item(), "eaft_gate": torch.cat(gates).mean().item()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {"log": log, "weights": weights}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_processes(way: str, folder: Path) -> None:
    """As axolotl's own two; where one has no labels, which is NaN there, as written out."""
    expected = written_out(folder)
    for of_process in trained(__file__, way, folder):
        assert_same_training(of_process["ours"], of_process["own"], "loss")
        assert_same_training(of_process["without labels"], expected, "loss", "eaft_gate")


def test_nobody_has_it_who_did_not_ask() -> None:
    """axolotl loads all of them, by their group, in every run."""
    values = [point.value for point in entry_points(group="axolotl.plugins")]
    assert not [value for value in values if value.startswith("eaft_ext")]


LARGE: dict[str, Any] = {"vocab_size": 50_304, "max_position_embeddings": 600}


def measure_training(how: str, folder: str) -> None:
    """Of a vocabulary of 50,304, two rows of 512 tokens a step."""
    plugins = {"plugins": [PLUGIN]} if how == "ours" else {}
    options = {"use_eaft": True, "sequence_len": 512, "gradient_accumulation_steps": 1}
    measure(lambda: run(Path(folder), how, **options, **plugins))


def test_memory(tmp_path: Path, record_property: Any) -> None:
    """axolotl holds copies of all logits; here a chunk of them is held."""
    fill(tmp_path, (506, 507), **LARGE)
    calls = {how: f"measure_training({how!r}, {str(tmp_path)!r})" for how in ("own", "ours")}
    found = all_measured(__file__, calls, record_property)
    logits = 4 * 2 * 512 * LARGE["vocab_size"]
    assert found["own"]["bytes"] > 2.5 * logits
    assert found["ours"]["bytes"] < 0.5 * found["own"]["bytes"]
