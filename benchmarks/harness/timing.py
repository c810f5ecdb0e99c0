"""Time, side by side: every contender once a round, in an order shuffled anew, for many rounds."""

import gc
import math
import random
import time
from collections.abc import Callable, Sequence

from contenders.cases import Rotation
from contenders.contender import Runner

from .device import Device
from .progress import describe_error

FORWARD, BACKWARD, TOTAL = "forward", "backward", "total"
# Forward and backward on an idle device, and replayed from a graph: see launches.py.
LATENCY, GRAPH = "latency", "graph"
# Of memory: what is taken from the end of the forward to the beginning of the backward.
HELD = "held"
Times = dict[str, list[float]]
# No case gets more than this many times the rounds that were asked for, nor fewer than these.
MORE_ROUNDS = 20
FEWEST_ROUNDS = 3


def time_once(runner: Runner, rotation: Rotation, device: Device) -> dict[str, float]:
    """Seconds for each phase of one call; what has no backward has only a total.

    Freeing the result, the graph and the gradient is left to the time after the last mark.
    """
    arguments = runner.prepare(rotation.next())
    device.get_ahead()
    begin = device.mark()
    result = runner.forward(arguments)
    middle = device.mark()
    if not runner.has_backward:
        return {TOTAL: device.seconds(begin, middle)}
    gradient = runner.backward(result)
    end = device.mark()
    times = {
        FORWARD: device.seconds(begin, middle),
        BACKWARD: device.seconds(middle, end),
        TOTAL: device.seconds(begin, end),
    }
    del gradient
    return times


def time_side_by_side(
    runners: Sequence[Runner],
    rotation: Rotation,
    device: Device,
    repeats: int,
    min_seconds: float,
    max_seconds: float = math.inf,
    *,
    drop: Callable[[Runner, str], None],
) -> dict[str, Times]:
    """Every single time, by contender and phase. The runners have been warmed up.

    A cheap case goes on after its ``repeats`` rounds until ``min_seconds`` are over; one that is
    not done with them after ``max_seconds`` ends there. A runner that fails has no times and takes
    no further part; ``drop`` is told the reason.
    """
    times: dict[str, Times] = {runner.name: {} for runner in runners}
    order = list(runners)
    shuffle = random.Random(0).shuffle
    begin = time.monotonic()
    rounds = 0

    def goes_on() -> bool:
        seconds = time.monotonic() - begin
        if rounds >= FEWEST_ROUNDS and seconds >= max_seconds:
            return False
        return rounds < repeats or (rounds < MORE_ROUNDS * repeats and seconds < min_seconds)

    gc.collect()
    gc.disable()
    try:
        while goes_on():
            shuffle(order)
            for runner in list(order):
                reason = ""
                try:
                    phases = time_once(runner, rotation, device)
                except Exception as error:
                    reason = describe_error(error)
                if reason:  # the error, which holds on to memory, is gone
                    order.remove(runner)
                    del times[runner.name]
                    drop(runner, reason)
                    continue
                for phase, seconds in phases.items():
                    times[runner.name].setdefault(phase, []).append(seconds)
            rounds += 1
            gc.collect(0)  # cycles of the round, which may hold on to memory
    finally:
        gc.enable()
    return times
