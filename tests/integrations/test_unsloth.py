"""Unsloth on a CPU: a model of its own, and the trainer of TRL as it makes it.

On a GPU its forward is of the class, and multiplies by the weight itself: it is refused as Liger's.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from spawned import run_processes

if find_spec("unsloth") is None:  # imported, it would patch this process, too
    pytest.skip(
        "needs Unsloth, in an environment of its own: pip install unsloth", allow_module_level=True
    )

WORKER = Path(__file__).with_name("unsloth_worker.py")
OP = "use_linear_gated_ce"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unsloth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("UNSLOTH_DISABLE_STATISTICS", "1")
        patch.setenv("UNSLOTH_COMPILE_LOCATION", str(folder / "compiled"))
        (found,) = run_processes(WORKER, 1, folder, timeout=240, folders=[WORKER.parent])
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_step(results: dict[str, Any], has_adapter: bool) -> None:
    found, expected = results["step"][has_adapter]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("by_callback", [False, True])
def test_its_trainer_is_refused(results: dict[str, Any], by_callback: bool) -> None:
    """Which computes the loss in a forward of its own."""
    start = f"TypeError: {OP}: LlamaForCausalLM did not call its loss_function with the logits"
    assert results["sft"][by_callback].startswith(start)
