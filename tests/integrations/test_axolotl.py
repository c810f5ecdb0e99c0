"""axolotl's own trainer, with its own EAFT and with our plugin."""

# ruff: noqa: E402, without axolotl there is nothing to import for.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs axolotl, in an environment of its own: pip install axolotl"
pytest.importorskip("axolotl", reason=MISSING)

import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import train
from peak_memory import all_measured, measure
from small_model import V, save_model

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
        "learning_rate": 0.1,
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
    cfg = load_cfg(str(path))
    model, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


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
