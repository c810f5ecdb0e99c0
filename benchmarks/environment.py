"""Says as JSON what there is to measure with, before anything is built; exit code 2 without a GPU.

It imports PyTorch but not eaft_ext. The bandwidth is that of copying 2 GiB of random numbers,
counting each byte read and written.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from typing import Any

import torch
from harness.device import Device, open_device

COPIES = 20
ELEMENTS = 2**29


def copy_bandwidth(device: Device) -> float:
    """Bytes a second, the median of several copies."""
    source = torch.randn(ELEMENTS, device=device.type)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(2 + COPIES):
        device.get_ahead()
        begin = device.mark()
        target.copy_(source)
        seconds.append(device.seconds(begin, device.mark()))
    return 2 * source.nbytes / statistics.median(seconds[2:])


def tool_version(name: str, pattern: str) -> str:
    """The version of a program of the CUDA toolkit; "" where it is not on PATH."""
    program = shutil.which(name)
    if program is None:
        return ""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    match = re.search(pattern, done.stdout)
    return match[1] if match else "unknown"


def describe(device: Device) -> dict[str, Any]:
    """The report."""
    return {
        "gpu": device.model(),
        **device.facts(),
        "cache_bytes": device.cache_bytes(),
        "copy_bytes_per_second": round(copy_bandwidth(device)),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cores": len(os.sched_getaffinity(0)),
        "nvcc": tool_version("nvcc", r"release ([\d.]+)"),
        "compute_sanitizer": tool_version("compute-sanitizer", r"Version ([\d.]+)"),
    }


if __name__ == "__main__":
    print(json.dumps(describe(open_device("cuda")), indent=2))
