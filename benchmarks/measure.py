"""One case: time side by side, agreement, peak memory, and what only a CPU or only a GPU has."""

from __future__ import annotations

import statistics
import sys
import time

import torch
from cases import Case, Rotation
from contenders import Contender, Runner
from device import Device
from launches import MAX_ROWS, time_launches
from memory import measure_peaks, peak_once
from progress import LEFT_OUT, LOST, DeviceLostError, Entry, describe_error, for_each
from schedule import Schedule
from timing import TOTAL, Times, time_once, time_side_by_side
from utilisation import measure_utilisation

WARM_UP = 2
IGNORE_EVERY = {"cpu": 0, "cuda": 1024}
# So few rows that one for each thread would leave cores idle.
FEW_ROWS = 8


def warmed_up(
    contender: Contender, rotation: Rotation, device: Device, entry: Entry, calls: int
) -> Runner | None:
    """The contender after a few calls, None if it fails here (torch.compile needs a compiler)."""
    entry.attempt(contender.name)
    try:
        runner = contender.make_runner()
        for _ in range(calls):
            time_once(runner, rotation, device)
    except Exception as error:
        reason = describe_error(error)
    else:
        entry.forgive(contender.name)
        return runner
    blame(contender, reason, device, entry)
    return None


def blame(contender: Contender, reason: str, device: Device, entry: Entry) -> None:
    """Take down why a contender failed. Its memory is free again, and the device still works."""
    print(f"  without {contender.name}: {reason}", file=sys.stderr)
    entry.fail(contender.name, reason)
    device.release()
    if not device.is_alive():
        entry.fail(contender.name, f"{LOST}: {reason}")
        raise DeviceLostError(f"{contender.name}: {LOST}: {reason}")


def agreement(runner: Runner, rotation: Rotation) -> dict[str, float]:
    """The loss and the gradient's norm on the first batch, to be compared with those of others."""
    outcome = runner.outcome(rotation.full_turn()[0])
    if outcome is None:
        return {}
    loss, gradient = outcome
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return {"loss": loss.item(), "gradient_norm": norm.item()}


def rounded(seconds: dict[str, Times]) -> dict[str, Times]:
    """To the nanosecond."""
    return {
        name: {phase: [round(t, 9) for t in times] for phase, times in phases.items()}
        for name, phases in seconds.items()
    }


def start(
    contenders: list[Contender],
    rotation: Rotation,
    device: Device,
    entry: Entry,
    schedule: Schedule,
    warm_up: int = WARM_UP,
) -> list[Runner]:
    """The contenders after a few calls, as far as they work and there is time; compilers last."""
    runners = []
    for contender in sorted(contenders, key=lambda contender: contender.compiles):
        if entry.excludes(contender):
            continue
        if contender.compiles and not schedule.can_compile():
            entry.fail(contender.name, LEFT_OUT)
            continue
        begin = time.monotonic()
        if runner := warmed_up(contender, rotation, device, entry, warm_up):
            runners.append(runner)
        if contender.compiles:
            schedule.has_compiled(time.monotonic() - begin)
    return runners


def time_all(
    runners: list[Runner],
    rotation: Rotation,
    device: Device,
    entry: Entry,
    schedule: Schedule,
    repeats: int,
    min_seconds: float,
) -> Times:
    """Their times side by side, into the entry. One that fails leaves them, and is blamed."""

    def drop(runner: Runner, reason: str) -> None:
        runners.remove(runner)
        blame(runner.contender, reason, device, entry)

    max_seconds = schedule.seconds_for_rounds()
    seconds = time_side_by_side(
        list(runners), rotation, device, repeats, min_seconds, max_seconds, drop=drop
    )
    entry.add(seconds=rounded(seconds))
    return seconds


def measure_here(
    case: Case,
    contenders: list[Contender],
    device: Device,
    entry: Entry,
    schedule: Schedule,
    repeats: int,
    min_seconds: float,
) -> list[str]:
    """What is measured in this process, into the entry; whose times there are."""
    ignore_every = IGNORE_EVERY[device.type]
    rotation = Rotation(case, device.cache_bytes(), device.type, ignore_every=ignore_every)
    runners = start(contenders, rotation, device, entry, schedule)

    seconds = time_all(runners, rotation, device, entry, schedule, repeats, min_seconds)
    if copies := seconds.get("copy", {}).get(TOTAL):
        # Each byte is read and written.
        rate = 2 * case.logits_bytes / statistics.median(copies)
        entry.add(copy_bytes_per_second=round(rate))
    agreements = for_each("agreement", runners, entry, lambda each: agreement(each, rotation))
    entry.add(agreement=agreements)
    if device.type == "cuda":
        # The allocator counts exactly, also in this process.
        peaks = for_each("peak", runners, entry, lambda each: peak_once(each, rotation, device))
        entry.add(peak_bytes=peaks)
        if case.num_rows <= MAX_ROWS:
            try:
                time_launches(runners, rotation, device, seconds, entry)
            finally:
                entry.add(seconds=rounded(seconds))
    return list(seconds)


def measure_case(
    case: Case,
    contenders: list[Contender],
    device: Device,
    entry: Entry,
    schedule: Schedule,
    repeats: int,
    min_seconds: float,
) -> None:
    """One case, into its entry. All memory is released in between."""
    torch.compiler.reset()
    device.release()
    names = measure_here(case, contenders, device, entry, schedule, repeats, min_seconds)
    device.release()
    if device.type == "cpu":
        entry.add(peak_bytes=measure_peaks(case, names))
        if case.num_rows <= FEW_ROWS:
            # Compiled code keeps the number of threads that it was compiled for.
            losses = [c.name for c in contenders if c.is_loss and c.name != "compiled"]
            entry.add(utilisation=measure_utilisation(case, losses))
