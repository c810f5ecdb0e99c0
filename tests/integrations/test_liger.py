"""Liger's kernels beside the gated loss: theirs of the loss is refused, the others go with it.

Triton's interpreter runs them on the CPU.
"""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from spawned import run_processes

MISSING = "needs Liger: pip install liger-kernel '.[test]'"
pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("liger_kernel", reason=MISSING)

from trainer_runs import written_out
from transformers_models import batch, build, shifted

from eaft_ext import reference

WORKER = Path(__file__).with_name("liger_worker.py")
LCE = "liger_kernel.transformers.model.llama.lce_forward"
ANOTHER_FORWARD = (
    "TypeError: use_linear_gated_ce: LlamaForCausalLM did not call its loss_function with the "
    "logits of its output layer, as models of transformers do"
)
ANOTHER_LOSS = (
    "RuntimeError: use_linear_gated_ce: this step trains LlamaForCausalLM on another loss than its "
    f"gated one, which was not asked for: that of {LCE}, which has replaced its forward"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        folder = tmp_path_factory.mktemp("liger")
        (found,) = run_processes(WORKER, 1, folder, timeout=240, folders=[WORKER.parent])
    return found  # type: ignore[no-any-return]


def loss_of(model: Any, tokens: Any, labels: Any, num_items: Any) -> Any:
    return reference.gated_ce(model(tokens).logits, labels, num_items_in_batch=num_items)


@pytest.mark.parametrize("where", ["instance", "class", "trainer"])
def test_its_loss_is_refused(results: dict[str, Any], where: str) -> None:
    assert results[where]["before"].startswith(ANOTHER_FORWARD)
    # A class's forward is that which our own calls.
    after = ANOTHER_FORWARD if where == "class" else ANOTHER_LOSS
    assert results[where]["after"].startswith(after)


@pytest.mark.parametrize("order", ["before", "after"])
def test_its_other_kernels_go_with_ours(results: dict[str, Any], order: str) -> None:
    tokens, labels = batch()
    loss = reference.gated_ce(build("llama")(tokens).logits, shifted(labels)).item()
    for where in ("instance unfused", "class unfused"):
        assert results[where][order] == pytest.approx(loss, rel=1e-5), where
    losses = written_out(build("llama"), loss_of)
    assert results["trainer unfused"][order] == pytest.approx(losses, rel=1e-4)
