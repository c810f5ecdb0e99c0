"""The whole vocabulary in every process, where each should have a shard of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spawned import Runs, by_size
from whole_logits_worker import FUNCTIONS, WIDTH, Call, calls_of, refused, right

import eaft_ext

Results = dict[int, list[dict[str, Any]]]

WORKER = Path(__file__).with_name("whole_logits_worker.py")
WORLD_SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process found, for each number of processes."""
    return Runs(WORKER, tmp_path_factory)


def _loss(call: Call) -> torch.Tensor:
    """In float64, of the words of all processes."""
    logits = torch.cat(call.logits(), -1).double()
    options = dict(call.options)
    words = options.pop("vocab_size", logits.size(-1))
    return eaft_ext.gated_ce(logits[..., :words], call.labels, **options)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("world_size", "name"), by_size((n, name) for n in (2, 3) for name in refused(n))
)
def test_they_are_refused_in_all_processes(
    results: Results, world_size: int, name: str, function: str
) -> None:
    """Megatron #7452: the loss is then that of a vocabulary as many times as large."""
    call = refused(world_size)[name]
    own = Call(call.hidden, call.weights[:1], call.labels, call.bias, call.options)
    assert _loss(call) - _loss(own) > 0.1, "the loss would be another one"
    op, whole = "vocab_parallel_gated_ce", "gathered logits are for eaft_ext.gated_ce"
    if function == "weight":
        op, whole = "vocab_parallel_linear_gated_ce", "whole weight is for eaft_ext.linear_gated_ce"
    for of_process in results[world_size]:
        told = of_process[f"{name} {function}"]
        assert isinstance(told, str), f"no error, and the loss {told}"
        assert told.startswith(f"{op}: processes {call.equal} have the same numbers for {WIDTH} ")
        assert f"all labels are below {WIDTH}: these are no shards of {WIDTH * world_size}" in told
        assert whole in told and "\n" not in told


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("world_size", "name"),
    by_size((n, name) for n in WORLD_SIZES for name in (calls_of(1) if n == 1 else right(n))),
)
def test_no_shards_are_taken_for_them(
    results: Results, world_size: int, name: str, function: str
) -> None:
    """Equal ones with labels in several, rows that tell nothing, what the caller has said."""
    expected = _loss(calls_of(world_size)[name])
    for of_process in results[world_size]:
        loss = of_process[f"{name} {function}"]
        assert isinstance(loss, torch.Tensor), loss
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", by_size([2, 3]))
def test_nobody_waits_for_a_device_to_see_it(results: Results, world_size: int) -> None:
    """But at a group's first call, and where EAFT_EXT_CHECKS=1 asks for it."""
    for of_process in results[world_size]:
        assert of_process["looks"] == [1, 0, 1]
