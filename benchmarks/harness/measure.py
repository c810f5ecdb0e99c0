"""One case: agreement, time side by side, peak memory, and what only few rows have."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from contenders.cases import FEW_ROWS, Case, LinearCase, Rotation
from contenders.contender import ANY, Contender, Runner
from contenders.logits import SAME

from .device import Device
from .launches import time_launches
from .memory import measure_peaks, peak_once
from .progress import LEFT_OUT, LOST, DeviceLostError, Entry, describe_error
from .schedule import Schedule
from .timing import TOTAL, Times, time_once, time_side_by_side
from .utilisation import measure_utilisation

IGNORE_EVERY = {"cpu": 0, "cuda": 1024}
WARM_UP = 2
# So few rows that one for each thread would leave cores idle.
FEWER_THAN_THREADS = 8


# Of losses and gradients, by their norms; 16-bit ones are rounded.
TOLERANCE = {"float32": 1e-4, "bfloat16": 8e-3}


class How(NamedTuple):
    """Who computes the same as whom, but for a tolerance; how many calls come before any counts."""

    same: Mapping[str, str] = SAME
    tolerance: Mapping[str, float] = TOLERANCE
    warm_up: Mapping[str, int] = dict.fromkeys(ANY, WARM_UP)


@dataclass(frozen=True)
class Session:
    """What a case is measured with, and for how long."""

    device: Device
    entry: Entry
    schedule: Schedule
    repeats: int
    min_seconds: float
    how: How

    def blame(self, contender: Contender, reason: str) -> None:
        """Take down why one failed. Its memory is free again, and the device still works."""
        print(f"  without {contender.name}: {reason}", file=sys.stderr)
        self.entry.fail(contender.name, reason)
        self.device.release()
        if not self.device.is_alive():
            self.entry.fail(contender.name, f"{LOST}: {reason}")
            raise DeviceLostError(f"{contender.name}: {LOST}: {reason}")


def check_agreement(
    runners: Sequence[Runner],
    rotation: Rotation,
    same: Mapping[str, str],
    tolerance: Mapping[str, float],
    drop: Callable[[Runner, str], None],
) -> dict[str, dict[str, float]]:
    """How far losses and gradients are from those of who computes the same, by their norms.

    ``drop`` is told who is off by more than the tolerance for its name, or fails.
    """
    expected: dict[str, Any] = {}
    found: dict[str, dict[str, float]] = {}
    # Those that others are compared with come first.
    for runner in sorted(runners, key=lambda runner: runner.name in same):
        name, reason = runner.name, ""
        try:
            outcome = runner.outcome(rotation.full_turn()[0])
        except Exception as error:
            reason = describe_error(error)
        else:
            if name in same.values():
                expected[name] = outcome
            elif (other := same.get(name)) in expected:
                offs = dict(zip(runner.parts, map(off, outcome, expected[other]), strict=True))
                if not all(by <= tolerance[name] for by in offs.values()):  # NaN is none, either
                    how_far = ", ".join(f"{part} {by:.2g}" for part, by in offs.items())
                    reason = f"off from {other}: {how_far}"
                found[name] = offs
            del outcome
        if reason:
            drop(runner, reason)
    return found


@torch.no_grad()  # some gradients require one
def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    return float(norm(actual - expected) / norm(expected))


def rounded(seconds: Mapping[str, Times]) -> dict[str, Times]:
    return {
        name: {phase: [round(t, 9) for t in times] for phase, times in phases.items()}
        for name, phases in seconds.items()
    }


def start(contenders: list[Contender], rotation: Rotation, session: Session) -> list[Runner]:
    """The contenders after a few calls, as far as they work and there is time; compilers last."""
    entry, schedule = session.entry, session.schedule
    runners = []
    for contender in sorted(contenders, key=lambda contender: contender.compiles):
        if entry.excludes(contender):
            continue
        if contender.compiles and not schedule.can_compile():
            entry.fail(contender.name, LEFT_OUT)
            continue
        begin = time.monotonic()
        entry.attempt(contender.name)
        reason = ""
        try:
            runner = contender.make_runner()
            for _ in range(session.how.warm_up[session.device.type]):
                time_once(runner, rotation, session.device)
        except Exception as error:
            reason = describe_error(error)
        if reason:  # the error, which holds on to memory, is gone
            session.blame(contender, reason)
        else:
            entry.forgive(contender.name)
            runners.append(runner)
        if contender.compiles:
            schedule.has_compiled(time.monotonic() - begin)
    return runners


def _measure_here(case: Case, contenders: list[Contender], session: Session) -> list[str]:
    """What is measured in this process, into the entry; whose times there are."""
    device, entry = session.device, session.entry
    ignore_every = IGNORE_EVERY[device.type]
    rotation = Rotation(case, device.cache_bytes(), device.type, ignore_every=ignore_every)
    runners = start(contenders, rotation, session)

    def drop(runner: Runner, reason: str) -> None:
        runners.remove(runner)
        session.blame(runner.contender, reason)

    same, tolerance, _ = session.how
    by_name = dict.fromkeys(same, tolerance[case.dtype])
    agreement = check_agreement(runners, rotation, same, by_name, drop)
    entry.add(agreement=agreement)
    limits = (session.repeats, session.min_seconds, session.schedule.seconds_for_rounds())
    seconds = time_side_by_side(list(runners), rotation, device, *limits, drop=drop)
    entry.add(seconds=rounded(seconds))
    if copies := seconds.get("copy", {}).get(TOTAL):
        # Each byte is read and written.
        rate = 2 * case.logits_bytes / statistics.median(copies)
        entry.add(copy_bytes_per_second=round(rate))
    if device.type == "cuda":
        # The allocator counts exactly, also in this process.
        peaks = entry.for_each("peak", runners, lambda each: peak_once(each, rotation, device))
        entry.add(peak_bytes=peaks)
        if case.num_rows <= FEW_ROWS and not isinstance(case, LinearCase):
            try:
                time_launches(runners, rotation, device, seconds, entry)
            finally:
                entry.add(seconds=rounded(seconds))
    return list(seconds)


def measure_case(case: Case, contenders: list[Contender], session: Session) -> None:
    """One case, into its entry. All memory is released in between."""
    torch.compiler.reset()
    session.device.release()
    names = _measure_here(case, contenders, session)
    session.device.release()
    if session.device.type == "cpu":
        session.entry.add(peak_bytes=measure_peaks(case, names))
        if case.num_rows <= FEWER_THAN_THREADS:
            # Compiled code keeps the number of threads that it was compiled for.
            losses = [c.name for c in contenders if c.runner.is_loss and not c.compiles]
            session.entry.add(utilisation=measure_utilisation(case, losses))
