"""Runs calls of calls.py again and again, each time without memory at another place.

``memory_worker.py ONE|ALL CALL ...`` with limited_memory.c preloaded. Ends with an error unless
every fault was an exception, nothing of it stayed in memory, and the call is right afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

import torch
from calls import CALLS, Call
from inputs import same_bits
from torch import Tensor

THREADS = 2
MOST = 2000


class Allocator:
    """What limited_memory.c offers."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        for function in (self._library.failed_allocations, self._library.bytes_in_use):
            function.restype = ctypes.c_long
        self._library.limit_allocations.argtypes = [ctypes.c_long, ctypes.c_int]

    def fault(self, call: Call, allowed: int, goes_on: bool) -> tuple[list[Tensor] | None, int]:
        """What a call gives in spite of a fault, None if it raises; and how many faults it saw."""
        found = None
        self._library.limit_allocations(allowed, goes_on)
        with contextlib.suppress(MemoryError, RuntimeError):
            found = call()
        failed = self._library.failed_allocations()
        self._library.limit_allocations(-1, 0)
        return found, failed

    def growth(self, call: Call, allowed: int, goes_on: bool) -> int:
        """Bytes that a fault leaves behind."""
        gc.collect()
        before = self._library.bytes_in_use()
        self.fault(call, allowed, goes_on)
        gc.collect()
        return self._library.bytes_in_use() - before


def check(name: str, goes_on: bool, allocator: Allocator) -> int:
    """How many faults there were in a call, which was right after each of them."""
    call = CALLS[name]
    expected = call()
    for allowed in range(MOST):
        found, failed = allocator.fault(call, allowed, goes_on)
        if failed == 0:
            return allowed
        # A library may do without: it is right then.
        for result in (found, call()):
            right = result is None or all(map(same_bits, result, expected))
            assert right, f"{name}: wrong with or after fault {allowed}"
        # What was raised last may be held until something else is.
        stays = all(allocator.growth(call, allowed, goes_on) > 0 for _ in range(3))
        assert not stays, f"{name}: fault {allowed} leaves memory behind each time"
    raise AssertionError(f"{name}: more than {MOST} allocations")


def main() -> None:
    """Print how many faults there were in each call."""
    allocator = Allocator()
    torch.set_num_threads(THREADS)
    extent, *names = sys.argv[1:]
    for name in names:
        print(f"{name}: {check(name, extent == 'ALL', allocator)} faults", flush=True)


if __name__ == "__main__":
    main()
