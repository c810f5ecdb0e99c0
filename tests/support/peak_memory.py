"""The peak of memory, measured in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "what was measured: "


def measure(train: Callable[[], Any]) -> None:
    """Print the bytes that a training takes at its peak, and the seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before, start = _status("VmRSS"), time.perf_counter()
    train()
    seconds = time.perf_counter() - start
    print(MARK + json.dumps({"bytes": _status("VmHWM") - before, "seconds": seconds}))


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s*(\d+) kB", text)
    assert found is not None, name
    return 1024 * int(found[1])


def measured(test_file: str, call: str) -> dict[str, float]:
    """What a call of a test file measured, in a fresh process with the same paths."""
    module = Path(test_file).stem
    program = f"import sys; sys.path[:] = {sys.path!r}\nimport {module}\n{module}.{call}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(test_file).parent)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert lines, done.stdout + done.stderr
    found: dict[str, float] = json.loads(lines[-1].removeprefix(MARK))
    return found


def all_measured(
    test_file: str, calls: dict[str, str], record_property: Callable[[str, object], None]
) -> dict[str, dict[str, float]]:
    """What each of several calls measured, by their names, which is printed and recorded."""
    found = {how: measured(test_file, call) for how, call in calls.items()}
    for how, of_training in found.items():
        record_property(how, of_training)
        print(how, {name: round(value, 2) for name, value in of_training.items()})
    return found
