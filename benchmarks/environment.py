"""Says as JSON what there is to measure with, before anything is built; exit code 2 without a GPU.

It imports PyTorch but not eaft_ext. The bandwidth is that of copying 2 GiB of random numbers,
counting each byte read and written.
"""

import json
import os
import platform

import torch
from harness.device import open_device
from torch.utils import collect_env
from torch.utils.benchmark import Timer

ELEMENTS = 2**29


def copy_bandwidth(device: str) -> float:
    """Bytes a second."""
    source = torch.randn(ELEMENTS, device=device)
    tensors = {"source": source, "target": torch.empty_like(source)}
    timer = Timer("target.copy_(source)", globals=tensors)
    return 2 * source.nbytes / timer.blocked_autorange().median


def tool_version(name: str, pattern: str) -> str:
    """The version of a program of the CUDA toolkit; "" where it is not on PATH."""
    command = f"{name} --version"
    return collect_env.run_and_parse_first_match(collect_env.run, command, pattern) or ""


if __name__ == "__main__":
    device = open_device("cuda")
    found = {
        "gpu": device.model(),
        **device.facts(),
        "cache_bytes": device.cache_bytes(),
        "copy_bytes_per_second": round(copy_bandwidth(device.type)),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cores": len(os.sched_getaffinity(0)),
        "nvcc": tool_version("nvcc", r"release ([\d.]+)"),
        "compute_sanitizer": tool_version("compute-sanitizer", r"Version ([\d.]+)"),
    }
    print(json.dumps(found, indent=2))
