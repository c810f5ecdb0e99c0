"""One fine-tuning of a study: no clipping, no decay, and a learning rate that stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import eaft_ext
from eaft_ext.cli.batches import Batch

from .measurements import logits_of, stats_of
from .study import Preset, Run
from .texts import K
from .weights import LOSSES, Tokens

LossOf = Callable[[Any, Batch, int], tuple[torch.Tensor, eaft_ext.TokenStats]]
"""The loss of a model on a batch, with the stats of its tokens, in a step of that number."""


def train(
    model: Any,
    batches: list[Batch],
    preset: Preset,
    run: Run,
    after_step: Callable[[int], None],
    loss_of: LossOf | None = None,
) -> dict[str, list[float]]:
    """Tune the model; return the mean nll and weight of each step's tokens.

    By default on the run's loss, of the logits.
    """
    torch.manual_seed(run.seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), run.rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / preset.warmup)
    )
    loss_of = loss_of or of_logits(run, len(batches))
    steps: dict[str, list[float]] = {"nll": [], "weight": []}
    for number, batch in enumerate(batches, start=1):
        loss, stats = loss_of(model, batch, number)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        steps["nll"].append(float(stats.nll[stats.valid].mean()))
        steps["weight"].append(float(stats.gate[stats.valid].mean()))
        after_step(number)
    return steps


def of_logits(run: Run, steps: int) -> LossOf:
    """The loss of a run, computed from the logits."""
    weigh = weigher(run, steps)

    def loss_of(model: Any, batch: Batch, number: int) -> Any:
        return weigh(*logits_of(model, batch, run.precision), number)

    return loss_of


def weigher(run: Run, steps: int) -> Callable[..., tuple[torch.Tensor, eaft_ext.TokenStats]]:
    """The loss of a run as a function of logits, labels and the number of the step."""
    weight = LOSSES[run.loss].weight
    generator = torch.Generator().manual_seed(run.seed)
    memory: dict[str, torch.Tensor] = {}

    def of_gate(logits: torch.Tensor, labels: torch.Tensor, step: int) -> Any:
        return eaft_ext.gated_ce(logits, labels, K, gate=weight, return_stats=True)

    def of_function(logits: torch.Tensor, labels: torch.Tensor, step: int) -> Any:
        stats = stats_of(logits, labels)
        assert not isinstance(weight, eaft_ext.Gate)
        tokens = Tokens(stats.nll, stats.entropy, labels, K, (step - 1) / steps, generator, memory)
        given = weight(tokens)
        loss, stats = eaft_ext.gated_ce(
            logits,
            labels,
            K,
            gate=eaft_ext.NoGate(),
            token_weight=given,
            return_stats=True,
        )
        return loss, stats._replace(gate=given)

    return of_gate if isinstance(weight, eaft_ext.Gate) else of_function
