"""Fixtures of the suite: devices, seeds, threads, and which eaft_ext is tested."""

# ruff: noqa: E402, two things must be settled before torch and eaft_ext are imported.

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
if not any((_ROOT / "eaft_ext").glob("_C*.so")):
    # `python -m pytest` puts the checkout first; without a compiled part there, the installed
    # package is the one to test.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

# Threads that wait for work shall sleep. Spinning, they take the time of whatever else runs on the
# machine, and on a busy one the suite takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from inputs import DTYPES, dtype_name
from nvcc import nvcc

from eaft_ext import functional
from eaft_ext._library import has_kernel
from eaft_ext.linear import _reduced_loss
from eaft_ext.parallel import _shard

# Marks of what runs if it is asked for, by an option of the same name.
_ON_REQUEST = {
    "slow": "most that takes seconds, in .ci/run",
    "sweep": "every model of transformers, compiled; every architecture of CUDA; hours",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark, what in _ON_REQUEST.items():
        parser.addoption(f"--{mark}", action="store_true", help=f"run what is marked so: {what}")
    parser.addoption("--sweep-table", metavar="PATH", help="what became of each model, as markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operator(name): the kernel that a test on CUDA is about")
    config.addinivalue_line("markers", "cuda: a test on CUDA alone, without a device as parameter")
    for mark, what in _ON_REQUEST.items():
        config.addinivalue_line("markers", f"{mark}: runs with --{mark} only; {what}")
    config.addinivalue_line("markers", "nvcc: needs the CUDA compiler, and no GPU")


_LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run here or was not asked for: a skip is for what should have run."""
    left_out: Counter[str] = Counter()
    kept, dropped = [], []
    for item in items:
        reason = _why_left_out(item, config)
        left_out.update([reason] if reason else [])
        (dropped if reason else kept).append(item)
    items[:] = kept
    config.stash[_LEFT_OUT] = left_out
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def pytest_collection_finish() -> None:
    """Garbage is not looked for among thousands of tests: a quarter of the time of the short."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for reason, count in config.stash.get(_LEFT_OUT, Counter()).items():
        terminalreporter.write_line(f"left out: {count} tests, {reason}")


def _why_left_out(item: pytest.Item, config: pytest.Config) -> str | None:
    if item.get_closest_marker("nvcc") and nvcc() is None:
        return "no nvcc; with the CUDA toolkit, and without a GPU, they run"
    for mark in _ON_REQUEST:
        if item.get_closest_marker(mark) and not config.getoption(f"--{mark}"):
            return f"marked {mark}; pytest --{mark} runs them"
    case = getattr(item, "callspec", None)
    device = case.params.get("device") if case else None
    if device is None and item.get_closest_marker("cuda"):
        device = "cuda"
    marker = item.get_closest_marker("operator")
    operator = marker.args[0] if marker else "gated_ce_forward"
    dtype = case.params.get("dtype") if case else None
    return None if device in (None, "cpu") else _why_not(device, operator, dtype)


def _why_not(device: str, operator: str, dtype: torch.dtype | None) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device; benchmarks/gpu_check.sh runs them on a machine with one"
    if not has_kernel(operator, device):
        return f"{operator} is not in this build for CUDA; EAFT_EXT_CUDA=1 pip install . builds it"
    if dtype == torch.float64:
        return "float64 has kernels on the CPU only"
    return None


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device. Tests on CUDA are left out where it, or its kernel, is missing."""
    return request.param


@pytest.fixture(params=DTYPES, ids=dtype_name)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of logits."""
    return request.param


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions as a device without kernels gets them."""
    for module in (functional, _shard, _reduced_loss):
        monkeypatch.setattr(module, "takes_kernel", lambda op, logits: False)


@pytest.fixture(params=["kernel", "reference"])
def route(request: pytest.FixtureRequest) -> str:
    """The public functions with the kernels and without them."""
    if request.param == "reference":
        request.getfixturevalue("without_kernels")
    return request.param


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """The same random numbers, and two threads: from 8 rows on, a row is then a thread's own.

    Without a GPU ``torch.manual_seed`` would note the stack for each kind of device, a millisecond.
    """
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    """This process alone, as the group of all."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that torch.empty() returns is full of NaN: what an operator leaves unwritten shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
