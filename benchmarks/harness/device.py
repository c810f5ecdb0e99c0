"""What differs from device to device: the clock, the memory counters, the size of the cache.

``mark`` and ``seconds`` time, ``reset_peak`` and ``peak_bytes`` count memory.
"""

import contextlib
import ctypes
import gc
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

NO_GPU = "There is no CUDA GPU that PyTorch can use here, so nothing was measured."
# For a process that measures memory: blocks of 64 KB and more are mapped and unmapped one by one,
# and the heap shrinks at once.
THRESHOLDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
MALLOC_ENVIRONMENT = {**dict.fromkeys(THRESHOLDS, "65536"), "MALLOC_ARENA_MAX": "1"}


class Cpu:
    """The CPU: a wall clock, and the kernel's own count of the process's resident memory.

    The high-water mark of resident memory (``VmHWM``) sees every page that anyone touches, tensors
    of PyTorch and scratch of C++ alike; writing 5 to ``/proc/self/clear_refs`` resets it (Linux).
    It is exact to a few pages, or a few hundred kilobytes where an older kernel counts in batches.
    Memory that the C library keeps after ``free`` would hide later allocations: it is handed back
    before each measurement, and :data:`MALLOC_ENVIRONMENT` makes the process hand it back at once.
    """

    type = "cpu"

    def model(self) -> str:
        from eaft_ext.cli import info  # not where the package is yet to be built

        return info.collect()["system"]["cpu"].rsplit(" (", 1)[0]

    def cache_bytes(self) -> int:
        """The largest cache that Linux lists, beyond which inputs are rotated; else 64 MiB."""
        units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
        files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        found = [re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()) for file in files]
        return max((int(m[1]) * units[m[2]] for m in found if m), default=64 * 2**20)

    def facts(self) -> dict[str, str | int]:
        """What else a result file says of the device."""
        return {}

    def mark(self) -> Any:
        """A point in time of the device's work, which is done when a call returns."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """The time between two marks; waits for the work before ``end``."""
        return float(end - begin)

    def reset_peak(self) -> int | None:
        """Forget the peak so far; the bytes in use now, or None where they cannot be measured."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # only in the GNU C library
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return self.peak_bytes()

    def peak_bytes(self) -> int:
        """The most bytes that were in use since ``reset_peak``."""
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match, "Linux reports VmHWM"
        return int(match[1]) * 1024

    def get_ahead(self) -> None:
        """Let the host queue what follows, so that launching it is not part of its time."""

    def wait(self) -> None:
        """Return when all work is done."""

    def release(self) -> None:
        """Hand back the memory that is not in use."""
        gc.collect()

    def is_alive(self) -> bool:
        """Whether the device still works after an error."""
        return True


class Cuda(Cpu):
    """The current CUDA device: events on its stream, and the counters of PyTorch's allocator.

    Those see all that anyone allocates through PyTorch, tensors and scratch alike, rounded up to
    the allocator's blocks: for a large tensor by less than 1 MiB.
    """

    type = "cuda"

    # About 2 ms: longer than it takes to launch a forward and a backward.
    _AHEAD_CYCLES = 4_000_000

    def model(self) -> str:
        return torch.cuda.get_device_name()

    def cache_bytes(self) -> int:
        return int(torch.cuda.get_device_properties().L2_cache_size)

    def facts(self) -> dict[str, str | int]:
        chip = torch.cuda.get_device_properties()
        return {
            "capability": f"{chip.major}.{chip.minor}",
            "multiprocessors": int(chip.multi_processor_count),
            "memory_bytes": int(chip.total_memory),
            "driver": driver_version(),
            "cuda": torch.version.cuda or "",
        }

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def reset_peak(self) -> int:
        gc.collect(0)
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def get_ahead(self) -> None:
        """Occupy the stream without touching memory."""
        torch.cuda._sleep(self._AHEAD_CYCLES)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

    def is_alive(self) -> bool:
        """An illegal access ends the CUDA context: every later call fails."""
        try:
            torch.ones(1, device="cuda").item()
        except RuntimeError:
            return False
        return True


Device = Cpu


def driver_version() -> str:
    """The version of the NVIDIA driver; "" where nothing tells it."""
    if found := collect_env.get_nvidia_driver_version(collect_env.run):
        return str(found)
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text):
            return match[0]
    return ""


def open_device(name: str) -> Device:
    """The device of a name; a sentence and exit code 2 if it is not there."""
    if name == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        sys.exit(2)
    return Cuda()
