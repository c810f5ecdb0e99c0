"""The gated loss in a Trainer of several processes, of which one has nothing to learn from."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs transformers and accelerate: pip install '.[test]'"
pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("accelerate", reason=MISSING)

from data_parallel import WAYS, options_of, trained, whole_weights
from torch.distributed.fsdp import FullyShardedDataParallel
from trainer_runs import (
    LEARNING_RATE,
    STEPS,
    InOrder,
    arguments,
    examples,
    kept_landscapes,
    logged,
    written_out,
)
from transformers_models import assert_same, batch, build, shifted

from eaft_ext import reference
from eaft_ext._landscape import counts
from eaft_ext.integrations.trainer import EAFTCallback, gated_loss_func

pytestmark = pytest.mark.slow

# A step has two rows of each process, all at once or one by one. In the first step the second
# process has no labels; one by one, neither has any in the second micro-batch.
AT_ONCE = {"gradient_accumulation_steps": 1}
ONE_BY_ONE = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
# The model, the arguments, and whether the callback gives the loss.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "callback": ("llama", AT_ONCE, True),
    "accumulated": ("llama", ONE_BY_ONE, True),
    "tied embeddings": ("smollm2", AT_ONCE, True),
    "function": ("llama", AT_ONCE, False),
    "function, accumulated": ("llama", ONE_BY_ONE, False),
}
Results = list[dict[str, Any]]


def train_in_process(way: str, _: Path) -> dict[str, Any]:
    found = {case: run(way, *CASES[case]) for case in CASES}
    return found | ({"fsdp1": logs_of_fsdp1()} if way == "ddp" else {})


def run(way: str, name: str, changes: dict[str, Any], is_callback: bool) -> dict[str, Any]:
    """Losses, logs, landscapes and weights after some steps."""
    model = build(name)
    more: dict[str, Any] = {"compute_loss_func": gated_loss_func()}
    with tempfile.TemporaryDirectory() as folder, kept_landscapes() as landscapes:
        trainer = InOrder(
            model,
            arguments(
                Path(folder),
                eval_strategy="steps",
                eval_steps=1,
                **changes,
                **options_of(way, LEARNING_RATE),
            ),
            train_dataset=examples(),
            eval_dataset=examples()[:8],
            **({"callbacks": [EAFTCallback(landscape=True)]} if is_callback else more),
        )
        trainer.train()
    names = ("loss", "eaft_gate", "eaft_token_accuracy", "eval_eaft_gate")
    return {
        "logs": {of_log: logged(trainer, of_log) for of_log in names},
        "landscapes": landscapes,
        "weights": whole_weights(model, way),
    }


def logs_of_fsdp1() -> dict[str, float]:
    """Of a step; beside their call its weights are parts of a vector."""
    model = FullyShardedDataParallel(
        build("llama"), device_id=torch.device("cpu"), use_orig_params=True
    )
    tokens, labels = batch()
    callback = EAFTCallback()
    with callback.installed(model, None):
        model.train()
        model(input_ids=tokens, labels=labels).loss.backward()
        callback.on_step_end(None, None, None)
        return callback.take_means(is_evaluation=False)


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    way: str = request.param
    return way


@pytest.fixture(scope="module")
def results(way: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return trained(__file__, way, tmp_path_factory.mktemp(way))


def loss_of(model: Any, tokens: Any, labels: Any, num_items: Any) -> Any:
    return reference.gated_ce(model(tokens).logits, labels, num_items_in_batch=num_items)


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(results: Results, case: str) -> None:
    model = build(CASES[case][0])
    losses = written_out(model, loss_of, size=4)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for of_process in results:
        assert of_process[case]["logs"]["loss"] == pytest.approx(losses, rel=1e-4)
        assert_same(of_process[case]["weights"], weights, rtol=1e-4, atol=1e-5)


def stats_of(model: Any, rows: list[dict[str, Any]]) -> Any:
    tokens, labels = (torch.stack([row[n] for row in rows]) for n in ("input_ids", "labels"))
    return reference.gated_ce(model(tokens).logits, shifted(labels), return_stats=True)[1]


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2]])
def test_logs_are_of_all_processes(results: Results, case: str) -> None:
    """Of the first step, and of the evaluation after the last."""
    before, after = build(CASES[case][0]), build(CASES[case][0])
    written_out(after, loss_of, size=4)
    stats, evaluated = stats_of(before, examples()[:4]), stats_of(after.eval(), examples()[:8])
    gate, accuracy = stats.gate[stats.valid].mean(), stats.correct[stats.valid].float().mean()
    for of_process in results:
        logs = of_process[case]["logs"]
        assert logs["eaft_gate"][0] == pytest.approx(gate.item(), rel=1e-4)
        assert logs["eaft_token_accuracy"][0] == pytest.approx(accuracy.item(), abs=1e-6)
        gate_after = evaluated.gate[evaluated.valid].mean().item()
        assert logs["eval_eaft_gate"][-1] == pytest.approx(gate_after, rel=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2]])
def test_landscapes_are_of_all_processes(results: Results, case: str) -> None:
    """Of every token, and in the main process alone."""
    main, other = (of_process[case]["landscapes"] for of_process in results)
    assert other == []
    after = build(CASES[case][0])
    of_step = {("eaft_landscape", 1): stats_of(after, examples()[:4])}
    written_out(after, loss_of, size=4)
    of_step["eval_eaft_landscape", STEPS] = stats_of(after.eval(), examples()[:8])
    found = {(name, step): cells for name, cells, step in main}
    assert len(found) == len(main) == 2 * STEPS
    for log, stats in of_step.items():
        expected = counts(stats.nll, stats.entropy, 20, stats.valid)
        assert found[log].sum() == stats.valid.sum()
        # A token on the edge of a cell may be rounded to the next one.
        assert (found[log] - expected).abs().sum() <= 2, log
    for step in range(1, STEPS + 1):
        labels = stats_of(after, examples()[4 * step - 4 : 4 * step]).valid.sum()
        assert found["eaft_landscape", step].sum() == labels


@pytest.mark.parametrize("way", ["ddp"], indirect=True)
def test_logs_of_fsdp1(results: Results) -> None:
    tokens, labels = batch()
    _, stats = reference.gated_ce(build("llama")(tokens).logits, shifted(labels), return_stats=True)
    for of_process in results:
        nll = stats.nll[stats.valid].mean().item()
        assert of_process["fsdp1"]["eaft_nll"] == pytest.approx(nll, rel=1e-4)
