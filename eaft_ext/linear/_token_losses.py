"""From checked arguments to a reduced loss: which operator, which gate, what divides the mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eaft_ext import reference
from eaft_ext._dispatch import is_built_in, takes_kernel
from eaft_ext._registration import ops
from eaft_ext.gates import Gate, GateFunction, NoGate
from eaft_ext.linear import _operators as _operators  # defines them
from eaft_ext.parallel._shard import VocabShard
from eaft_ext.reference import Reduction, TokenStats


class Product(NamedTuple):
    """The logits that are never all there: hidden (..., H), weight (V, H), bias (V)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def in_autocast_dtype(self) -> Product:
        """As ``F.linear`` takes them under autocast: float64 stays."""
        device = self.hidden.device.type
        if not torch.is_autocast_enabled(device) or self.hidden.dtype == torch.float64:
            return self
        dtype = torch.get_autocast_dtype(device)
        return Product(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


class Shard(NamedTuple):
    """The rows of weight and bias that this process has, and who has the others."""

    columns: VocabShard
    group: str
    group_size: int
    reduce_hidden: bool


def reduced_loss(
    product: Product,
    labels: Tensor,
    k: int,
    gate: Gate | GateFunction,
    ignore_index: int,
    reduction: Reduction,
    num_items_in_batch: float | Tensor | None,
    chunk_size: int | None,
    accumulate_in_float32: bool | None,
    shard: Shard | None = None,
) -> tuple[Tensor, TokenStats]:
    """The loss and the stats."""
    hidden, weight, bias = product
    inside = gate if is_built_in(gate) else NoGate()
    options: tuple[Any, ...] = (
        k,
        inside.name,
        inside.parameters(),
        ignore_index,
        takes_kernel("gated_ce_forward_with_grad", hidden),
        chunk_size,
        accumulate_in_float32,
    )
    total = weight.size(0)
    if shard is None:
        options += (0, None, None, None, 1, False)
    else:
        start, vocab_size, known_total = shard.columns
        # The only process needs no partial.
        alone = shard.group_size == 1 and start == 0
        group = None if alone else shard.group
        options += (start, vocab_size, known_total, group, shard.group_size, shard.reduce_hidden)
        total = k if known_total is None else known_total
    valid = labels != ignore_index
    wanted = [t is not None and t.requires_grad for t in product]
    # Where the gradient is a number times one that is known already, it is computed at once. Not
    # in float16, in which it would be rounded before a loss scale lifts it.
    at_once = (
        reduction != "none"
        and inside is gate
        and hidden.dtype != torch.float16
        and torch.is_grad_enabled()
        and any(wanted)
    )
    if at_once:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        divisor = torch.ones((), dtype=dtype, device=hidden.device)
        if reduction == "mean":
            divisor = divisor * reference.mean_divisor(valid, num_items_in_batch, dtype)
        loss, nll, entropy, given, _, _, _ = ops.linear_gated_ce_forward_with_grad(
            hidden, weight, bias, labels, divisor, wanted, *options
        )
        return loss, TokenStats(nll, entropy, given, valid)
    loss, nll, entropy, given, _, _ = ops.linear_gated_ce_forward(
        hidden, weight, bias, labels, *options
    )
    if inside is not gate:
        # The loss of NoGate is the nll, with its gradient: any weight can be put on it.
        given = reference.gate_weights(gate, min(k, total), nll, entropy, valid)
        loss = reference.weigh(loss, given)
    loss = reference.reduce_loss(loss, valid, reduction, num_items_in_batch)
    return loss, TokenStats(nll, entropy, given, valid)
