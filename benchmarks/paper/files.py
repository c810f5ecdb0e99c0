"""Result files: what was measured where, by which settings; a file that has some goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness.device import open_device
from harness.machine import describe


def opened(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, if it is of these settings, or the beginning of a new one."""
    settings = json.loads(json.dumps(settings))
    if not file.exists():
        return {"machine": describe(open_device("cpu")), **settings}
    results: dict[str, Any] = json.loads(file.read_text())
    for name, value in settings.items():
        if results[name] != value:
            sys.exit(f"{file} is of {name} {results[name]}, not {value}: choose another --output")
    return results


def write(results: dict[str, Any], file: Path) -> None:
    """In place of what was there, at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(rounded(results), indent=1) + "\n")
    unfinished.replace(file)


def rounded(value: Any) -> Any:
    """Six digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return value
