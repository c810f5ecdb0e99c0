"""No kernel needs more registers than there are: no spills and no local memory."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cuda_on_host import build
from nvcc import nvcc
from ptx_on_host import compiled

pytestmark = pytest.mark.nvcc

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((build.CSRC / "cuda").glob("*.cu"))
# Compiled for all architectures in the least time.
QUICK = "gated_ce_merge"


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_of_what_runs_on_the_host(source: Path, tmp_path: Path) -> None:
    """The PTX that the other tests run, as the architecture's own compiler takes it."""
    text = tmp_path / f"{source.stem}.ptx"
    text.write_text(compiled.ptx("sm_90")[source.stem])
    command = [_nvcc(), "-cubin", "-arch=sm_90", "-Xptxas", "-v", text]
    check([*command, "-o", tmp_path / "object.cubin"], source.stem, ["90"])


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.sweep] if path.stem != QUICK else [])
        for path in SOURCES
    ],
)
def test_of_every_architecture(source: Path, tmp_path: Path) -> None:
    """Of all that setup.py builds for, as far as this nvcc knows them."""
    known = subprocess.run([_nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout
    of_setup = runpy.run_path(str(ROOT / "setup.py"))["CUDA_ARCHITECTURES"]
    numbers = [name.replace(".", "") for name in of_setup]
    numbers = [number for number in numbers if f"compute_{number}" in known.split()]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    command = [_nvcc(), *compiled.NVCC_FLAGS, "-Xptxas", "-v", "--threads", "2", *targets]
    check([*command, "-c", source, "-o", tmp_path / "object.o"], source.stem, numbers)


def _nvcc() -> str:
    found = nvcc()
    assert found is not None, "what is marked nvcc runs where there is one"
    return found


def check(command: list[Any], stem: str, numbers: list[str]) -> None:
    """As ptxas reports it of every kernel and function."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    entry = r"Compiling entry function '(\w+_kernel\w*)' for 'sm_(\d+)'"
    kernels = re.findall(entry, result.stderr)
    # Each kernel for three types of logits, but for one that sees none, on each architecture.
    types = 1 if stem == "gated_ce_merge" else 3
    assert {number for _, number in kernels} == set(numbers)
    assert len(kernels) % (types * len(numbers)) == 0, result.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
    assert len(frames) >= len(kernels)
    assert set(frames) == {("0", "0")}, result.stderr
