"""Groups of processes in which one has a fault: ``process_worker.py FOLDER CASE ...``.

A case is FAULT:POINT:SIZE:VICTIM. Each process trains some steps on its shard of a vocabulary, and
writes down each step and how it ended; at FAULT_STEP the victim has the fault. All are forked from
here, which has imported the package once, so that many groups can run at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # an optimizer imports it, seconds that forked processes would take each
import torch.distributed._functional_collectives
from spawned import leave
from torch import Tensor, nn
from torch import distributed as dist

import eaft_ext
from eaft_ext.linear import _operators as _linear
from eaft_ext.parallel import _agreement, _group, _shard

STEPS, FAULT_STEP = 4, 2
TIMEOUT = 4.0
"""Of the group, in seconds."""
LATE = 1.5
TOKENS, HIDDEN, WORDS = 12, 8, 42
AT_ONCE = 10


class InjectedError(RuntimeError):
    """What the victim raises."""


def _die() -> None:
    os._exit(7)


def _raise() -> None:
    raise InjectedError("an injected fault\nwith a second line")


WAS_LATE: list[float] = []


def _be_late() -> None:
    time.sleep(LATE)
    WAS_LATE.append(LATE)


FAULTS: dict[str, Callable[[], None]] = {
    "dies": _die,
    "raises": _raise,
    "raises_and_tries_again": _raise,
    "is_late": _be_late,
}


def _before(module: Any, name: str, fault: Callable[[], None], after: int = 0) -> None:
    """The fault happens as a function of the package is entered, once, after so many calls."""
    original = getattr(module, name)
    calls = 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            setattr(module, name, original)
            fault()
        return original(*args, **kwargs)

    setattr(module, name, replaced)


# Where in a step it happens, as the package's own functions divide it.
POINTS: dict[str, tuple[Any, str] | None] = {
    "before_the_call": None,
    "before_the_partial": (_shard, "takes_kernel"),
    "before_the_note": (_agreement, "check"),
    "before_the_exchange": (_group, "all_gather"),
    "after_the_exchange": (_agreement, "check_labels"),
    "in_the_backward": None,
    "after_the_step": None,
}
# And in one of the linear loss, whose exchanges are of a chunk of tokens each: after so many calls.
CHUNK = 5
LINEAR_POINTS: dict[str, tuple[Any, str, int]] = {
    "before_the_second_exchange": (_linear, "all_gather", 1),
    "after_the_second_exchange": (_agreement, "check_labels", 1),
    "before_the_reduction": (_linear, "all_reduce", 0),
}


def _another_version(options: dict[str, Any]) -> None:
    _agreement.build_info = lambda: {"version": "0.0.9"}  # type: ignore[assignment]


# What the victim's call has that the others' have not.
DIFFERENCES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another_version": _another_version,
    "another_dtype": lambda o: o.update(dtype=torch.bfloat16),
    "another_k": lambda o: o.update(k=7),
    "another_number_of_items": lambda o: o.update(num_items_in_batch=99),
    "another_gate": lambda o: o.update(gate=eaft_ext.NoGate()),
    "other_labels": lambda o: o.update(shift=1),
}


class _Faulty(torch.autograd.Function):
    """Nothing in the forward, the fault in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Callable[[], None]) -> Tensor:
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.fault()
        return gradient, None


def _loss(layer: nn.Linear, step: int, is_linear: bool, options: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    labels = torch.randint(WORDS, (TOKENS,), generator=generator)
    if is_linear:
        return eaft_ext.vocab_parallel_linear_gated_ce(
            hidden.requires_grad_(), layer.weight, labels, group=dist.group.WORLD, chunk_size=CHUNK
        )
    labels = (labels + options.pop("shift", 0)) % WORDS
    logits = layer(hidden).to(options.pop("dtype", torch.float32))
    if "fault" in options:
        logits = _Faulty.apply(logits, options.pop("fault"))
    how: dict[str, Any] = {"num_items_in_batch": TOKENS, "group": dist.group.WORLD} | options
    return eaft_ext.vocab_parallel_gated_ce(logits, labels, **how)


class Case(NamedTuple):
    """What goes wrong, where, in a group of how many, and in which of them."""

    fault: str
    point: str
    size: int = 2
    victim: int = 1

    def __str__(self) -> str:
        return ":".join(map(str, self))


def _error_of(call: Callable[[], Any]) -> str:
    try:
        return f"none: {call()}"
    except Exception as error:
        return str(error)


def _one_process(rank: int, case: Case, port: int, folder: Path) -> None:
    """Train, and say how it ended."""
    timeout = timedelta(seconds=TIMEOUT)
    # That of process 0, as torchrun has it: it ends with that process.
    store = dist.TCPStore("127.0.0.1", port, case.size, rank == 0, timeout)
    group = {"store": store, "rank": rank, "world_size": case.size, "timeout": timeout}
    dist.init_process_group("gloo", **group)
    torch.manual_seed(rank)
    layer = nn.Linear(HIDDEN, WORDS // case.size, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    told: dict[str, Any] = {"steps": [], "error": None}
    try:
        for step in range(STEPS):
            begun = time.monotonic()
            options: dict[str, Any] = {}
            point = case.point if rank == case.victim and step == FAULT_STEP else ""
            place = (POINTS | LINEAR_POINTS).get(point)
            if point and case.fault in DIFFERENCES:
                DIFFERENCES[case.fault](options)
            elif point == "before_the_call":
                FAULTS[case.fault]()
            elif point == "in_the_backward":
                options["fault"] = FAULTS[case.fault]
            elif place is not None:
                module, name, *after = place
                _before(module, name, FAULTS[case.fault], *after)
            loss = _loss(layer, step, case.point in LINEAR_POINTS, options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if point == "after_the_step":
                FAULTS[case.fault]()
            told["steps"].append(loss.item())
    except Exception as error:
        told["error"] = [type(error).__name__, str(error)]
        if isinstance(error, InjectedError) and case.fault == "raises_and_tries_again":
            told["again"] = _error_of(lambda: _loss(layer, step, case.point in LINEAR_POINTS, {}))
            time.sleep(1)  # with its connections, until the others have seen that nothing comes
    told |= {"seconds": time.monotonic() - begun, "was_late": WAS_LATE}
    (folder / f"{case}.{rank}.json").write_text(json.dumps(told))
    if rank == 0:
        time.sleep(1)  # the store is this process's, and the others are to read what is in it


def _free_ports(number: int) -> list[int]:
    """All different: each is held until the last is found."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _fork(rank: int, case: Case, port: int, folder: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            _one_process(rank, case, port, folder)
        finally:
            leave()
    return child


def main() -> None:
    """Run the cases, so many at once."""
    folder, texts = Path(sys.argv[1]), sys.argv[2:]
    cases = [Case(f, p, int(n), int(v)) for f, p, n, v in (text.split(":") for text in texts)]
    for start in range(0, len(cases), AT_ONCE):
        batch = cases[start : start + AT_ONCE]
        children = [
            _fork(rank, case, port, folder)
            for case, port in zip(batch, _free_ports(len(batch)), strict=True)
            for rank in range(case.size)
        ]
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
