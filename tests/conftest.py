"""Fixtures of the suite: devices, seeds, threads, and which eaft_ext is tested."""

# ruff: noqa: E402, two things must be settled before torch and eaft_ext are imported.

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

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

from eaft_ext import functional
from eaft_ext._library import has_kernel
from eaft_ext.linear import _reduced_loss
from eaft_ext.parallel import _shard


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow, too")
    parser.addoption("--sweep-table", metavar="PATH", help="what became of each model, as markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operator(name): the kernel that a test on CUDA is about")
    config.addinivalue_line("markers", "slow: runs with --slow only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; pytest --slow runs it"))


def _why_not(device: str, operator: str) -> str | None:
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device; benchmarks/gpu_check.sh runs this on a machine with one"
    if not has_kernel(operator, device):
        return f"{operator} is not in this build for CUDA; EAFT_EXT_CUDA=1 pip install . builds it"
    return None


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device with a kernel. On CUDA only what exists in this build and on this machine."""
    marker = request.node.get_closest_marker("operator")
    operator = marker.args[0] if marker else "gated_ce_forward"
    reason = _why_not(request.param, operator)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=DTYPES, ids=dtype_name)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of logits. float64 has kernels on the CPU only."""
    device = request.node.callspec.params.get("device", "cpu")
    if request.param == torch.float64 and device != "cpu":
        pytest.skip("float64 has kernels on the CPU only")
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
    """The same random numbers, and two threads: from 8 rows on, a row is then a thread's own."""
    torch.manual_seed(0)
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
