"""Runs of a study in processes of their own, some at a time."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from .files import write

Item, Found = TypeVar("Item"), TypeVar("Found")


def add_arguments(add: Callable[..., Any]) -> None:
    """Add the options of what runs in processes."""
    add("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    add("--minutes", type=float, default=float("inf"), help="begin no run after so many")


def threads_of(jobs: int) -> int:
    """How many threads each of so many processes has."""
    return max(1, (os.cpu_count() or 1) // jobs)


def do_missing(
    work: Callable[[Item], tuple[str, Any, dict[str, Any]]],
    runs: dict[str, Item],
    arguments: argparse.Namespace,
    results: dict[str, Any],
    file: Path,
    prepare: Callable[..., None],
    given: tuple[Any, ...],
) -> Iterator[tuple[str, Any, float]]:
    """Do those of the named runs that the results do not have, and write the file after each.

    ``work`` tells a run's name, what was found, and what stands beside the runs. Each process
    begins with ``prepare(*given, threads)``. Yields the name, what was found, and the minutes left.
    """
    began = time.monotonic()
    found = results.setdefault("runs", {})
    missing = [one for name, one in runs.items() if name not in found]
    print(f"{len(missing)} of {len(runs)} runs to do, {arguments.jobs} at a time", flush=True)
    how = (arguments.jobs, arguments.minutes, prepare, (*given, threads_of(arguments.jobs)))
    ended = _in_processes(work, missing, *how)
    for done, (name, of_run, beside) in enumerate(ended, start=1):
        found[name] = of_run
        results |= beside
        write(results, file)
        yield name, of_run, (len(missing) - done) * (time.monotonic() - began) / done / 60
    print(f"{file}: {len(found)} runs")


def _in_processes(
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
