"""The forms of the kernels that run on the host."""

from __future__ import annotations

import kernels_on_host
import pytest
from ptx_on_host import compiled
from ptx_on_host.compiled import ARCHITECTURES

_OF_NVCC = [pytest.mark.slow, pytest.mark.nvcc]


@pytest.fixture(params=["source", *(pytest.param(a, marks=_OF_NVCC) for a in ARCHITECTURES)])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``kernels_on_host`` runs: the kernels' C++, or what nvcc made of it."""
    if request.param != "source":
        monkeypatch.setattr(kernels_on_host, "code", compiled.load(request.param))
    return request.param
