"""DistributedDataParallel, where a process may have nothing to learn from in a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ddp_worker import build_model, inputs_of
from spawned import run_processes

import eaft_ext

WORKER = Path(__file__).with_name("ddp_worker.py")
WORLD_SIZE = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each process of a run of ddp_worker.py saved."""
    return run_processes(WORKER, WORLD_SIZE, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("step", ["all_ignored_on_one", "no_tokens_on_one", "both_learn"])
def test_gradients_are_averaged(results: list[dict[str, torch.Tensor]], step: str) -> None:
    expected = []
    for rank in range(WORLD_SIZE):
        model = build_model()
        hidden, labels = inputs_of(step, rank)
        loss = eaft_ext.reference.gated_ce(model(hidden), labels)
        loss.backward()
        torch.testing.assert_close(results[rank][f"{step} loss"], loss.detach())
        expected.append(model.weight.grad)
    average = torch.stack(expected).mean(0)
    assert average.any()
    for found in results:
        torch.testing.assert_close(found[f"{step} gradient"], average, rtol=1e-4, atol=1e-6)


def test_a_process_without_tokens_has_a_loss_of_zero(
    results: list[dict[str, torch.Tensor]],
) -> None:
    for step in ("all_ignored_on_one", "no_tokens_on_one"):
        assert results[1][f"{step} loss"] == 0 and results[0][f"{step} loss"] > 0
