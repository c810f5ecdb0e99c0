"""The gated loss in a Trainer of several processes, of which one has nothing to learn from."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spawned import run_processes

MISSING = "needs transformers and accelerate: pip install '.[test]'"
pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("accelerate", reason=MISSING)

from trainer_runs import examples, written_out
from transformers_models import assert_same, batch, build, shifted

from eaft_ext import reference

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("trainer_worker.py")
ROOMS = [WORKER.parent]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(WORKER, 2, tmp_path_factory.mktemp("trainer"), timeout=240, folders=ROOMS)


def loss_of(model: Any, tokens: Any, labels: Any, num_items: Any) -> Any:
    return reference.gated_ce(model(tokens).logits, labels, num_items_in_batch=num_items)


@pytest.mark.parametrize("way", ["callback", "function"])
def test_as_one_process(results: list[dict[str, Any]], way: str) -> None:
    model = build("llama")
    losses = written_out(model, loss_of, size=4)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for of_process in results:
        assert of_process[way]["losses"] == pytest.approx(losses, rel=1e-4)
        assert_same(of_process[way]["weights"], weights, rtol=1e-4, atol=1e-5)


def test_logs_are_of_all_processes(results: list[dict[str, Any]]) -> None:
    rows = examples()[:4]
    tokens, labels = (torch.stack([row[n] for row in rows]) for n in ("input_ids", "labels"))
    _, stats = reference.gated_ce(build("llama")(tokens).logits, shifted(labels), return_stats=True)
    assert stats.correct is not None
    for of_process in results:
        found = of_process["callback"]
        assert found["gates"][0] == pytest.approx(stats.gate[stats.valid].mean().item(), rel=1e-4)
        accuracy = stats.correct[stats.valid].float().mean().item()
        assert found["accuracies"][0] == pytest.approx(accuracy, abs=1e-6)


def test_logs_of_fsdp1(results: list[dict[str, Any]]) -> None:
    tokens, labels = batch()
    _, stats = reference.gated_ce(build("llama")(tokens).logits, shifted(labels), return_stats=True)
    for of_process in results:
        nll = stats.nll[stats.valid].mean().item()
        assert of_process["fsdp1"]["eaft_nll"] == pytest.approx(nll, rel=1e-4)
