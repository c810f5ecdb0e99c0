"""torchtitan's losses with the class of docs/other-stacks.md; its trainer is not run."""

# ruff: noqa: E402, without torchtitan there is nothing to import for.

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spawned import run_processes

MISSING = "needs torchtitan, in an environment of its own: pip install torchtitan"
pytest.importorskip("torchtitan", reason=MISSING)

from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan_worker import VOCAB_SIZES, Loss, inputs

from eaft_ext import reference

WORKER = Path(__file__).with_name("torchtitan_worker.py")


def expected(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels, count = inputs(vocab_size)
    logits.requires_grad_()
    loss = reference.gated_ce(logits, labels, num_items_in_batch=count)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.mark.parametrize("compiled", [False, True])
def test_whole_logits(compiled: bool) -> None:
    config = CompileConfig(enable=compiled, components=["loss"], backend="aot_eager")
    logits, labels, count = inputs(61)
    logits.requires_grad_()
    loss, metrics = Loss.Config().build(compile_config=config)(logits, labels, count)
    loss.backward()
    torch.testing.assert_close((loss.detach(), logits.grad), expected(61))
    assert metrics == {}


def test_in_chunks() -> None:
    """As in ChunkedLossWrapper, which makes the logits of a part of the sequence at a time."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 61, bias=False)
    hidden = torch.randn(2, 8, 16, requires_grad=True)
    _, labels, count = inputs(61)
    wrapper = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=Loss.Config()).build()
    wrapper.set_lm_head(head)
    loss, _ = wrapper(hidden, labels, count)
    loss.backward()
    found = loss.detach(), hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    whole = reference.gated_ce(head(hidden), labels, num_items_in_batch=count)
    whole.backward()
    torch.testing.assert_close(found, (whole.detach(), hidden.grad, head.weight.grad))


def test_tensor_parallel(tmp_path: Path) -> None:
    """The shards of the second size are 31 and 30 words wide."""
    results = run_processes(WORKER, 2, tmp_path, folders=[WORKER.parent])
    for vocab_size in VOCAB_SIZES:
        loss, gradient = expected(vocab_size)
        parts = [of_process[vocab_size] for of_process in results]
        for part in parts:
            torch.testing.assert_close(part["loss"], loss)
        torch.testing.assert_close(torch.cat([part["gradient"] for part in parts], -1), gradient)
