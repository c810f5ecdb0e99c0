"""How many cores a few rows keep busy, forward and backward.

``cores_busy`` is processor time over wall time. It is measured in a process whose OpenMP threads
sleep while they wait: by default they spin, and would count as busy without doing anything. Waking
them costs time, so it is a cautious figure. ``gain_over_one_thread`` is wall time with one thread
over wall time with all, in a process whose threads wait in the default way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from cases import Case, Rotation
from contenders import Contender, Runner
from device import Cpu
from worker import Answer, ask, serve

SECONDS = 1.5
SLEEP_WHILE_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def one_turn(runner: Runner, rotation: Rotation) -> tuple[float, float]:
    """Wall and processor seconds of a call on every batch."""
    pending = [runner.prepare(rotation.next()) for _ in range(rotation.count)]
    wall, processor = time.perf_counter(), time.process_time()
    while pending:
        runner.backward(runner.forward(pending.pop()))
    return time.perf_counter() - wall, time.process_time() - processor


def measure(case: Case, contenders: list[Contender]) -> Iterator[Answer]:
    """For each contender the cores in use, and the gain over one thread."""
    device = Cpu()
    rotation = Rotation(case, device.cache_bytes(), device.type)
    all_threads = torch.get_num_threads()
    for contender in contenders:
        runner = contender.make_runner()
        one_turn(runner, rotation)
        alone: list[tuple[float, float]] = []
        together: list[tuple[float, float]] = []
        end = time.monotonic() + SECONDS
        while not together or time.monotonic() < end:
            torch.set_num_threads(1)
            alone.append(one_turn(runner, rotation))
            torch.set_num_threads(all_threads)
            together.append(one_turn(runner, rotation))
        medians = [statistics.median(wall for wall, _ in turns) for turns in (alone, together)]
        yield {
            "contender": contender.name,
            "threads": all_threads,
            "calls": rotation.count * len(together),
            "cores_busy": sum(cpu for _, cpu in together) / sum(wall for wall, _ in together),
            "gain_over_one_thread": medians[0] / medians[1],
        }


def measure_utilisation(case: Case, names: list[str]) -> dict[str, Answer]:
    """Both figures from fresh processes, by contender."""
    asleep, by_default = (
        {answer["contender"]: answer for answer in ask("utilisation.py", case, names, environment)}
        for environment in (SLEEP_WHILE_WAITING, {})
    )
    return {
        name: {
            "threads": asleep[name]["threads"],
            "calls": asleep[name]["calls"],
            "cores_busy": asleep[name]["cores_busy"],
            "gain_over_one_thread": by_default[name]["gain_over_one_thread"],
        }
        for name in asleep
        if name in by_default
    }


if __name__ == "__main__":
    serve(measure)
