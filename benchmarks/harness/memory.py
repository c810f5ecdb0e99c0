"""Peak memory of each contender beyond its inputs, on a CPU measured in a process made for it.

The inputs are the logits, the labels and, for a copy, the memory it goes to. After a warm-up, which
takes the memory that is taken only once (threads, compiled code), the device's high-water mark is
reset, and read after the forward and after the backward; the gradient is still held then. See
:class:`device.Cpu` for what that mark sees. Each figure is the median of several calls, as far as
there is time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from contenders.cases import Case, Rotation
from contenders.contender import Runner
from contenders.linear import contenders_of

from .device import MALLOC_ENVIRONMENT, Cpu, Device
from .fresh_processes import Answers, by_contender
from .timing import FORWARD, TOTAL

CALLS = 3
# After so long there is no further call; they differ little.
SECONDS = 3.0
Peaks = dict[str, int]


def peak_once(runner: Runner, rotation: Rotation, device: Device) -> Peaks | None:
    """Bytes beyond the inputs: the peak of the forward, and of forward and backward."""
    arguments = runner.prepare(rotation.next())
    before = device.reset_peak()
    if before is None:
        return None
    result = runner.forward(arguments)
    peaks = {FORWARD: device.peak_bytes() - before}
    if not runner.has_backward:
        return {TOTAL: peaks[FORWARD]}
    gradient = runner.backward(result)
    peaks[TOTAL] = device.peak_bytes() - before
    del gradient
    return peaks


def medians(once: Callable[[], Peaks | None], seconds: float = SECONDS) -> Peaks:
    """Of some calls after the first one; empty where memory cannot be measured."""
    end = time.monotonic() + seconds
    once()
    calls = [once()]
    while len(calls) < CALLS and time.monotonic() < end:
        calls.append(once())
    peaks = [call for call in calls if call is not None]
    phases = peaks[0] if peaks else ()
    return {phase: statistics.median(each[phase] for each in peaks) for phase in phases}


def measure(_: int, case: Case, names: list[str]) -> Answers:
    """For each contender the peak of each phase."""
    device = Cpu()
    rotation = Rotation(case, 0, device.type)
    for contender in contenders_of(case):
        if contender.name in names:
            runner = contender.make_runner()
            if peaks := medians(lambda runner=runner: peak_once(runner, rotation, device)):
                yield contender.name, peaks


def measure_peaks(case: Case, names: list[str]) -> dict[str, Peaks]:
    """The same from a fresh process, by contender; one that could not be measured is missing."""
    return by_contender(MALLOC_ENVIRONMENT, measure, case, names)
