"""The demo runs its model in bfloat16 wherever the device multiplies in it, CPUs among them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from eaft_ext.cli import model as models
from eaft_ext.cli.batches import Batch


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return the context to run a model in; its weights stay in float32."""
    return models.mixed_precision(device, also_on_cpu=True)


def forward(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits [b, s, V] of a batch, without a graph."""
    return models.forward(model, batch, also_on_cpu=True)
