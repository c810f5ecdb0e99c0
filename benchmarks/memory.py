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
from collections.abc import Iterator

from cases import Case, Rotation
from contenders import Contender, Runner
from device import MALLOC_ENVIRONMENT, Cpu, Device
from timing import FORWARD, TOTAL
from worker import Answer, ask, serve

CALLS = 3
# After so long there is no further call; they differ little.
SECONDS = 3.0


def peak_once(runner: Runner, rotation: Rotation, device: Device) -> dict[str, int] | None:
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


def measure(case: Case, contenders: list[Contender]) -> Iterator[Answer]:
    """For each contender the peak of each phase."""
    device = Cpu()
    rotation = Rotation(case, 0, device.type)
    for contender in contenders:
        runner = contender.make_runner()
        end = time.monotonic() + SECONDS
        peak_once(runner, rotation, device)
        calls: list[dict[str, int] | None] = []
        while not calls or (len(calls) < CALLS and time.monotonic() < end):
            calls.append(peak_once(runner, rotation, device))
        peaks = [call for call in calls if call is not None]
        if peaks:
            medians = {phase: statistics.median(p[phase] for p in peaks) for phase in peaks[0]}
            yield {"contender": contender.name, "peak_bytes": medians}


def measure_peaks(case: Case, names: list[str]) -> dict[str, dict[str, int]]:
    """The same from a fresh process, by contender; one that could not be measured is missing."""
    answers = ask("memory.py", case, names, MALLOC_ENVIRONMENT)
    return {answer["contender"]: answer["peak_bytes"] for answer in answers}


if __name__ == "__main__":
    serve(measure)
