"""Trains a tiny model for many steps, by every way to a loss in turn, and watches the process.

    python tests/faults/soak.py 20000

Memory, handles and threads must not grow, and steps must not become slower, in processor time: the
clock on the wall shows what else the machine does. It prints what it found as JSON, and exits with
1 where one did.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import eaft_ext
from eaft_ext import FocalGate, GatedCrossEntropyLoss

WORDS, HIDDEN, TOKENS = 997, 16, 24
SLICES = 10
GROWTH = 1 << 20
"""Bytes that a process may grow by after the first tenth: what allocators keep is not returned."""
SLOWER = 1.5
"""Of a step, the last tenth by the second: a quarter of the steps of each is faster than that."""


def own_gate(nll: Tensor, entropy: Tensor) -> Tensor:
    """One that no kernel knows."""
    return entropy / (1 + nll)


MODULE = GatedCrossEntropyLoss()


def _vocab_parallel(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return eaft_ext.vocab_parallel_gated_ce(h @ w.t(), y, group=dist.group.WORLD)


WAYS: list[Any] = [
    lambda h, w, y: eaft_ext.gated_ce(h @ w.t(), y),
    lambda h, w, y: eaft_ext.gated_ce(h @ w.t(), y, inplace_backward=True),
    lambda h, w, y: eaft_ext.gated_ce(h @ w.t(), y, gradient_in_forward=True),
    lambda h, w, y: eaft_ext.gated_ce(h @ w.t(), y, k=None, return_stats="full")[0],
    lambda h, w, y: eaft_ext.gated_ce(h @ w.t(), y, gate=own_gate, z_loss=1e-4),
    lambda h, w, y: eaft_ext.gated_ce((h @ w.t()).bfloat16(), y, gate=FocalGate(2.0)),
    lambda h, w, y: eaft_ext.linear_gated_ce(h, w, y, chunk_size=7),
    lambda h, w, y: eaft_ext.linear_gated_ce(h, w, y, reduction="none").sum(),
    lambda h, w, y: eaft_ext.linear_gated_ce(h, w, y, chunk_size=7, drop_below=0.1),
    lambda h, w, y: MODULE(h @ w.t(), y),
    _vocab_parallel,
]


def _refused(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """An error on the way, which must leave nothing behind either."""
    try:
        eaft_ext.gated_ce(hidden @ weight.t(), labels + WORDS)
    except ValueError:
        return
    raise AssertionError("labels outside the vocabulary were taken")


def _process() -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "bytes": 1024 * int(status["VmRSS"].split()[0]),
        "handles": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def soak(steps: int) -> dict[str, Any]:
    """What a training of so many steps made of the process."""
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    embedding, output = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, WORDS, bias=False)
    optimizer = torch.optim.SGD([*embedding.parameters(), *output.parameters()], lr=0.05)
    begun = time.perf_counter()
    # All of their memory from the start: what grows is not this program's.
    seconds, losses = (array("d", bytes(8 * steps)) for _ in range(2))
    seen: list[dict[str, int]] = []
    for step in range(steps):
        start = time.process_time()
        words = torch.randint(WORDS, (TOKENS + step % 3,))  # sizes that allocators see change
        labels = (7 * words + 1) % WORDS
        labels[:: step % 5 + 2] = -100
        hidden = embedding(words)
        loss = WAYS[step % len(WAYS)](hidden, output.weight, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            _refused(hidden.detach(), output.weight.detach(), labels)
        losses[step] = loss.item()
        seconds[step] = time.process_time() - start
        if (step + 1) % (steps // SLICES) == 0:
            gc.collect()
            seen.append(_process())
    dist.destroy_process_group()
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - begun, 1),
        "step_us": [round(1e6 * _typical(seconds, i)) for i in range(SLICES)],
        "bytes": [one["bytes"] for one in seen],
        "handles": [one["handles"] for one in seen],
        "threads": [one["threads"] for one in seen],
        "finite": all(loss == loss for loss in losses),
    }


def _typical(seconds: array[float], tenth: int) -> float:
    size = len(seconds) // SLICES
    return statistics.quantiles(seconds[tenth * size : (tenth + 1) * size], n=4)[0]


def faults(found: dict[str, Any]) -> list[str]:
    """What grew, or became slower; one sentence each."""
    told = []
    if found["bytes"][-1] - found["bytes"][0] > GROWTH:
        told.append(f"memory grew: {found['bytes']}")
    told += [
        f"{name} grew: {found[name]}"
        for name in ("handles", "threads")
        if found[name][-1] > found[name][0]
    ]
    if found["step_us"][-1] > SLOWER * found["step_us"][1]:
        told.append(f"steps became slower: {found['step_us']} us")
    return told if found["finite"] else [*told, "a loss was NaN"]


def main() -> int:
    """Print what was found."""
    found = soak(int(sys.argv[1]))
    print(json.dumps(found))
    told = faults(found)
    print(*told, sep="\n", file=sys.stderr)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
