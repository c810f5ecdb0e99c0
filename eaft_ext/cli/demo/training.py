"""One fine-tuning run: the fused loss trains, the reference checks it at every step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import eaft_ext
from eaft_ext._conflicts import confident_conflicts
from eaft_ext.cli.batches import Batch
from eaft_ext.cli.errors import CommandError

from .evaluation import Evaluation, Evaluator
from .losses import LossOf, of_logits

TOLERANCE = 1e-5
"""Largest difference allowed between the fused loss and the reference, relative to max(1, loss).

Both sum in float32 from the same logits. A token's loss is a sum over the vocabulary and its gate
one over k, each good to a few units of 1e-7, and the mean over tokens averages what is left; 1e-5
leaves room for other summation orders, and any wrong term is orders of magnitude larger.
"""

EVALUATIONS = 4
"""Measurements during a run, beside the one of the base model."""

WARMUP_SHARE = 0.1
"""Part of the steps over which the learning rate rises linearly; then it stays."""


class ReferenceMismatch(CommandError):
    """The fused loss and the reference disagree on the same logits."""


@dataclass(frozen=True)
class Step:
    """One training step. Losses and entropies are in nats per token."""

    step: int
    loss: float
    reference_loss: float
    nll: float
    entropy: float
    gate: float
    conflicts: float
    tokens: int
    seconds: float

    @property
    def difference(self) -> float:
        """Return the fused loss's distance from the reference, relative to max(1, loss)."""
        return abs(self.loss - self.reference_loss) / max(1.0, abs(self.reference_loss))


@dataclass
class Run:
    """A fine-tuning run as far as it has come."""

    name: str
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


def train(
    run: Run,
    base: Any,
    batches: list[Batch],
    evaluator: Evaluator,
    *,
    gate: eaft_ext.Gate,
    k: int,
    learning_rate: float,
    seed: int,
    on_change: Callable[[Run], None],
    loss_of: LossOf = of_logits,
) -> None:
    """Tune a copy of ``base`` on ``batches``, one step each, and record everything in ``run``.

    ``run`` is filled as the run goes on, so that an interrupted run keeps what it has done.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    warmup = max(1, round(WARMUP_SHARE * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup)
    )
    measured_at = {round(len(batches) * (index + 1) / EVALUATIONS) for index in range(EVALUATIONS)}
    run.evaluations.append(evaluator.base)
    for number, batch in enumerate(batches, start=1):
        started = time.perf_counter()
        computed = loss_of(model, batch, k, gate)
        stats = computed.stats
        torch.autograd.backward(computed.loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        nll, entropy = stats.nll[stats.valid], stats.entropy[stats.valid]
        conflicts = confident_conflicts(nll, entropy, k)
        step = Step(
            step=number,
            loss=float(computed.loss.detach()),
            reference_loss=float(computed.reference_loss),
            nll=float(nll.mean()),
            entropy=float(entropy.mean()),
            gate=float(stats.gate[stats.valid].mean()),
            conflicts=float(conflicts.float().mean()),
            tokens=nll.numel(),
            seconds=time.perf_counter() - started,
        )
        run.steps.append(step)
        on_change(run)
        if not step.difference <= TOLERANCE:  # NaN fails too
            raise ReferenceMismatch(
                f"{run.name}, step {number}: {computed.name} gives {step.loss!r}, the "
                f"reference {step.reference_loss!r}; they differ by {step.difference:.1e} of the "
                f"loss, more than {TOLERANCE:.0e}"
            )
        if number in measured_at:
            run.evaluations.append(evaluator.measure(model, number))
            on_change(run)
