"""Models of transformers without logits, under FSDP2 and DDP."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spawned import run_processes

MISSING = "needs transformers: pip install '.[test]'"
pytest.importorskip("transformers", reason=MISSING)

from transformers_models import assert_same, batch, build, gradients, unfused
from transformers_worker import GATES, GROUPS, ORDERS

WORKER = Path(__file__).with_name("transformers_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("transformers")
    return run_processes(WORKER, 2, folder, timeout=240)


def expected(gate: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The losses of both processes, and the mean of their gradients."""
    model = build("llama")
    losses = [unfused(model, *batch(seed=rank), gate=GATES[gate]) for rank in range(2)]
    return [loss.detach() for loss in losses], gradients(model, (losses[0] + losses[1]) / 2)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", GROUPS)
def test_fsdp2(results: list[dict[str, Any]], groups: str, order: str, gate: str) -> None:
    """With the output layer in a group of its own, and in that of the whole model."""
    losses, its_gradients = expected(gate)
    model = build("llama")
    logits = model(batch(seed=0)[0]).logits
    for rank, of_process in enumerate(results):
        found = of_process[f"{groups} {order} {gate}"]
        torch.testing.assert_close(found["loss"], losses[rank], rtol=1e-5, atol=1e-6)
        assert_same(found["gradients"], its_gradients)
        torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-6)


def test_outputs_that_fsdp2_rounds(results: list[dict[str, Any]]) -> None:
    """The loss is that of the logits, in float32 still."""
    losses, _ = expected("built-in")
    for rank, of_process in enumerate(results):
        found = of_process["rounded outputs"]["loss"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, losses[rank], rtol=1e-5, atol=1e-6)


def test_fsdp1(results: list[dict[str, Any]]) -> None:
    losses, _ = expected("built-in")
    for rank, of_process in enumerate(results):
        torch.testing.assert_close(of_process["fsdp1"]["loss"], losses[rank], rtol=1e-5, atol=1e-6)


def test_steps_that_do_not_ask(results: list[dict[str, Any]]) -> None:
    sentence = "use_linear_gated_ce: this step trains FSDPLlamaForCausalLM on another loss"
    for of_process in results:
        assert of_process["another loss"].startswith(sentence)


def test_ddp(results: list[dict[str, Any]]) -> None:
    losses, its_gradients = expected("built-in")
    for rank, of_process in enumerate(results):
        torch.testing.assert_close(of_process["ddp"]["loss"], losses[rank], rtol=1e-5, atol=1e-6)
        assert_same(of_process["ddp"]["gradients"], its_gradients)


def test_tensor_parallelism_of_the_output_layer_is_refused(results: list[dict[str, Any]]) -> None:
    for of_process in results:
        assert "the output layer of LlamaForCausalLM" in of_process["tensor parallelism"]
        assert "tensor parallelism" in of_process["tensor parallelism"]
