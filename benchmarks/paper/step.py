"""A training step by each way to compute the loss: seconds, peak memory, the largest batch."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness.device import MALLOC_ENVIRONMENT, Cpu
from harness.fresh_processes import measure_in

import eaft_ext
import eaft_ext.reference
from eaft_ext.cli.model import load, shown_name
from eaft_ext.integrations.transformers import use_linear_gated_ce

from .files import opened, write
from .options import add_model

FILE = "paper-step.json"
GIB = 2**30
STEPS = 3
Request = tuple[str | None, int, int, int]
"""The model, tokens of a row, rows, steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model(parser, FILE)
    add = parser.add_argument
    add("--length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    add("--rows", type=int, default=4, help="of the step that is timed (default: %(default)s)")
    add("--gib", type=float, default=1.0, help="that a step may take (default: %(default)s)")
    add("--most", type=int, default=32, help="rows that are tried at most (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measure what the result file does not have, each step in a process of its own."""
    file = arguments.output / FILE
    named = {name: getattr(arguments, name) for name in ("length", "rows", "gib", "most")}
    results = opened(file, {**named, "model": shown_name(arguments.model)})
    ways = results.setdefault("ways", {})
    for way in WAYS:
        if way in ways:
            continue

        def peak(rows: int, way: str = way) -> int:
            request = (arguments.model, arguments.length, rows, 1)
            return _measured(MALLOC_ENVIRONMENT, way, request)[0][1]

        request = (arguments.model, arguments.length, arguments.rows, STEPS)
        seconds = [seconds for seconds, _ in _measured({}, way, request)]
        ways[way] = {
            "seconds": seconds,
            "median": statistics.median(seconds),
            "bytes": peak(arguments.rows),
            "largest": largest(lambda rows: peak(rows) <= arguments.gib * GIB, arguments.most),
        }
        write(results, file)
        print(f"{way}: {ways[way]}", flush=True)
    print(file)
    return 0


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to the most that fits; 0 if 1 does not."""
    good, bad = 0, most + 1
    attempt = 1
    while bad - good > 1:
        if fits(attempt):
            good = attempt
        else:
            bad = attempt
        attempt = min(2 * attempt, most) if bad > most else (good + bad) // 2
    return good


def _measured(environment: dict[str, str], way: str, request: Request) -> list[tuple[float, int]]:
    """Seconds and bytes of each step; with an environment that shows bytes, seconds are more."""
    (answers,), reason = measure_in(1, environment, _steps, way, request)
    assert not reason, reason
    return answers


def _steps(_: int, way: str, request: Request) -> Iterator[Any]:
    """Seconds and peak bytes beyond weights, gradients and the optimizer's state, of each step."""
    name, length, rows, steps = request
    model, _tokenizer = load(name)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    loss_of = WAYS[way](model)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    device = Cpu()
    generator = torch.Generator().manual_seed(0)

    def step(count: int, tokens: int) -> None:
        ids = torch.randint(vocab_size, (count, tokens), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(ids)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step(1, 8)  # makes gradients and state
    for _ in range(steps):
        before, began = device.reset_peak() or 0, time.perf_counter()
        step(rows, length)
        yield time.perf_counter() - began, device.peak_bytes() - before


def _labels(ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)


def _eager(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def loss(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, use_cache=False).logits.float()
        found: torch.Tensor = eaft_ext.reference.gated_ce(logits, _labels(ids))
        return found

    return loss


def _gated(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def loss(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, use_cache=False).logits
        return eaft_ext.gated_ce(logits, _labels(ids), inplace_backward=True)

    return loss


def _linear(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    use_linear_gated_ce(model)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(ids, labels=ids, use_cache=False).loss
        return found

    return loss


WAYS = {"eager": _eager, "gated_ce": _gated, "linear_gated_ce": _linear}
