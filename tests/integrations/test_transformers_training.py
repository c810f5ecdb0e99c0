"""Training models of transformers without logits: with its Trainer, and with PEFT."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs transformers: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)

from transformers_models import assert_same, batch, build, gradients, own_attributes, unfused
from transformers_trainer import UnfusedTrainer

from eaft_ext.integrations.transformers import use_linear_gated_ce


def examples() -> list[dict[str, Any]]:
    """Micro-batches that differ in how many of their labels are not ignored."""
    tokens, labels = batch(rows=8)
    for row in range(8):
        labels[row, : row // 2 * 2] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def trained(trainer: Any, model: Any, folder: Path) -> tuple[list[float], float]:
    """The losses of two steps of two micro-batches, and of the evaluation after them."""
    pytest.importorskip("accelerate", reason=MISSING)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = examples()
    run = trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, run.evaluate()["eval_loss"]


def test_trainer(tmp_path: Path) -> None:
    expected, its_model = None, build("llama")
    expected = trained(UnfusedTrainer, its_model, tmp_path / "unfused")
    model = build("llama")
    gated = use_linear_gated_ce(model, chunk_size=4)
    found = trained(transformers.Trainer, model, tmp_path / "fused")
    assert gated.stats is not None
    assert len(found[0]) == 2 and found[0] == pytest.approx(expected[0], rel=1e-3)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)
    assert_same(model.state_dict(), its_model.state_dict(), rtol=1e-4, atol=1e-5)
    start = build("llama").state_dict()
    assert not torch.allclose(model.state_dict()["lm_head.weight"], start["lm_head.weight"])


def lora(**options: Any) -> Any:
    """A model with adapters that are not zero."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(build("llama"), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_lora(options: dict[str, Any]) -> None:
    """On the attention, and with an output layer of which PEFT trains a copy."""
    model = lora(target_modules=["q_proj", "v_proj"], **options)
    tokens, labels = batch()
    before = own_attributes(model)
    expected = unfused(model, tokens, labels)
    its_gradients = gradients(model, expected)
    assert ("lm_head" in str(list(its_gradients))) is bool(options)
    with model.disable_adapter():
        without = unfused(model, tokens, labels)
    assert not torch.isclose(expected, without)
    with use_linear_gated_ce(model):
        outputs = model(input_ids=tokens, labels=labels)
        assert outputs.logits is None
        torch.testing.assert_close(outputs.loss, expected)
        assert_same(gradients(model, outputs.loss), its_gradients)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=tokens, labels=labels).loss, without)
    assert own_attributes(model) == before


def test_lora_on_the_output_layer_is_refused() -> None:
    model = lora(target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError) as error:
        use_linear_gated_ce(model)
    sentence = "use_linear_gated_ce: the output layer of LlamaForCausalLM has an adapter, peft."
    assert str(error.value).startswith(sentence)
    assert "give eaft_ext.linear_gated_ce the effective weight" in str(error.value)
