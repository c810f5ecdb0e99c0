"""A Trainer of transformers for models that are as transformers has them."""

from __future__ import annotations

from typing import Any

import transformers
from transformers_models import unfused


class UnfusedTrainer(transformers.Trainer):
    """Trains on the loss of all logits."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        tokens, labels = inputs["input_ids"], inputs["labels"]
        loss = unfused(model, tokens, labels, num_items_in_batch=num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss
