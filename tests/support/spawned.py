"""Tests that need several processes: they are started here, and join each other over gloo.

A test calls ``run_processes(worker, world_size, folder)``, or asks ``Runs`` for so many processes.
The worker's ``main`` is ``work(function)``, where ``function(rank, world_size)`` gives what shall
be saved for the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import eaft_ext

SUPPORT = Path(__file__).parent


def environment(*folders: Path) -> dict[str, str]:
    """The package under test, the CPU, one thread; and gloo does not look up the host's name."""
    paths = os.pathsep.join(map(str, [Path(eaft_ext.__file__).parents[1], SUPPORT, *folders]))
    gloo = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}
    ours = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return gloo | os.environ | ours


def stop(process: subprocess.Popen[str]) -> None:
    """End a process, which may have to end others first, if it has not ended."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()


def run_all(commands: Sequence[Sequence[object]], timeout: float, *folders: Path) -> list[str]:
    """Run Python with each of the commands at once; gives what they print."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch was built without torch.distributed or without gloo")
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(*folders),
            cwd=SUPPORT,  # where there is no eaft_ext beside the one under test
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in running]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the processes still run, or wait for each other, after {timeout} s")
    finally:
        for process in running:
            stop(process)
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def run_processes(
    worker: Path,
    world_size: int,
    folder: Path,
    *,
    timeout: float = 300,
    folders: Sequence[Path] = (),
    arguments: Sequence[str] = (),
) -> list[Any]:
    """Run a worker in several processes; gives what each of them saved."""
    commands = [(worker, rank, world_size, folder, *arguments) for rank in range(world_size)]
    run_all(commands, timeout, *folders)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


class Runs(dict[int, list[Any]]):
    """What each process of a worker saved, by their number: so many run when first asked for."""

    def __init__(self, worker: Path, folders: pytest.TempPathFactory) -> None:
        super().__init__()
        self._worker, self._folders = worker, folders
        self._failed: dict[int, BaseException] = {}

    def __missing__(self, world_size: int) -> list[Any]:
        if world_size in self._failed:  # and would again, which takes long
            raise self._failed[world_size]
        folder = self._folders.mktemp(f"{self._worker.stem}{world_size}_")
        try:
            self[world_size] = run_processes(self._worker, world_size, folder)
        except (AssertionError, pytest.fail.Exception) as error:
            self._failed[world_size] = error
            raise
        return self[world_size]


def by_size(cases: Iterable[Any], slow_from: int = 3) -> list[Any]:
    """Parameters of a test, of which a number of processes is the first: with many it is slow."""
    parameters = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*values, marks=pytest.mark.slow if values[0] >= slow_from else ())
        for values in parameters
    ]


def mean_of_ones() -> float:
    """As gloo computes it for FSDP2: in some releases of torch, it adds where it is to average."""
    mean, ones = torch.empty(1), torch.ones(torch.distributed.get_world_size())
    torch.distributed.reduce_scatter_tensor(mean, ones, torch.distributed.ReduceOp.AVG)
    return mean.item()


def work(function: Callable[[int, int], Any]) -> None:
    """The main of a worker: ``worker.py RANK WORLD_SIZE FOLDER``."""
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = torch.distributed.FileStore(str(folder / "store"), world_size)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    torch.save(function(rank, world_size), folder / f"{rank}.pt")
    if torch.distributed.is_initialized():  # some trainings end it
        torch.distributed.destroy_process_group()
    leave()


def leave() -> NoReturn:
    """End this process without the end of the interpreter.

    What is left in cycles, or in a library's globals, keeps process groups, and so gloo's threads,
    until then; one that lets go of a tensor while the interpreter is ending aborts the process
    ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
