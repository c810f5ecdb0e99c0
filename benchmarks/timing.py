"""Time, side by side: every contender once a round, in an order shuffled anew, for many rounds."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence

from cases import Rotation
from contenders import Runner
from device import Device

FORWARD, BACKWARD, TOTAL = "forward", "backward", "total"
Times = dict[str, list[float]]
# No case gets more than this many times the rounds that were asked for.
MORE_ROUNDS = 20


def time_once(runner: Runner, rotation: Rotation, device: Device) -> dict[str, float]:
    """Seconds for each phase of one call; a copy has only a total.

    Freeing the result, the graph and the gradient is left to the time after the last mark.
    """
    arguments = runner.prepare(rotation.next())
    begin = device.mark()
    result = runner.forward(arguments)
    middle = device.mark()
    if not runner.contender.is_loss:
        return {TOTAL: device.seconds(begin, middle)}
    runner.backward(result)
    end = device.mark()
    return {
        FORWARD: device.seconds(begin, middle),
        BACKWARD: device.seconds(middle, end),
        TOTAL: device.seconds(begin, end),
    }


def time_side_by_side(
    runners: Sequence[Runner], rotation: Rotation, device: Device, repeats: int, min_seconds: float
) -> dict[str, Times]:
    """Every single time, by contender and phase. The runners have been warmed up.

    A cheap case goes on after its ``repeats`` rounds until ``min_seconds`` are over.
    """
    times: dict[str, Times] = {runner.contender.name: {} for runner in runners}
    order = list(runners)
    shuffle = random.Random(0).shuffle
    end = time.monotonic() + min_seconds
    rounds = 0
    gc.collect()
    gc.disable()
    try:
        while rounds < repeats or (rounds < MORE_ROUNDS * repeats and time.monotonic() < end):
            shuffle(order)
            for runner in order:
                for phase, seconds in time_once(runner, rotation, device).items():
                    times[runner.contender.name].setdefault(phase, []).append(seconds)
            rounds += 1
    finally:
        gc.enable()
    return times
