"""One case: agreement, time side by side, peak memory, and what only few rows have."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from contenders.cases import FEW_ROWS, Case, LinearCase, Rotation
from contenders.contender import Contender, Runner

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


@dataclass(frozen=True)
class Session:
    """What a case is measured with, and for how long; ``warm_up`` calls are not timed."""

    device: Device
    entry: Entry
    schedule: Schedule
    repeats: int
    min_seconds: float
    warm_up: int

    def blame(self, contender: Contender, reason: str) -> None:
        """Take down why one failed. Its memory is free again, and the device still works."""
        print(f"  without {contender.name}: {reason}", file=sys.stderr)
        self.entry.fail(contender.name, reason)
        self.device.release()
        if not self.device.is_alive():
            self.entry.fail(contender.name, f"{LOST}: {reason}")
            raise DeviceLostError(f"{contender.name}: {LOST}: {reason}")


# Says how far the runners agree, and takes out of them whose figures would mean nothing.
Compare = Callable[[Case, list[Runner], Rotation, Session], dict[str, Any]]


def compare_norms(
    _: Case, runners: list[Runner], rotation: Rotation, session: Session
) -> dict[str, Any]:
    """The loss and the gradient's norm on the first batch, to be compared with those of others."""

    def norms(runner: Runner) -> dict[str, float]:
        outcome = runner.outcome(rotation.full_turn()[0])
        if outcome is None:
            return {}
        loss, gradient = outcome
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return {"loss": loss.item(), "gradient_norm": norm.item()}

    return session.entry.for_each("agreement", runners, norms)


def rounded(seconds: Mapping[str, Times]) -> dict[str, Times]:
    """To the nanosecond."""
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
            for _ in range(session.warm_up):
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


def _measure_here(
    case: Case, contenders: list[Contender], session: Session, compare: Compare
) -> list[str]:
    """What is measured in this process, into the entry; whose times there are."""
    device, entry = session.device, session.entry
    ignore_every = IGNORE_EVERY[device.type]
    rotation = Rotation(case, device.cache_bytes(), device.type, ignore_every=ignore_every)
    runners = start(contenders, rotation, session)
    entry.add(agreement=compare(case, runners, rotation, session))

    def drop(runner: Runner, reason: str) -> None:
        runners.remove(runner)
        session.blame(runner.contender, reason)

    seconds = time_side_by_side(
        list(runners),
        rotation,
        device,
        session.repeats,
        session.min_seconds,
        session.schedule.seconds_for_rounds(),
        drop=drop,
    )
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


def measure_case(
    case: Case, contenders: list[Contender], session: Session, compare: Compare
) -> None:
    """One case, into its entry. All memory is released in between."""
    torch.compiler.reset()
    session.device.release()
    names = _measure_here(case, contenders, session, compare)
    session.device.release()
    if session.device.type == "cpu":
        session.entry.add(peak_bytes=measure_peaks(case, names))
        if case.num_rows <= FEWER_THAN_THREADS:
            # Compiled code keeps the number of threads that it was compiled for.
            losses = [c.name for c in contenders if c.runner.is_loss and not c.compiles]
            session.entry.add(utilisation=measure_utilisation(case, losses))
