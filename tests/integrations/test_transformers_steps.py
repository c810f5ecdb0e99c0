"""Training steps of models whose gated loss was not asked for, and evaluation with logits."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_pre_hook,
)

MISSING = "needs transformers: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)

from transformers_models import V, batch, build, close, in_float64, shifted, tricky, unfused

from eaft_ext.integrations import _training_steps
from eaft_ext.integrations.transformers import use_linear_gated_ce

START = "use_linear_gated_ce: this step trains LlamaForCausalLM on another loss than its gated one"


def step(model: Any, optimizer: Any, asks: bool = True) -> None:
    tokens, labels = batch()
    optimizer.zero_grad()
    loss = model(tokens, labels=labels).loss if asks else unfused(model, tokens, labels)
    loss.backward()
    optimizer.step()


def refused(model: Any, optimizer: Any) -> str:
    """The sentence of a step that does not ask; no weight is changed by it."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError) as error:
        step(model, optimizer, asks=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert str(error.value).startswith(START)
    return str(error.value)


def test_steps() -> None:
    model = build("llama").train()
    gated = use_linear_gated_ce(model)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    assert "that of transformers_models.unfused, which gave it no lab" in refused(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    refused(model, optimizer)
    step(model, optimizer)
    gated.remove()
    step(model, optimizer, asks=False)


def test_evaluation_is_no_training() -> None:
    model = build("llama").train()
    use_linear_gated_ce(model)
    optimizer = SGD(model.parameters(), lr=1e-3)
    step(model, optimizer)
    with torch.no_grad():
        model(*batch()[:1], labels=batch()[1])
    refused(model, optimizer)


def test_several_optimizers() -> None:
    model = build("llama").train()
    use_linear_gated_ce(model)
    parameters = list(model.parameters())
    optimizers = [SGD(parameters[:5], lr=1e-3), AdamW(parameters[5:], lr=1e-3)]
    tokens, labels = batch()
    for _ in range(3):
        model.zero_grad()
        model(tokens, labels=labels).loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def test_accumulated_gradients() -> None:
    model = build("llama").train()
    use_linear_gated_ce(model)
    optimizer = SGD(model.parameters(), lr=1e-3)
    tokens, labels = batch()
    for _ in range(2):
        losses = [model(tokens, labels=labels, num_items_in_batch=30).loss for _ in range(2)]
        for loss in losses:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Nothing to learn from, and no step of a model that computed nothing.
    optimizer.step()


def test_a_loss_of_logits_is_the_gated_one() -> None:
    """Where a trainer gives the model's loss function the logits itself."""
    model = build("llama").train()
    use_linear_gated_ce(model)
    optimizer = SGD(model.parameters(), lr=1e-3)
    tokens, labels = batch()
    model.loss_function(model(tokens).logits, labels, V).backward()
    optimizer.step()


@pytest.mark.parametrize("asks", [True, False])
def test_closures(asks: bool) -> None:
    model = build("llama").train()
    use_linear_gated_ce(model)
    optimizer = LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    tokens, labels = batch()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(tokens, labels=labels).loss if asks else unfused(model, tokens, labels)
        loss.backward()
        return loss

    if asks:
        optimizer.step(closure)
        optimizer.step(closure=closure)
    else:
        with pytest.raises(RuntimeError, match=START):
            optimizer.step(closure=closure)


def test_models_that_are_not_trained() -> None:
    """A reference model; another that shares the output layer; one that nobody has called."""
    model, other = build("llama").train(), build("llama", seed=1).train()
    other.lm_head = model.lm_head
    for one in (model, other, build("llama")):
        use_linear_gated_ce(one)
    optimizer = SGD(model.parameters(), lr=1e-3)
    with torch.no_grad():
        other(*batch()[:1])
    for _ in range(2):
        step(model, optimizer)


def test_an_output_layer_that_is_all_that_is_trained() -> None:
    model = build("llama").train()
    model.model.requires_grad_(False)
    use_linear_gated_ce(model)
    optimizer = SGD(model.lm_head.parameters(), lr=1e-3)
    refused(model, optimizer)
    step(model, optimizer)


def test_a_forward_that_is_replaced() -> None:
    """TRL #5823, #5846: SFTTrainer replaces the forward, and multiplies by the weight itself."""

    def fused_forward(self: Any, input_ids: Tensor, labels: Any = None) -> Any:
        logits = self.model(input_ids).last_hidden_state @ self.lm_head.weight.t()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), shifted(labels).flatten())
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss)

    model = build("llama").train()
    use_linear_gated_ce(model)
    model.forward = MethodType(fused_forward, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError) as error:
        step(model, SGD(model.parameters(), lr=1e-3))
    assert ".fused_forward, which has replaced its forward; take the loss" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


ENGINE = """
from torch import nn
from torch.optim import SGD

class Engine(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
        self.vectors = [p.detach().clone().requires_grad_() for p in module.parameters()]
        self.optimizer = SGD(self.vectors[:1], lr=1e-3)

    def step(self):
        for vector, parameter in zip(self.vectors, self.module.parameters()):
            vector.grad = parameter.grad
            self.optimizer.param_groups[0]["params"] = [vector]
            self.optimizer.step()
"""


def test_an_optimizer_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed's ZeRO-3: an engine steps vectors, one after another; test_deepspeed.py."""
    engine_module = ModuleType("deepspeed.runtime.engine")
    exec(ENGINE, vars(engine_module))
    monkeypatch.setitem(sys.modules, engine_module.__name__, engine_module)
    models = [build("llama", seed=seed).train() for seed in (0, 1)]
    engine, of_another = map(engine_module.Engine, models)
    use_linear_gated_ce(models[0])
    for _ in range(2):
        step(models[0], engine)
    step(models[1], of_another, asks=False)
    refused(models[0], engine)
    # Groups of both, of which the model's stand still.
    of_both = SGD([{"params": models[0].parameters(), "lr": 0.0}], lr=1e-3)
    of_both.add_param_group({"params": list(models[1].parameters())})
    unfused(models[1], *batch()).backward()
    of_both.step()


def test_nothing_is_kept_alive() -> None:
    gc.collect()
    hooks, watches = len(_global_optimizer_pre_hooks), len(_training_steps._watches)
    model = build("llama")
    use_linear_gated_ce(model)
    removed = use_linear_gated_ce(build("llama"))
    assert len(_training_steps._watches) == watches + 2
    removed.remove()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert len(_training_steps._watches) == watches
    assert len(_global_optimizer_pre_hooks) == max(hooks, 1)


def test_models_that_are_collected_within_a_step() -> None:
    """Which is then a step like any other."""
    model, parameter = build("llama"), nn.Parameter(torch.zeros(3))
    use_linear_gated_ce(model)
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    collects = register_optimizer_step_pre_hook(lambda *_: gc.collect() and None)
    try:
        del model
        SGD([parameter], lr=1e-3).step()
        assert alive() is None
    finally:
        collects.remove()
        gc.enable()


def test_a_new_optimizer_of_the_same_parameters() -> None:
    model = build("llama").train()
    use_linear_gated_ce(model)
    step(model, SGD(model.parameters(), lr=1e-3))
    refused(model, SGD(model.parameters(), lr=1e-3))


class OwnAdamW(AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_steps_within_steps() -> None:
    """torch hooks the steps of both classes."""
    AdamW([nn.Parameter(torch.zeros(1))])
    model = build("llama").train()
    use_linear_gated_ce(model)
    optimizer = OwnAdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        step(model, optimizer)
    refused(model, optimizer)
    step(model, optimizer)


def test_checkpoints_of_optimizers() -> None:
    """torch.distributed.checkpoint makes steps of zero gradients with a rate of zero."""
    state = pytest.importorskip("torch.distributed.checkpoint.state_dict", reason="needs torch 2.8")
    model = build("llama").train()
    use_linear_gated_ce(model)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    saved = state.get_optimizer_state_dict(model, optimizer)
    step(model, optimizer)
    state.set_optimizer_state_dict(model, optimizer, saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_steps_that_are_not_watched() -> None:
    model = build("llama").train()
    use_linear_gated_ce(model, watch_steps=False)
    step(model, SGD(model.parameters(), lr=1e-3), asks=False)
    with pytest.raises(TypeError, match=r"watch_steps must be True or False, got 'no'"):
        use_linear_gated_ce(model, watch_steps="no")  # type: ignore[arg-type]


def test_another_call_between_loss_and_step() -> None:
    """As with options that follow a schedule, also where a loss function came in between."""
    model = build("llama").train()
    use_linear_gated_ce(model)
    tokens, labels = batch()
    optimizer = SGD(model.parameters(), lr=1e-3)
    model(tokens, labels=labels).loss.backward()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    use_linear_gated_ce(model, alpha=2.0)
    optimizer.step()
    step(model, optimizer)


def test_a_handle_that_is_kept_in_the_model(tmp_path: Path) -> None:
    model = build("llama").train()
    model.gated = use_linear_gated_ce(model)
    assert copy.deepcopy(model).gated is model.gated
    torch.save(model, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    found.gated.remove()
    assert found.gated.stats is None


# The Trainer of transformers


def run_trainer(model: Any, folder: Path, **options: Any) -> Any:
    pytest.importorskip("accelerate", reason=MISSING)
    own = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")
    given = {name: options.pop(name) for name in own if name in options}
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    tokens, labels = batch(rows=8)
    data = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:4], **given
    )


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.mean()},
    ],
)
def test_a_trainer_that_computes_its_own_loss(options: dict[str, Any], tmp_path: Path) -> None:
    """TRL #5823, #5846: nothing but stats that stayed None showed it."""
    model = build("llama")
    use_linear_gated_ce(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError) as error:
        run_trainer(model, tmp_path, **options).train()
    assert str(error.value).startswith(START)
    assert "compute_loss, which gave it no labels, as with label_smoothing" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_metrics(tmp_path: Path) -> None:
    """unsloth #3126, TRL #6224: metrics were given no logits."""
    model = build("llama")
    tokens, labels = (part[:4] for part in batch(rows=8))
    logits = model(tokens).logits
    right = float((logits.argmax(-1) == labels).float().mean())
    use_linear_gated_ce(model)
    run = run_trainer(model, tmp_path, compute_metrics=accuracy)
    assert run.evaluate()["eval_accuracy"] == pytest.approx(right)
    found = run.predict(run.eval_dataset).predictions
    np.testing.assert_allclose(found, logits.detach().numpy(), rtol=1e-5, atol=1e-6)
    run = run_trainer(
        model,
        tmp_path,
        compute_metrics=lambda prediction: {"sum": int(prediction.predictions.sum())},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    assert run.evaluate()["eval_sum"] == int(logits.argmax(-1).sum())
    run.train()


def test_logits_in_evaluation() -> None:
    model = build("llama")
    tokens, labels = batch()
    expected, logits = in_float64(model, tokens, labels), model(tokens).logits
    for keeps in (True, False):
        gated = use_linear_gated_ce(model, logits_in_evaluation=keeps)
        for is_training in (True, False):
            model.train(is_training)
            outputs = model(tokens, labels=labels)
            close(outputs.loss, expected)
            assert outputs.logits is None
            with torch.no_grad():
                outputs = model(tokens, labels=labels)
                named = model(input_ids=tokens, labels=labels, return_dict=False)
            close(outputs.loss, expected)
            close(named[0], expected)
            assert gated.stats is not None and gated.stats.nll.shape == (2, 9)
            if keeps and not is_training:
                close(outputs.logits, logits)
                close(named[1], logits)
            else:
                assert outputs.logits is None
                assert all(getattr(output, "shape", ()) != (2, 9, V) for output in named)
    with pytest.raises(TypeError, match=r"logits_in_evaluation must be True or False, got None"):
        use_linear_gated_ce(model, logits_in_evaluation=None)  # type: ignore[arg-type]


def test_evaluation_is_that_of_training() -> None:
    """Also where a forward does not hand its arguments on to its loss function."""

    def forgetful(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
        logits = model.lm_head(hidden)
        return logits, None if labels is None else model.loss_function(logits, labels, V)

    model = tricky(forgetful)
    tokens, labels = batch()
    use_linear_gated_ce(model)
    losses = []
    for has_gradients in (True, False):
        with torch.set_grad_enabled(has_gradients):
            losses.append(model(tokens, labels=labels, num_items_in_batch=5).loss)
    close(losses[0], losses[1])
