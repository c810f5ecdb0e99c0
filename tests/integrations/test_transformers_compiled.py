"""Compiled models of transformers without logits: several lengths, evaluation, Trainer."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

MISSING = "needs transformers: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)

from torch._dynamo.testing import CompileCounterWithBackend
from transformers_models import V, assert_same, batch, build, close, gradients, in_float64
from transformers_trainer import UnfusedTrainer

from eaft_ext.integrations.transformers import use_linear_gated_ce


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lengths(fullgraph: bool) -> None:
    """Liger #174, pytorch #180642: the second length crashed. Two graphs serve all lengths."""
    model = build("llama", num_hidden_layers=1).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=fullgraph)
    gated = use_linear_gated_ce(model)
    for length in (9, 12, 9, 17, 5):
        tokens, labels = batch(length=length)
        outputs = compiled(tokens, labels=labels, use_cache=False)
        close(outputs.loss, in_float64(model, tokens, labels))
        assert outputs.logits is None
        assert gated.stats is not None and gated.stats.nll.shape == (2, length)
        found = gradients(model, outputs.loss)
        assert_same(found, gradients(model, model(tokens, labels=labels).loss))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_evaluation_after_training() -> None:
    model = build("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    use_linear_gated_ce(model)
    for length in (9, 12):
        tokens, labels = batch(length=length)
        compiled.train()
        assert compiled(tokens, labels=labels, use_cache=False).logits is None
        compiled.eval()
        with torch.no_grad():
            outputs = compiled(tokens, labels=labels, use_cache=False)
            close(outputs.loss, in_float64(model, tokens, labels))
            assert outputs.logits.shape == (2, length, V)
            close(compiled(tokens, use_cache=False).logits, outputs.logits)


@pytest.mark.slow
def test_inductor() -> None:
    model = build("llama", num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True)
    use_linear_gated_ce(model)
    for length in (9, 12):
        tokens, labels = batch(length=length)
        loss = compiled(tokens, labels=labels, use_cache=False).loss
        torch.testing.assert_close(loss, in_float64(model, tokens, labels), rtol=1e-4, atol=1e-5)
        found, expected = (
            gradients(model, one) for one in (loss, model(tokens, labels=labels).loss)
        )
        assert_same(found, expected, rtol=1e-3, atol=1e-5)


def test_an_output_layer_that_is_replaced() -> None:
    model = build("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    use_linear_gated_ce(model)
    tokens, labels = batch()
    close(compiled(tokens, labels=labels).loss, in_float64(model, tokens, labels))
    model.lm_head = nn.Linear(16, V)
    for _ in range(2):
        outputs = compiled(tokens, labels=labels)
        close(outputs.loss, in_float64(model, tokens, labels))
        assert outputs.logits is None


def test_a_weight_that_is_quantised() -> None:
    class Quantised(nn.Parameter):
        pass

    model = build("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    use_linear_gated_ce(model)
    tokens, labels = batch()
    compiled(tokens, labels=labels)
    model.lm_head.weight = Quantised(model.lm_head.weight.data)
    with pytest.raises(TypeError, match=r"must have a weight of floating-point numbers, got Quant"):
        compiled(tokens, labels=labels)


def examples() -> list[dict[str, Tensor]]:
    """As many lengths as there are batches, nearly."""
    rows = []
    for seed in range(40):
        tokens, labels = batch(seed=seed, rows=1, length=5 + seed * 7 % 12)
        rows.append({"input_ids": tokens[0], "labels": labels[0]})
    return rows


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def stacked(name: str, value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value)

    return {"input_ids": stacked("input_ids", 0), "labels": stacked("labels", -100)}


def trained(trainer: Any, with_peft: bool, is_compiled: bool) -> tuple[list[float], float]:
    """The losses of 20 steps, and of an evaluation after them."""
    pytest.importorskip("accelerate", reason=MISSING)
    model = build("llama", num_hidden_layers=1)
    if trainer is not UnfusedTrainer:
        use_linear_gated_ce(model)
    if with_peft:
        peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=20,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=0.01,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            torch_compile=is_compiled,
            torch_compile_backend="aot_eager" if is_compiled else None,
        )
        data = examples()
        run = trainer(
            model, arguments, train_dataset=data, eval_dataset=data[:6], data_collator=padded
        )
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        return losses, run.evaluate()["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("with_peft", [False, True])
def test_trainer(with_peft: bool) -> None:
    expected = trained(UnfusedTrainer, with_peft, False)
    found = trained(transformers.Trainer, with_peft, True)
    assert len(found[0]) == 20 and found[0] == pytest.approx(expected[0], rel=1e-3)
    assert found[1] == pytest.approx(expected[1], rel=1e-3)
