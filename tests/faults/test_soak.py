"""A long training: soak.py in a process of its own, and that it would see a leak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from soak import SLICES, faults
from spawned import environment

SOAK = Path(__file__).with_name("soak.py")


def _run(steps: int, timeout: float) -> None:
    done = subprocess.run(
        [sys.executable, SOAK, str(steps)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["steps"] == steps


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, as on Linux")
def test_nothing_grows_in_a_long_training() -> None:
    _run(4000, 300)


@pytest.mark.parametrize(
    ("name", "last", "sentence"),
    [
        ("bytes", 10 << 20, "memory grew"),
        ("handles", 9, "handles grew"),
        ("threads", 9, "threads grew"),
        ("step_us", 900, "steps became slower"),
    ],
)
def test_what_grows_is_seen(name: str, last: int, sentence: str) -> None:
    flat = {key: [5] * SLICES for key in ("bytes", "handles", "threads")}
    found = flat | {"step_us": [400] * SLICES, "finite": True}
    assert not faults(found)
    found[name] = [*found[name][:-1], last]
    assert [told.split(":")[0] for told in faults(found)] == [sentence]
    assert faults(found | {"finite": False})[-1] == "a loss was NaN"
