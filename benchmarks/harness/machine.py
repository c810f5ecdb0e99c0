"""Where and with what a result was measured."""

import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from contenders import peers

import eaft_ext

from .device import Device

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"
# By the benchmarks and the scripts that show their results.
WRITTEN = ("benchmarks/results", "docs", "README.md")


def describe(device: Device) -> dict[str, Any]:
    build = eaft_ext.build_info()
    machine: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "model": device.model(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "cache_bytes": device.cache_bytes(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "eaft_ext": eaft_ext.__version__,
        "compiler": build["compiler"],
        "commit": commit(),
        **device.facts(),
    }
    if device.type == "cuda":
        machine["cuda_arch_list"] = build["cuda_arch_list"]
        machine["peers"] = peers.versions()
        machine["triton"] = peers.distribution_version("triton")
    return machine


def commit() -> str:
    """The commit of this checkout, with "-dirty" where code differs from it; "" outside of git.

    What benchmarks write, results and what is made of them, is no code. A copy without its history
    is told by the environment, ``EAFT_EXT_COMMIT``.
    """
    if told := os.environ.get("EAFT_EXT_COMMIT"):
        return told
    others = [f":(exclude){path}" for path in WRITTEN]
    try:
        name = _git("describe", "--always", "--abbrev=12", "--exclude=*")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    except OSError:
        return ""
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def file_stem(machine: dict[str, Any]) -> str:
    """The name of the result files: one for each kind of machine."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(machine["model"]).lower()).strip("-")
    return f"{machine['device']}-{slug}"


def load() -> float:
    """Processes that wanted to run in the last minute, this one included; told of if too many."""
    found = os.getloadavg()[0]
    if found > 0.5:
        print(f"load {found:.1f}: times will be unsteady", file=sys.stderr)
    return found
