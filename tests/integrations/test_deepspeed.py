"""DeepSpeed's engine, in two processes: ZeRO divides optimizer, gradients and weights."""

# ruff: noqa: E402, without DeepSpeed there is nothing to import for.

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from spawned import run_processes

MISSING = "needs DeepSpeed: pip install deepspeed '.[test]'"
pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("deepspeed", reason=MISSING)

from deepspeed_worker import RUNS
from trainer_runs import written_out
from transformers_models import build

from eaft_ext import reference

WORKER = Path(__file__).with_name("deepspeed_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    return run_processes(WORKER, 2, folder, timeout=240, folders=[WORKER.parent])


def loss_of(model: Any, tokens: Any, labels: Any, num_items: Any) -> Any:
    return reference.gated_ce(model(tokens).logits, labels, num_items_in_batch=num_items)


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_as_one_process(results: list[dict[str, Any]], run: tuple[str, str, str]) -> None:
    expected = written_out(build(run[1]), loss_of)
    parts = [of_process["losses"][run] for of_process in results]
    found = [sum(part) / len(results) for part in zip(*parts, strict=True)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_another_loss_is_refused(results: list[dict[str, Any]]) -> None:
    """Though its optimizers have no parameter of the model."""
    for of_process in results:
        for way, sentence in of_process["refused"].items():
            assert sentence.startswith(
                "use_linear_gated_ce: this step trains LlamaForCausalLM on another loss than its "
                "gated one, which was not asked for: that of transformers_models.unfused, which "
                "gave it no labels"
            ), f"{way}: {sentence}"
