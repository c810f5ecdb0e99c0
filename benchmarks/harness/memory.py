"""Peak memory of each contender beyond its inputs, on a CPU measured in a process made for it.

The inputs are the logits, the labels and, for a copy, the memory it goes to. After a warm-up, which
takes the memory that is taken only once (threads, compiled code), the device's high-water mark is
reset, and read after the forward and after the backward; the gradient is still held then. See
:class:`device.Cpu` for what that mark sees. Each figure is the median of several calls, as far as
there is time.
"""

import statistics
import time

from contenders.cases import Case, Rotation
from contenders.contender import Runner

from .device import MALLOC_ENVIRONMENT, Device
from .fresh_processes import by_contender
from .timing import FORWARD, HELD, TOTAL

CALLS = 3
# After so long there is no further call; they differ little.
SECONDS = 3.0
Peaks = dict[str, int]


def peak_once(runner: Runner, rotation: Rotation, device: Device) -> Peaks | None:
    """Bytes beyond the inputs: peaks of the forward and of both, and what is held in between."""
    arguments = runner.prepare(rotation.next())
    before = device.reset_peak()
    if before is None:
        return None
    result = runner.forward(arguments)
    forward = device.peak_bytes()
    if not runner.has_backward:
        return {TOTAL: forward - before}
    held = device.reset_peak() or 0
    gradient = runner.backward(result)
    total = max(forward, device.peak_bytes())
    del gradient
    return {FORWARD: forward - before, HELD: held - before, TOTAL: total - before}


def medians(
    runner: Runner, rotation: Rotation, device: Device, seconds: float = SECONDS
) -> Peaks | None:
    """Of some calls after the first one; None where memory cannot be measured."""
    end = time.monotonic() + seconds
    peak_once(runner, rotation, device)
    calls: list[Peaks | None] = []
    while not calls or (len(calls) < CALLS and time.monotonic() < end):
        calls.append(peak_once(runner, rotation, device))
    peaks = [call for call in calls if call is not None]
    return (
        {phase: statistics.median(p[phase] for p in peaks) for phase in peaks[0]} if peaks else None
    )


def measure_peaks(case: Case, names: list[str]) -> dict[str, Peaks]:
    """The same from a fresh process, by contender; one that could not be measured is missing."""
    return by_contender(MALLOC_ENVIRONMENT, medians, case, names, rotates=False)
