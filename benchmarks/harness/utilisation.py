"""How many cores a few rows keep busy, forward and backward.

``cores_busy`` is processor time over wall time. It is measured in a process whose OpenMP threads
sleep while they wait: by default they spin, and would count as busy without doing anything. Waking
them costs time, so it is a cautious figure. ``gain_over_one_thread`` is wall time with one thread
over wall time with all, in a process whose threads wait in the default way.
"""

import statistics
import time
from typing import Any

import torch
from contenders.cases import Case, Rotation
from contenders.contender import Runner

from .device import Cpu
from .fresh_processes import by_contender

SECONDS = 1.5
SLEEP_WHILE_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def one_turn(runner: Runner, rotation: Rotation) -> tuple[float, float]:
    pending = [runner.prepare(rotation.next()) for _ in range(rotation.count)]
    wall, processor = time.perf_counter(), time.process_time()
    while pending:
        runner.backward(runner.forward(pending.pop()))
    return time.perf_counter() - wall, time.process_time() - processor


def utilisation(runner: Runner, rotation: Rotation, _: Cpu) -> dict[str, Any]:
    """The cores in use, and the gain over one thread."""
    all_threads = torch.get_num_threads()
    one_turn(runner, rotation)
    alone: list[tuple[float, float]] = []
    together: list[tuple[float, float]] = []
    end = time.monotonic() + SECONDS
    while not together or time.monotonic() < end:
        for threads, turns in ((1, alone), (all_threads, together)):
            torch.set_num_threads(threads)
            turns.append(one_turn(runner, rotation))
    medians = [statistics.median(wall for wall, _ in turns) for turns in (alone, together)]
    return {
        "threads": all_threads,
        "calls": rotation.count * len(together),
        "cores_busy": sum(cpu for _, cpu in together) / sum(wall for wall, _ in together),
        "gain_over_one_thread": medians[0] / medians[1],
    }


def measure_utilisation(case: Case, names: list[str]) -> dict[str, Any]:
    """Both figures from fresh processes, by contender."""
    asleep, by_default = (
        by_contender(environment, utilisation, case, names, rotates=True)
        for environment in (SLEEP_WHILE_WAITING, {})
    )
    gain = "gain_over_one_thread"
    return {n: {**asleep[n], gain: by_default[n][gain]} for n in asleep if n in by_default}
