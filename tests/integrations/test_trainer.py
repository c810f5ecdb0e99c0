"""The gated loss in a Trainer of transformers: a callback, and a function of logits."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs transformers and accelerate: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("accelerate", reason=MISSING)

from trainer_runs import InOrder, arguments, examples, logged, written_out
from transformers_models import assert_same, build, own_attributes, shifted

from eaft_ext import NoGate, SigmoidGate, reference
from eaft_ext.integrations.trainer import EAFTCallback, gated_loss_func
from eaft_ext.integrations.transformers import use_linear_gated_ce

CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def run(model: Any, folder: Path, *callbacks: Any, **changes: Any) -> Any:
    func = changes.pop("compute_loss_func", None)
    trainer = InOrder(
        model,
        arguments(folder, **changes),
        train_dataset=examples(),
        eval_dataset=examples()[:6],
        callbacks=list(callbacks),
        compute_loss_func=func,
    )
    trainer.train()
    return trainer


def by_reference(**options: Any) -> Any:
    def loss_of(model: Any, tokens: Any, labels: Any, num_items: Any) -> Any:
        logits = model(tokens).logits
        return reference.gated_ce(logits, labels, num_items_in_batch=num_items, **options)

    return loss_of


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", pytest.param("smollm2", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "options", [{}, {"k": None}, {"gate": SigmoidGate(), "z_loss": 1e-3}], ids=str
)
def test_a_training(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Uneven micro-batches, one of them without labels, are as one large batch."""
    expected_model = build(name)
    expected = written_out(expected_model, by_reference(**options), size=4)
    model = build(name)
    trainer = run(model, tmp_path, EAFTCallback(**options))
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-4)
    assert_same(weights(model), weights(expected_model), **CLOSE)


def test_a_function_of_logits(tmp_path: Path) -> None:
    expected_model = build("llama")
    expected = written_out(expected_model, by_reference(k=10, alpha=2.0), size=4)
    model = build("llama")
    loss_func = gated_loss_func(k=10, alpha=2.0)
    trainer = run(model, tmp_path, compute_loss_func=loss_func)
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-4)
    assert_same(weights(model), weights(expected_model), **CLOSE)


@pytest.mark.parametrize("way", ["callback", "function"])
def test_without_a_gate_it_is_the_trainers_own_loss(way: str, tmp_path: Path) -> None:
    expected_model, model = build("llama"), build("llama")
    expected = run(expected_model, tmp_path / "own")
    if way == "callback":
        trainer = run(model, tmp_path / "gated", EAFTCallback(gate=NoGate()))
    else:
        loss_func = gated_loss_func(gate=NoGate())
        trainer = run(model, tmp_path / "gated", compute_loss_func=loss_func)
    assert logged(trainer, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-5)
    assert_same(weights(model), weights(expected_model), **CLOSE)


def test_a_function_of_other_outputs() -> None:
    model = build("llama")
    rows = examples()[6:8]
    tokens, labels = (torch.stack([row[n] for row in rows]) for n in ("input_ids", "labels"))
    expected = reference.gated_ce(model(tokens).logits, shifted(labels))
    for outputs in (model(tokens), model(tokens, return_dict=False), dict(model(tokens))):
        torch.testing.assert_close(gated_loss_func()(outputs, labels), expected)
    half = gated_loss_func()(model(tokens), labels, num_items_in_batch=torch.tensor(7))
    torch.testing.assert_close(half * 7, expected * (shifted(labels) != -100).sum())


class Recorder(transformers.TrainerCallback):
    """As TensorBoard's: it comes before the callbacks of the user."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))


def _stats(model: Any, rows: list[dict[str, Any]]) -> Any:
    logits = model(torch.stack([row["input_ids"] for row in rows])).logits
    labels = shifted(torch.stack([row["labels"] for row in rows]))
    return reference.gated_ce(logits, labels, return_stats=True)[1]


def test_logs(tmp_path: Path) -> None:
    recorder = Recorder()
    model = build("llama")
    before = copy.deepcopy(model)
    run(model, tmp_path, recorder, EAFTCallback(), eval_strategy="steps", eval_steps=1)
    first = next(logs for logs in recorder.logs if "loss" in logs)
    stats = _stats(before, examples()[:4])
    valid = stats.valid
    assert stats.correct is not None
    conflicts = (stats.nll.neg().exp() < 0.1) & (stats.entropy < 0.3 * torch.tensor(20.0).log())
    expected = {
        "eaft_gate": stats.gate,
        "eaft_entropy": stats.entropy,
        "eaft_nll": stats.nll,
        "eaft_token_accuracy": stats.correct.float(),
        "eaft_confident_conflicts": conflicts.float(),
    }
    for name, stat in expected.items():
        assert first[name] == pytest.approx(stat[valid].mean().item(), rel=1e-4), name
        assert [name in logs for logs in recorder.logs] == [
            "loss" in logs for logs in recorder.logs
        ]
    of_evaluations = [logs for logs in recorder.logs if "eval_loss" in logs]
    assert len(of_evaluations) == 3
    at_the_end = _stats(model, examples()[:6])
    nll = at_the_end.nll[at_the_end.valid].mean().item()
    assert of_evaluations[-1]["eval_eaft_nll"] == pytest.approx(nll, rel=1e-4)
    assert not any(name.startswith("eaft") for name in recorder.logs[-1])


def test_no_logs(tmp_path: Path) -> None:
    recorder = Recorder()
    run(build("llama"), tmp_path, recorder, EAFTCallback(logs=False))
    assert len(recorder.logs) == 4 and not any(
        "eaft" in name for log in recorder.logs for name in log
    )


def test_the_model_afterwards(tmp_path: Path) -> None:
    """On disk, and in memory, it is as if the loss had never been there."""
    other, model = build("smollm2"), build("smollm2")
    run(other, tmp_path / "own")
    callback = EAFTCallback()
    trainer = run(model, tmp_path / "gated", callback)
    assert callback.gated is None
    after = own_attributes(model)
    for name, attributes in own_attributes(other).items():
        assert set(attributes) == set(after[name]), name
    rows = examples()[6:8]
    tokens, labels = (torch.stack([row[n] for row in rows]) for n in ("input_ids", "labels"))
    own = model(tokens, labels=labels)
    assert own.logits is not None
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(tokens, labels=labels).loss, own.loss)
    torch.testing.assert_close(copy.deepcopy(model)(tokens, labels=labels).loss, own.loss)
    generated = again.generate(tokens[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=3, do_sample=False), generated)
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_checkpoint(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = build("llama")
    run(whole, tmp_path / "whole", EAFTCallback())
    first = build("llama")
    run(first, tmp_path / "parts", EAFTCallback(), **options, max_steps=2)
    resumed = build("llama", seed=1)
    trainer = InOrder(
        resumed,
        arguments(tmp_path / "parts", **options),
        train_dataset=examples(),
        callbacks=[EAFTCallback()],
    )
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(resumed), weights(whole), **CLOSE)


def test_one_after_the_other(tmp_path: Path) -> None:
    """A callback may be used again, and be added to a trainer that was made."""
    callback = EAFTCallback()
    trainer = InOrder(build("llama"), arguments(tmp_path), train_dataset=examples())
    trainer.add_callback(callback)
    trainer.train()
    first = logged(trainer, "loss")
    again = run(build("llama"), tmp_path, callback)
    assert logged(again, "loss") == first


def test_smoothed_labels_of_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EAFTCallback\(label_smoothing=0.1\)"):
        run(build("llama"), tmp_path, EAFTCallback(), label_smoothing_factor=0.1)


def test_a_loss_function_beside_it(tmp_path: Path) -> None:
    model = build("llama")
    before = weights(copy.deepcopy(model))
    callback = EAFTCallback()
    with pytest.raises(RuntimeError, match="compute_loss_func"):
        run(model, tmp_path, callback, compute_loss_func=gated_loss_func())
    assert_same(weights(model), before, rtol=0.0, atol=0.0)
    assert callback.gated is not None
    callback.remove()
    assert callback.gated is None
    rows = examples()[6:8]
    assert model(torch.stack([row["input_ids"] for row in rows])).logits is not None


def test_options_that_are_refused() -> None:
    with pytest.raises(ValueError, match="EAFTCallback: k must be from 2 to 128, or None"):
        EAFTCallback(k=1)
    with pytest.raises(TypeError, match="EAFTCallback: logs must be True or False, got 1"):
        EAFTCallback(logs=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gated_loss_func: k must be"):
        gated_loss_func(k=500)
    for make in (EAFTCallback, gated_loss_func):
        with pytest.raises(ValueError, match="ignore_index must be -100, by which trainers pad"):
            make(ignore_index=-7)


def test_an_unknown_option(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="softcup"):
        EAFTCallback(softcup=3.0)


def test_the_loss_function_shows_its_arguments() -> None:
    """Trainers look whether it takes num_items_in_batch."""
    import inspect

    model = build("llama")
    own = inspect.signature(model.loss_function)
    with use_linear_gated_ce(model):
        assert inspect.signature(model.loss_function) == own
    assert "num_items_in_batch" in own.parameters


def test_outputs_that_a_function_refuses() -> None:
    model = build("llama")
    tokens = torch.stack([row["input_ids"] for row in examples()[:2]])
    logits = model(tokens).logits
    func = gated_loss_func()
    with pytest.raises(TypeError, match="the model has an encoder"):
        func({"logits": logits, "encoder_last_hidden_state": logits}, tokens)
    with pytest.raises(ValueError, match=r"one for each position, got \(2, 9\) for logits \(2, 3"):
        func({"logits": logits[:, -3:]}, tokens)
    with pytest.raises(ValueError, match=r"nn\.DataParallel is not supported"):
        func({"logits": logits}, tokens, num_items_in_batch=torch.ones(2, 1))


def test_predictions_are_no_evaluation(tmp_path: Path) -> None:
    """What they find is in no log; an evaluation of any name has its own means."""

    class Predicting(transformers.TrainerCallback):
        trainer: Any = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.trainer.predict(examples()[6:8])
            self.trainer.evaluate(examples()[4:6], metric_key_prefix="train")

    found = []
    for others in ([], [Predicting()]):
        callbacks = [EAFTCallback(), *others]
        trainer = InOrder(
            build("llama"),
            arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2),
            train_dataset=examples(),
            eval_dataset=examples()[:6],
            callbacks=callbacks,
        )
        for callback in others:
            callback.trainer = trainer
        trainer.train()
        found.append(logged(trainer, "eval_eaft_nll") + logged(trainer, "eaft_nll"))
        assert len(logged(trainer, "train_eaft_nll")) == 2 * len(others)
    assert found[0] == pytest.approx(found[1]) and len(found[0]) >= 3


def test_after_an_exception(tmp_path: Path) -> None:
    """The model of a training that failed has its own loss when the callback is used again."""

    class Failing(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyError("a mishap")

    first, callback = build("llama"), EAFTCallback()
    with pytest.raises(KeyError, match="a mishap"):
        run(first, tmp_path, callback, Failing())
    rows = torch.stack([row["input_ids"] for row in examples()[:2]])
    assert first(rows, labels=rows).logits is None
    run(build("llama"), tmp_path, callback)
    assert first(rows, labels=rows).logits is not None


def test_weights_that_are_gathered_for_a_call_alone(tmp_path: Path) -> None:
    """As FSDP's and DeepSpeed's are: beside it there may be no word."""
    model = build("llama")
    with use_linear_gated_ce(model, k=None) as gated:
        rows = torch.stack([row["input_ids"] for row in examples()[:2]])
        model(rows, labels=rows)
        model.lm_head.weight.data = torch.empty(0)
        assert gated.num_logits == model.config.vocab_size
