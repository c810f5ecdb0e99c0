"""The forms of the kernels that run on the host."""

from __future__ import annotations

import kernels_on_host
import pytest
from ptx_on_host import compiled
from ptx_on_host.compiled import ARCHITECTURES

# g++ takes five minutes of two cores for an architecture.
_COMPILED = [
    pytest.param(
        architecture,
        marks=[pytest.mark.nvcc, pytest.mark.sweep if later else pytest.mark.slow],
    )
    for later, architecture in enumerate(ARCHITECTURES)
]


@pytest.fixture(params=_COMPILED)
def architecture(request: pytest.FixtureRequest) -> str:
    """What the kernels are compiled for."""
    return request.param


@pytest.fixture(params=["source", *_COMPILED])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``kernels_on_host`` runs: the kernels' C++, or what nvcc made of it."""
    if request.param != "source":
        monkeypatch.setattr(kernels_on_host, "code", compiled.load(request.param))
    return request.param
