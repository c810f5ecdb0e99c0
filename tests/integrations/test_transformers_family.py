"""Models of transformers that cap or scale their logits: the loss does what they do."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs transformers: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)

from torch import Tensor, nn
from transformers_models import (
    V,
    assert_same,
    batch,
    build,
    close,
    gradients,
    in_float64,
    shifted,
    tricky,
    unfused,
)

from eaft_ext import NoGate
from eaft_ext.integrations import _call as calls_of
from eaft_ext.integrations import transformers as integration
from eaft_ext.integrations.transformers import use_linear_gated_ce

MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}

PLAIN = {
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "granite": {"logits_scaling": 1.0},
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: what the configuration tells is what the model does."""
    model = build(name, **MODELS[name])
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    its_gradients = gradients(model, expected)
    calls: list[Any] = []
    compute = calls_of.Call.compute
    monkeypatch.setattr(
        calls_of.Call, "compute", lambda call: (calls.append(call), compute(call))[1]
    )
    use_linear_gated_ce(model, chunk_size=4)
    loss = model(tokens, labels=labels).loss
    close(loss, in_float64(model, tokens, labels))
    assert_same(gradients(model, loss), its_gradients)
    assert len(calls) == 1
    # It is a change that shows.
    plain = build(name, **MODELS[name] | PLAIN.get(name, {"final_logit_softcapping": None}))
    assert not torch.allclose(unfused(plain, tokens, labels), expected, rtol=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_its_own_loss_without_a_gate(name: str) -> None:
    model = build(name, **MODELS[name])
    tokens, labels = batch()
    expected = model(tokens, labels=labels).loss
    with use_linear_gated_ce(model, gate=NoGate()):
        close(model(tokens, labels=labels).loss, expected)
        with torch.no_grad():
            outputs = model(tokens, labels=labels)
    close(outputs.loss, expected)  # of the logits, which are capped already
    close(outputs.logits, model(tokens).logits)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "cohere", "granite"])
def test_trainer(name: str, tmp_path: Path) -> None:
    """Three steps are those of the model's own loss."""
    pytest.importorskip("accelerate", reason=MISSING)
    tokens, labels = batch(rows=6)
    data = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    models, losses = [], []
    for gated in (True, False):
        model = build(name, **MODELS[name]).train()
        if gated:
            use_linear_gated_ce(model, gate=NoGate(), chunk_size=4)
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(gated)),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        run = transformers.Trainer(model, arguments, train_dataset=data)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        models.append(model)
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert_same(models[0].state_dict(), models[1].state_dict(), rtol=1e-3, atol=1e-4)


def test_an_option_set_afterwards() -> None:
    """The first call sees it, and computes its loss twice; the next ones expect it."""
    model = build("gemma2", head_dim=8, final_logit_softcapping=None)
    gated = use_linear_gated_ce(model)
    tokens, labels = batch()
    close(model(tokens, labels=labels).loss, in_float64(model, tokens, labels))
    model.config.final_logit_softcapping = 3.0
    for _ in range(2):
        loss = model(tokens, labels=labels).loss
        close(loss, in_float64(model, tokens, labels))
        assert gated.model_map.softcap == 3.0
    model.config.final_logit_softcapping = None
    close(model(tokens, labels=labels).loss, in_float64(model, tokens, labels))


def _capped(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = 3.0 * torch.tanh(0.5 * model.lm_head(hidden).float() / 3.0)
    return logits, model.loss_function(logits, labels, V, **given)


def _capped_and_scaled(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = nn.functional.tanh(model.lm_head(hidden) / 4) * 4 * 0.5
    return logits, model.loss_function(logits, labels, V, **given)


@pytest.mark.parametrize("trick", [_capped, _capped_and_scaled])
def test_what_no_configuration_tells(trick: Any) -> None:
    model = tricky(trick)
    tokens, labels = batch()
    with torch.no_grad():
        logits = model(tokens, labels=labels).logits
    expected = integration.eaft_ext.gated_ce(logits, shifted(labels))
    use_linear_gated_ce(model)
    for _ in range(2):
        close(model(tokens, labels=labels).loss, expected)


def test_options_of_a_model_that_leaves_its_logits() -> None:
    model = build("llama")
    tokens, labels = batch()
    options: dict[str, Any] = {"softcap": 3.0, "logit_scale": 0.5, "z_loss": 1e-2}
    expected = unfused(model, tokens, labels, **options)
    use_linear_gated_ce(model, **options)
    close(model(tokens, labels=labels).loss, expected)


def test_options_of_a_model_with_its_own() -> None:
    model = build("cohere", logit_scale=0.25)
    use_linear_gated_ce(model, softcap=3.0)
    tokens, labels = batch()
    sentence = r"CohereForCausalLM caps or scales its logits itself .* and softcap=3\.0"
    with pytest.raises(TypeError, match=sentence):
        model(tokens, labels=labels)


def test_compiled() -> None:
    model = build("gemma2", head_dim=8, final_logit_softcapping=3.0)
    tokens, labels = batch()
    expected = in_float64(model, tokens, labels)
    use_linear_gated_ce(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(tokens, labels=labels).loss
    close(loss, expected)
    loss.backward()
