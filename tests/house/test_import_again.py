"""A second import in a process: its operators are those of the first, and they work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from import_again_worker import WAYS, expected_of
from spawned import run_all, run_processes

import eaft_ext

WORKER = Path(__file__).with_name("import_again_worker.py")


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=() if way == "all modules" else pytest.mark.slow) for way in WAYS],
)
def test_all_operators_work(way: str) -> None:
    """metatensor #871: after ``del sys.modules[...]``, "Duplicate registration"."""
    warnings = (
        "error:Warning only once for all operators:UserWarning"  # of kernels that are replaced
    )
    run_all([["-W", warnings, WORKER, way]], 120)


def test_in_one_process_of_a_group_alone(tmp_path: Path) -> None:
    """It goes on to compare notes with the others."""
    expected, *_ = expected_of("gated_ce")
    for losses in run_processes(WORKER, 2, tmp_path):
        for loss in losses:
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_another_copy_is_refused(tmp_path: Path) -> None:
    """Its compiled part would define the operators again, and end the process."""
    package = Path(eaft_ext.__file__).parent
    shutil.copytree(package, tmp_path / "eaft_ext")
    program = f"""
import sys, eaft_ext
for name in [name for name in sys.modules if name.split(".")[0] == "eaft_ext"]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
try:
    import eaft_ext
except ImportError as error:
    print(error)
"""
    (output,) = run_all([["-c", program]], 60)
    assert output.startswith("eaft_ext: another copy of the compiled part is in this process")
    assert f"{tmp_path}" in output and output.count("\n") == 1
