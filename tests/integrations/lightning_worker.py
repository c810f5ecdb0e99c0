"""One process of test_lightning.py: ``lightning_worker.py RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from pages import on_page
from spawned import work
from trainer_runs import LEARNING_RATE, examples
from transformers_models import build

from eaft_ext.integrations.transformers import use_linear_gated_ce

Module = on_page("other-stacks.md", "EAFT")


class OfThePage(Module):  # type: ignore[misc, valid-type]
    """With the optimizer that the rest of the tests takes, and no logger."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


class WithoutLogits(OfThePage):
    """The same, where the model has the loss."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.gated = use_linear_gated_ce(model)

    def training_step(self, batch: Any, _: int) -> Any:
        loss = self.model(**batch, num_items_in_batch=1).loss
        self.num_items += self.gated.stats.valid.sum()
        return loss


class OfMeans(OfThePage):
    """What is not to be done: a mean over each micro-batch."""

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        return loss / self.num_items.clamp(min=1)

    def on_before_optimizer_step(self, _: Any) -> None:
        self.num_items = 0


class OfAnother(WithoutLogits):
    """The model has the loss, and is not asked for it."""

    def training_step(self, batch: Any, index: int) -> Any:
        return OfThePage.training_step(self, batch, index)


def trained(kind: Callable[[Any], Any], rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    """The weights after some steps, of two micro-batches each, here or in two processes."""
    model = build("llama")
    rows = examples()
    batches = [
        {name: torch.stack([row[name] for row in rows[first : first + 2]]) for name in rows[0]}
        for first in range(2 * rank, len(rows), 2 * world_size)
    ]
    distributed = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": world_size}
    given = {"accumulate_grad_batches": 2} if world_size == 1 else distributed
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **given | options,
    )
    trainer.fit(kind(model), torch.utils.data.DataLoader(batches, batch_size=None))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def main(rank: int, world_size: int) -> dict[str, Any]:
    """What the modules that average rightly have trained."""
    # As torchrun tells Lightning that it started the processes.
    of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in of_torchrun.items()}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    kinds = [OfThePage, WithoutLogits]
    return {kind.__name__: trained(kind, rank, world_size) for kind in kinds}


if __name__ == "__main__":
    work(main)
