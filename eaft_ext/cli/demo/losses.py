"""The loss of a training step beside the reference's: of all logits, or of a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

import eaft_ext
import eaft_ext.reference
from eaft_ext.cli.batches import IGNORE_INDEX, Batch
from eaft_ext.cli.errors import CommandError
from eaft_ext.integrations._absent_logits import LogitMap
from eaft_ext.integrations._causal_lm import expected_map

from .precision import mixed_precision

CHUNK_TOKENS = 64
"""Tokens whose logits ``--fused-linear`` holds at a time.

The demo's batches are small; the library's own choice, made for large ones, would be most of them.
"""

PROBE_TOKENS = 8
PROBE_TOLERANCE = 0.01
"""Of the largest logit: the output layer's must be as near to the model's on the first tokens.

In bfloat16 two products of the same numbers may differ by 2^-8.
"""


@dataclass(frozen=True)
class StepLoss:
    """The loss to train on and its stats, by the function ``name``, and what the reference says."""

    name: str
    loss: torch.Tensor
    stats: eaft_ext.TokenStats
    reference_loss: torch.Tensor


LossOf = Callable[[Any, Batch, int, eaft_ext.Gate], StepLoss]
"""(model, batch, k, gate) to loss."""


def of_logits(model: Any, batch: Batch, k: int, gate: eaft_ext.Gate) -> StepLoss:
    """Return the loss by ``gated_ce``, which is given all logits."""
    with mixed_precision(batch.input_ids.device):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    loss, stats = eaft_ext.gated_ce(
        logits, batch.labels, k, gate=gate, inplace_backward=True, return_stats=True
    )
    # Before the backward pass, which overwrites the logits with their gradient.
    with torch.no_grad():
        reference_loss: Any = eaft_ext.reference.gated_ce(
            logits.detach(), batch.labels, k, gate=gate
        )
    return StepLoss("gated_ce", loss, stats, reference_loss)


def of_hidden(model: Any, batch: Batch, k: int, gate: eaft_ext.Gate) -> StepLoss:
    """Return the loss by ``linear_gated_ce``, which holds the logits of a chunk at a time.

    The reference is given the logits of the same chunks, from the output layer itself.
    """
    head = model.get_output_embeddings()
    with mixed_precision(batch.input_ids.device):
        hidden = hidden_states(model, batch.input_ids)
        loss, stats = fused_loss(head, hidden, batch.labels, k, gate)
        with torch.no_grad():
            reference_loss = sum(
                (
                    _reference_sum(head(rows), labels, k, gate)
                    for rows, labels in _chunks(hidden.detach(), batch.labels)
                ),
                start=torch.zeros((), device=hidden.device),
            )
    return StepLoss("linear_gated_ce", loss, stats, reference_loss / stats.valid.sum().clamp(min=1))


def fused_loss(
    head: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, k: int, gate: eaft_ext.Gate
) -> tuple[torch.Tensor, eaft_ext.TokenStats]:
    """Return (loss, stats) of hidden states [b, s, H] and the output layer."""
    return eaft_ext.linear_gated_ce(
        hidden,
        head.weight,
        labels,
        head.bias,
        k,
        gate=gate,
        chunk_size=CHUNK_TOKENS,
        return_stats=True,
    )


def hidden_states(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Return what the output layer is given, [b, s, H]."""
    hidden: torch.Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def check_output_layer(model: Any, batch: Batch) -> None:
    """Check that the model's logits are the product of hidden states and output layer.

    Raises:
        CommandError: they are not; ``of_hidden`` would train on another loss.
    """
    of_model = expected_map(model)
    if of_model != LogitMap():
        raise CommandError(
            f"--fused-linear cannot train this model: it changes its logits after the output layer "
            f"(softcap {of_model.softcap}, scale {of_model.logit_scale})"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or model.base_model is model:
        raise CommandError(
            f"--fused-linear cannot train this model: {type(model).__name__} has no linear output "
            f"layer on hidden states of its own"
        )
    input_ids = batch.input_ids[:1, :PROBE_TOKENS]
    with mixed_precision(input_ids.device):
        logits = model(input_ids=input_ids, use_cache=False).logits
        product = linear(hidden_states(model, input_ids), head.weight, head.bias)
    if logits.shape != product.shape or not (
        (logits - product).abs().max() <= PROBE_TOLERANCE * logits.abs().max()
    ):
        raise CommandError(
            f"--fused-linear cannot train this model: the logits of {type(model).__name__} are not "
            f"the output layer's product with the last hidden states"
        )


def _chunks(
    hidden: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield hidden states and labels of the tokens that are not ignored, as the library does.

    A product of other rows might be rounded otherwise.
    """
    valid = labels != IGNORE_INDEX
    yield from zip(
        hidden[valid].split(CHUNK_TOKENS), labels[valid].split(CHUNK_TOKENS), strict=True
    )


def _reference_sum(
    logits: torch.Tensor, labels: torch.Tensor, k: int, gate: eaft_ext.Gate
) -> torch.Tensor:
    total: Any = eaft_ext.reference.gated_ce(logits, labels, k, gate=gate, reduction="sum")
    return torch.as_tensor(total)
