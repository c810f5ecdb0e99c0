"""What differs from device to device: the clock, the memory counters, the size of the cache."""

from __future__ import annotations

import abc
import contextlib
import ctypes
import gc
import re
import time
from pathlib import Path
from typing import Any

from eaft_ext.cli import info


class Device(abc.ABC):
    """A device to measure on. ``mark`` and ``seconds`` time, the peak methods count memory."""

    type: str

    @abc.abstractmethod
    def model(self) -> str:
        """The name of the hardware."""

    @abc.abstractmethod
    def cache_bytes(self) -> int:
        """The size of the last-level cache, beyond which inputs are rotated."""

    @abc.abstractmethod
    def mark(self) -> Any:
        """A point in time of the device's work."""

    @abc.abstractmethod
    def seconds(self, begin: Any, end: Any) -> float:
        """The time between two marks; waits for the work before ``end``."""

    @abc.abstractmethod
    def reset_peak(self) -> int | None:
        """Forget the peak so far; the bytes in use now, or None where they cannot be measured."""

    @abc.abstractmethod
    def peak_bytes(self) -> int:
        """The most bytes that were in use since ``reset_peak``."""


class Cpu(Device):
    """The CPU: a wall clock, and the kernel's own count of the process's resident memory.

    The high-water mark of resident memory (``VmHWM``) sees every page that anyone touches, tensors
    of PyTorch and scratch of C++ alike; writing 5 to ``/proc/self/clear_refs`` resets it (Linux).
    It is exact to a few pages, or a few hundred kilobytes where an older kernel counts in batches.
    Memory that the C library keeps after ``free`` would hide later allocations: it is handed back
    before each measurement, and :data:`MALLOC_ENVIRONMENT` makes the process hand it back at once.
    """

    type = "cpu"

    def model(self) -> str:
        """The name that the system reports."""
        return info.collect()["system"]["cpu"].rsplit(" (", 1)[0]

    def cache_bytes(self) -> int:
        """The largest cache that Linux lists; 64 MiB where it lists none."""
        units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
        files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        found = [re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()) for file in files]
        return max((int(m[1]) * units[m[2]] for m in found if m), default=64 * 2**20)

    def mark(self) -> float:
        """The wall clock: the work is done when a call returns."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """The difference."""
        return end - begin

    def reset_peak(self) -> int | None:
        """Set the high-water mark back to the resident memory."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # only in the GNU C library
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return self.peak_bytes()

    def peak_bytes(self) -> int:
        """The high-water mark."""
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match, "Linux reports VmHWM"
        return int(match[1]) * 1024


# For a process that measures memory: blocks of 64 KB and more are mapped and unmapped one by one,
# and the heap shrinks at once.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
