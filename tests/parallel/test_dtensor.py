"""``gated_ce`` of DTensors: divided by rows, by vocabulary, or both, over a mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dtensor_worker import LABELS, OPTIONS, placements_of, whole
from spawned import Runs, by_size

import eaft_ext

WORKER = Path(__file__).with_name("dtensor_worker.py")
WORLD_SIZES = (1, 3, 4)
CASES = [(n, placement) for n in WORLD_SIZES for placement in placements_of(n)]
each_size = pytest.mark.parametrize("world_size", by_size(WORLD_SIZES, slow_from=4))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process saved, for each number of processes."""
    return Runs(WORKER, tmp_path_factory)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("world_size", "placement"), by_size(CASES, slow_from=4))
def test_is_the_loss_of_whole_rows(
    results: dict[int, list[dict[str, Any]]], world_size: int, placement: str, option: str
) -> None:
    """Whatever the labels are: a tensor of all, a DTensor, or the process's own."""
    logits, labels = whole()
    logits.requires_grad_()
    options = {"return_stats": True} | OPTIONS[option] | {"inplace_backward": False}
    loss, stats = eaft_ext.gated_ce(logits, labels, **options)
    (loss if loss.dim() == 0 else loss.square().sum()).backward()
    for of_process in results[world_size]:
        for kind in LABELS:
            found = of_process[f"{placement} {kind} {option}"]
            torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found["gradient"], logits.grad, rtol=1e-5, atol=1e-6)
            for a, b in zip(found["stats"], stats, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", OPTIONS)
@each_size
def test_collectives(
    results: dict[int, list[dict[str, Any]]], world_size: int, option: str
) -> None:
    """One for a divided vocabulary, none for whole rows, none in the backward."""
    for kind in LABELS:
        for placement, expected in (("vocabulary", world_size > 1), ("replicated", False)):
            found = results[world_size][0][f"{placement} {kind} {option}"]
            assert found["collectives"] == (int(expected), 0), (placement, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("partial", "ValueError: gated_ce: logits must be Shard or Replicate on every dimension"),
        ("k", "ValueError: gated_ce: k must be from 2 to 128, or None for all, got 1"),
        ("vocabulary divided twice", "ValueError: gated_ce: the vocabulary must be divided over"),
        ("another mesh", "ValueError: gated_ce: labels and logits are on different meshes"),
    ],
)
def test_errors(results: dict[int, list[dict[str, Any]]], error: str, sentence: str) -> None:
    for of_process in results[4]:
        assert of_process["errors"][error].startswith(sentence)


@pytest.mark.parametrize("world_size", by_size(WORLD_SIZES[1:], slow_from=4))
def test_what_is_wrong_in_one_process_is_raised_in_all(
    results: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    own, *others = (r["errors"]["labels of another shape in one"] for r in results[world_size])
    reason = "labels must have the shape of the logits without the last dimension, got (9,)"
    assert own.startswith(f"ValueError: gated_ce: {reason}")
    for error in others:
        assert error.startswith(f"ValueError: gated_ce: process 0 failed: {reason}")


@each_size
def test_after_errors_and_compiled(
    results: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    logits, labels = whole()
    loss = eaft_ext.gated_ce(logits, labels)
    for of_process in results[world_size]:
        for name in ("afterwards", "compiled"):
            torch.testing.assert_close(of_process[name], loss, rtol=1e-6, atol=1e-6)
