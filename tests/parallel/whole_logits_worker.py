"""A process of test_whole_logits.py: ``whole_logits_worker.py RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from spawned import work
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import linear

import eaft_ext
from eaft_ext.integrations.megatron import vocab_parallel_cross_entropy
from eaft_ext.parallel import _agreement

WIDTH = 96
HIDDEN = 8
SHAPE = (5, 3)


class Call(NamedTuple):
    """What the processes give: an output layer's weight (V_shard, H) and bias, each its own."""

    hidden: Tensor
    weights: list[Tensor]
    labels: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = {}  # noqa: RUF012, nobody changes it
    equal: list[int] = []  # noqa: RUF012
    """The processes that have equal parts."""

    def logits(self) -> list[Tensor]:
        """Those of each process."""
        return [linear(self.hidden, weight, self.bias) for weight in self.weights]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _labels(high: int = WIDTH) -> Tensor:
    return torch.randint(high, SHAPE, generator=torch.Generator().manual_seed(1))


def refused(world_size: int) -> dict[str, Call]:
    """The whole vocabulary in every process, or one shard in several."""
    hidden, weight, labels = _random(*SHAPE, HIDDEN), _random(WIDTH, HIDDEN, seed=1), _labels()
    whole = Call(hidden, [weight] * world_size, labels, equal=list(range(world_size)))
    last = labels.clone()
    last[2, 1] = WIDTH - 1
    ignored = torch.full_like(labels, -100)
    ignored[3, 2] = 7
    padded = hidden.clone()
    padded[0] = 0
    calls = {
        "whole": whole,
        "the last word": whole._replace(labels=last),
        "one label": whole._replace(labels=ignored),
        "rows of zeros": whole._replace(hidden=padded),
        "one token": whole._replace(hidden=hidden[2, 1], labels=labels[2, 1]),
        "sequence first": whole._replace(hidden=hidden.transpose(0, 1), labels=labels.t()),
        "bfloat16": whole._replace(
            hidden=hidden.bfloat16(), weights=[weight.bfloat16()] * world_size
        ),
        "bias": whole._replace(bias=_random(WIDTH, seed=2)),
        "an ignored word": whole._replace(options={"ignore_index": WIDTH + 3}),
    }
    if world_size == 3:
        weights = [weight, _random(WIDTH, HIDDEN, seed=3), weight]
        calls["a shard in two"] = whole._replace(weights=weights, equal=[0, 2])
    return calls


def right(world_size: int) -> dict[str, Call]:
    """Shards, also equal ones."""
    hidden, weight, labels = _random(*SHAPE, HIDDEN), _random(WIDTH, HIDDEN, seed=1), _labels()
    shards = [_random(WIDTH, HIDDEN, seed=rank + 1) for rank in range(world_size)]
    equal = Call(hidden, [weight] * world_size, labels)
    elsewhere = labels.clone()
    elsewhere[4, 2] += WIDTH * (world_size - 1)
    mask = torch.zeros(WIDTH).masked_fill(torch.arange(WIDTH) % 3 == 0, -torch.inf)
    no_weights = [0 * weight] * world_size
    return {
        "labels in the first shard": equal._replace(weights=shards),
        "labels in all shards": equal._replace(weights=shards, labels=_labels(WIDTH * world_size)),
        "equal shards": equal._replace(labels=_labels(WIDTH * world_size)),
        "one label in the last shard": equal._replace(labels=elsewhere),
        "zeros": equal._replace(weights=no_weights),
        "zeros and a mask": equal._replace(
            weights=no_weights, labels=labels // 3 * 3 + 1, bias=mask
        ),
        "rows of one number": equal._replace(weights=[weight[:1].expand_as(weight)] * world_size),
        "all ignored": equal._replace(labels=torch.full_like(labels, -100)),
        "vocab_size": equal._replace(options={"vocab_size": WIDTH * world_size}),
        "whole, and vocab_size": equal._replace(options={"vocab_size": WIDTH}),
    }


def calls_of(world_size: int) -> dict[str, Call]:
    """All that so many processes make; alone, a process has all words anyway."""
    of_one = {name: refused(1)[name] for name in ("whole", "bias", "one token")}
    return right(world_size) | (of_one if world_size == 1 else refused(world_size))


def _of_logits(call: Call, rank: int, **options: Any) -> Tensor:
    return eaft_ext.vocab_parallel_gated_ce(
        call.logits()[rank], call.labels, group=dist.group.WORLD, **options
    )


def _of_weight(call: Call, rank: int, **options: Any) -> Tensor:
    return eaft_ext.vocab_parallel_linear_gated_ce(
        call.hidden, call.weights[rank], call.labels, call.bias, group=dist.group.WORLD, **options
    )


def _of_megatron(call: Call, rank: int, **options: Any) -> Tensor:
    losses = vocab_parallel_cross_entropy(
        call.logits()[rank], call.labels, tp_group=dist.group.WORLD, **options
    )
    return losses.sum() / (call.labels >= 0).sum().clamp(min=1)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "logits": _of_logits,
    "weight": _of_weight,
    "megatron": _of_megatron,
}


def _looks(rank: int) -> list[int]:
    """How often a shard is looked at in three calls on a device whose host runs ahead."""
    looks: list[int] = []
    note = {"vocab_size": None, "columns": [rank, rank + 1]}
    group = dist.new_group()
    for checks in ("0", "0", "1"):
        seen: list[int] = []

        def look(seen: list[int] = seen) -> int:
            seen.append(rank)
            return rank

        with patch.dict(os.environ, EAFT_EXT_CHECKS=checks):
            _agreement.check("op", group, torch.device("cuda"), dict(note), look)
        looks.append(len(seen))
    return looks


def _found(function: str, call: Call, rank: int) -> Tensor | str:
    """A loss, or what is raised."""
    try:
        return FUNCTIONS[function](call, rank, **call.options)
    except ValueError as error:
        return str(error)


def main(rank: int, world_size: int) -> dict[str, Any]:
    """What each call of each function gives."""
    found: dict[str, Any] = {
        f"{name} {function}": _found(function, call, rank)
        for name, call in calls_of(world_size).items()
        for function in FUNCTIONS
    }
    if world_size > 1:
        found["looks"] = _looks(rank)
    return found


if __name__ == "__main__":
    work(main)
