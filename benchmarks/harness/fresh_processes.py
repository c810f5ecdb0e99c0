"""Measurements that need processes of their own, which answer line by line while they measure."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from contenders.cases import Case, Rotation
from contenders.contender import Runner
from contenders.linear import contenders_of
from torch import multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .device import Cpu

Answers = Iterator[Any]
OfRunner = Callable[[Runner, Rotation, Cpu], Any]


def measure_in(
    count: int,
    environment: Mapping[str, str],
    measure: Callable[..., Answers],
    what: Any,
    request: Any,
    seconds: float = float("inf"),
) -> tuple[list[list[Any]], str]:
    """What each process answered before it ended, and why they ended early: "" if they did not.

    A process yields the answers of ``measure(rank, what, request)``, a function of a module. If one
    fails or time is up, all are ended. They begin with more in their environment: what the C
    library and OpenMP read, they read then.
    """
    reason = ""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, environment):
        end = time.monotonic() + seconds
        context = multiprocessing.spawn(
            _answer, (folder, measure, what, request), count, join=False
        )
        try:
            while not context.join(min(end - time.monotonic(), 1.0)):
                if time.monotonic() >= end:
                    reason = f"not done after {seconds:.0f} s"
                    break
        except (ProcessExitedException, ProcessRaisedException) as error:
            reason = str(error).strip()
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        files = [Path(folder, str(rank)) for rank in range(count)]
        # The last line may be half written.
        lines = [file.read_text().split("\n")[:-1] if file.exists() else [] for file in files]
    return [[json.loads(line) for line in of_rank] for of_rank in lines], reason


def by_contender(
    environment: Mapping[str, str], measure: OfRunner, case: Case, names: list[str], rotates: bool
) -> dict[str, Any]:
    """What a fresh process measures of each contender, but for those that it did not come to."""
    (answers,), reason = measure_in(1, environment, _each, measure, (case, names, rotates))
    if reason:
        print(f"{measure.__name__} at {case}: {reason}", file=sys.stderr)
    return dict(answers)


def _each(_: int, measure: OfRunner, request: tuple[Case, list[str], bool]) -> Answers:
    case, names, rotates = request
    device = Cpu()
    rotation = Rotation(case, device.cache_bytes() if rotates else 0, device.type)
    for contender in filter(lambda contender: contender.name in names, contenders_of(case)):
        if found := measure(contender.make_runner(), rotation, device):
            yield contender.name, found


def _answer(rank: int, folder: str, measure: Callable[..., Any], *request: Any) -> NoReturn:
    with Path(folder, str(rank)).open("w", buffering=1) as file:
        for answer in measure(rank, *request):
            file.write(f"{json.dumps(answer)}\n")
    leave()


def leave() -> NoReturn:
    """End this process, whose work is done, without the end of the interpreter.

    What is left in cycles, or in Megatron-Core's globals, keeps process groups, and so gloo's
    threads, until then; one that lets go of a tensor while the interpreter is ending aborts the
    process ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
