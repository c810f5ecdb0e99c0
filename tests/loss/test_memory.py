"""No rows of V elements are allocated beyond the gradient, and none where it overwrites the logits.

The linear loss, which makes its logits, has those of one chunk of tokens.

Measured from outside: a process of its own reads the peak of its resident memory, which covers
tensors, scratch of the kernels and copies that autograd makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eaft_ext

_CPUINFO = Path("/proc/cpuinfo")
MULTIPLIES_BFLOAT16 = not _CPUINFO.exists() or "bf16" in _CPUINFO.read_text()

LOGITS_MB = 48
SLACK_MB = 6
"""Page granularity, the allocator's arenas, Python."""


def measured(script: str, *arguments: str, **variables: str) -> dict[str, float]:
    """What a script of these tests prints, in a process of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs the peak of resident memory, and to reset it, as /proc of Linux allows")
    environment = os.environ | {"PYTHONPATH": str(Path(eaft_ext.__file__).parents[1])} | variables
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def growth() -> dict[str, float]:
    """Megabytes that each case of memory_cases.py adds to the peak."""
    return measured("memory_cases.py", str(LOGITS_MB))


@pytest.fixture(scope="module")
def chunks() -> dict[str, float]:
    """Chunks of logits that each case of linear_memory_cases.py takes."""
    # Memory that is given back is not handed out again: whatever is large is measured.
    return measured("linear_memory_cases.py", MALLOC_MMAP_THRESHOLD_=str(2**16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        "forward",
        "forward_of_few_rows",
        "topk",
        "in_place",
        "in_place_leaf",
        "in_place_unreduced",
        "in_place_module",
        "forward_with_grad_",
        "shard_forward",
        "shard_in_place",
        "shard_in_place_leaf",
        "shard_in_place_callable",
    ],
)
def test_nothing_is_allocated(growth: dict[str, float], case: str, dtype: str) -> None:
    assert growth[f"{case} {dtype}"] <= SLACK_MB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        "out_of_place",
        "out_of_place_leaf",
        "forward_with_grad",
        "shard_out_of_place",
        "shard_out_of_place_leaf",
    ],
)
def test_one_gradient_is_allocated(growth: dict[str, float], case: str, dtype: str) -> None:
    """At least that much, too: the measure sees what is allocated."""
    assert abs(growth[f"{case} {dtype}"] - LOGITS_MB) <= SLACK_MB


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        "default",
        "one_chunk",
        "eight_chunks",
        "many_chunks",
        "per_token",
        "bias",
        "float32_sums",
        "own_gate",
    ],
)
def test_the_linear_loss_holds_one_chunk(chunks: dict[str, float], case: str, dtype: str) -> None:
    """However many there are. At least that much, too: the measure sees what is allocated."""
    if dtype == "bfloat16" and not MULTIPLIES_BFLOAT16:
        pytest.skip(
            "torch's own product holds its result in float32 on a CPU without bfloat16 "
            "instructions; one that has avx512_bf16, amx_bf16 or bf16 in /proc/cpuinfo runs this"
        )
    assert 0.9 <= chunks[f"{case} {dtype}"] <= 1.2
