"""``eaft-ext info``: what a bug report needs to say about this installation."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

Section = dict[str, str]
DISPATCH_KEYS = {
    "CPU": "CPU",
    "CUDA": "CUDA",
    "any device, in PyTorch": "CompositeExplicitAutograd",
}
NAMESPACE = "eaft_ext::"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eaft-ext info``."""
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0


def collect() -> dict[str, Section]:
    """Return the report, one section after the other."""
    return {
        "eaft_ext": {"version": installed_version(), "location": str(Path(__file__).parents[1])},
        "system": {
            "python": f"{platform.python_version()} ({sys.executable})",
            "os": platform.platform(),
            "cpu": _cpu_model(),
            "cpus": f"{_usable_cpus()} usable of {os.cpu_count()}",
        },
        "torch": _torch(),
        "build": _build(),
        "operators": _operators(),
    }


def render(report: dict[str, Section]) -> str:
    """Return the report as aligned plain text."""
    width = max(len(key) for section in report.values() for key in section)
    lines = []
    for title, section in report.items():
        lines.append(title)
        lines.extend(f"  {key:<{width}}  {value}" for key, value in section.items())
    return "\n".join(lines)


def installed_version() -> str:
    """Return the version of the installed package; it needs no compiled part."""
    try:
        return importlib.metadata.version("eaft_ext")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (imported from its source)"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return f"{value.strip()} ({platform.machine()})"
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return f"{answer.stdout.strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _torch() -> Section:
    section = {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda or "none",
        "hip": torch.version.hip or "none",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    if not torch.cuda.is_available():  # which is true of ROCm as well
        other = torch.accelerator.current_accelerator(check_available=True)
        section["gpus"] = other.type if other else "none visible"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        section[f"gpu {index}"] = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.1f} GiB"
        )
    return section


def _build() -> Section:
    try:
        from eaft_ext import _library

        return {key: value or "none" for key, value in _library.build_info().items()}
    except ImportError as error:
        return {"missing": f"the compiled part did not load: {error}"}


def _operators() -> Section:
    section = {}
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith(NAMESPACE):
            places = [
                place
                for place, key in DISPATCH_KEYS.items()
                if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
            ]
            section[name.removeprefix(NAMESPACE)] = ", ".join(places) or "no kernel"
    return section or {"registered": "none"}
