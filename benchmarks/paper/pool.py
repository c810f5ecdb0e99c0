"""Runs of a study in processes of their own, some at a time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from typing import Any, TypeVar

Item, Found = TypeVar("Item"), TypeVar("Found")


def add_arguments(add: Callable[..., Any]) -> None:
    """Add the options of what runs in processes."""
    add("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    add("--minutes", type=float, default=float("inf"), help="begin no run after so many")


def threads_of(jobs: int) -> int:
    """How many threads each of so many processes has."""
    return max(1, (os.cpu_count() or 1) // jobs)


def in_processes(
    work: Callable[[Item], Found],
    runs: Iterable[Item],
    jobs: int,
    minutes: float,
    prepare: Callable[..., None],
    given: tuple[Any, ...],
) -> Iterator[Found]:
    """Yield what ``work`` makes of each run when it ends; none begins after so many minutes.

    Each process begins with ``prepare(*given)``.
    """
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = str(threads_of(jobs))  # read when a process begins
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, prepare, given) as pool:
        waiting = iter(runs)
        under_way = {pool.submit(work, one) for one in islice(waiting, jobs)}
        while under_way:
            finished = next(as_completed(under_way))
            under_way.remove(finished)
            yield finished.result()
            if time.monotonic() - began < 60 * minutes:
                under_way |= {pool.submit(work, one) for one in islice(waiting, 1)}
