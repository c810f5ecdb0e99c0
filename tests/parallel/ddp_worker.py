"""One process of test_distributed.py: ``ddp_worker.py RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

import torch
from spawned import work
from torch import Tensor, nn

import eaft_ext

V = 50
STEPS = ("all_ignored_on_one", "no_tokens_on_one", "both_learn")


def build_model() -> nn.Linear:
    """The same in every process."""
    torch.manual_seed(0)
    return nn.Linear(8, V, bias=False)


def inputs_of(step: str, rank: int) -> tuple[Tensor, Tensor]:
    """Hidden states and labels of a process in a step."""
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(6, 8, generator=generator)
    labels = torch.randint(V, (6,), generator=generator)
    if rank == 1 and step == "all_ignored_on_one":
        labels.fill_(-100)
    if rank == 1 and step == "no_tokens_on_one":
        return hidden[:0], labels[:0]
    return hidden, labels


def function(rank: int, world_size: int) -> dict[str, Tensor]:
    """Train a step of each kind; gives losses and gradients."""
    model = nn.parallel.DistributedDataParallel(build_model())
    saved: dict[str, Tensor] = {}
    for step in STEPS:
        model.zero_grad()
        hidden, labels = inputs_of(step, rank)
        loss = eaft_ext.gated_ce(model(hidden), labels, inplace_backward=step == "both_learn")
        loss.backward()
        saved[f"{step} loss"] = loss.detach()
        saved[f"{step} gradient"] = model.module.weight.grad.clone()
    return saved


if __name__ == "__main__":
    work(function)
