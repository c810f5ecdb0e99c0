"""Commands compute in float32 here, whatever the CPU: what is equal is so to a few digits."""

import pytest

from eaft_ext.cli import model


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for one that does not multiply in bfloat16."""
    monkeypatch.setattr(model, "cpu_multiplies_bfloat16", lambda: False)
