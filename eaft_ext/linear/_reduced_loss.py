"""From checked arguments to a reduced loss: which operator, which gate, what divides the mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eaft_ext import reference
from eaft_ext._dispatch import is_built_in, takes_kernel
from eaft_ext._registration import ops, stats_dtype
from eaft_ext.gates import Gate, GateFunction, NoGate
from eaft_ext.linear import _operators as _operators  # defines them
from eaft_ext.reference import Reduction, TokenStats


class Product(NamedTuple):
    """The logits that are never all there: hidden (..., H), weight (V, H), bias (V)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def in_autocast_dtype(self) -> Product:
        """As ``F.linear`` takes them under autocast: float64 stays."""
        dtype = autocast_dtype(self.hidden)
        if dtype is None:
            return self
        hidden, weight, bias = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in self
        )
        assert hidden is not None and weight is not None, "only the bias may be None"
        return Product(hidden, weight, bias)


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What autocast converts the operands of a product to, None where it does not."""
    device = hidden.device.type
    # Meta tensors have none. Not every torch can trace the question.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class WeightShard(NamedTuple):
    """The rows of weight and bias that this process has, and who has the others.

    From the word ``start`` on; those of words from ``vocab_size`` on are padding. ``total`` are the
    words of all.
    """

    start: int
    vocab_size: int | None
    total: int
    group: str | None
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
    shard: WeightShard | None = None,
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
        options += (0, None, total, None, 1, False)
    else:
        total = shard.total
        # The only process needs no partial.
        alone = shard.group_size == 1 and shard.start == 0
        options += shard._replace(group=None) if alone else shard
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
        dtype = stats_dtype(hidden)
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
