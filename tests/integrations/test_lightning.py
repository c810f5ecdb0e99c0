"""Lightning's trainer with the module of docs/other-stacks.md."""

# ruff: noqa: E402, without Lightning there is nothing to import for.

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from spawned import run_processes

MISSING = "needs Lightning: pip install lightning '.[test]'"
pytest.importorskip("lightning", reason=MISSING)
pytest.importorskip("transformers", reason=MISSING)

from lightning_worker import OfAnother, OfMeans, OfThePage, WithoutLogits, trained
from trainer_runs import written_out
from transformers_models import assert_same, build

from eaft_ext import reference

WORKER = Path(__file__).with_name("lightning_worker.py")


def loss_of(model: Any, tokens: Any, labels: Any, num_items: Any) -> Any:
    return reference.gated_ce(model(tokens).logits, labels, num_items_in_batch=num_items)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Of a loop in which each step is the mean over all of its tokens."""
    model = build("llama")
    written_out(model, loss_of)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", [OfThePage, WithoutLogits])
def test_as_written_out(kind: Any, expected: dict[str, Any]) -> None:
    assert_same(trained(kind), expected, rtol=1e-4, atol=1e-5)


def test_two_processes(expected: dict[str, Any], tmp_path: Path) -> None:
    for of_process in run_processes(WORKER, 2, tmp_path, folders=[WORKER.parent]):
        for weights in of_process.values():
            assert_same(weights, expected, rtol=1e-4, atol=1e-5)


def test_means_of_micro_batches_are_another_loss(expected: dict[str, Any]) -> None:
    """What the page warns of; with one micro-batch of no labels half of the step is lost."""
    start = dict(build("llama").named_parameters())
    name = "lm_head.weight"
    found = trained(OfMeans)[name]
    away = (found - expected[name]).norm() / (start[name].detach() - expected[name]).norm()
    assert away > 0.3


def test_clipping_is_of_the_mean(expected: dict[str, Any]) -> None:
    """A bound that the sum's gradient exceeds, and that of the mean does not."""
    assert_same(trained(OfThePage, gradient_clip_val=20.0), expected, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_asked_for() -> None:
    with pytest.raises(RuntimeError, match="this step trains LlamaForCausalLM on another loss"):
        trained(OfAnother)
