"""From checked arguments to a reduced loss: which operator, which gate, what divides the mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eaft_ext import reference
from eaft_ext._dispatch import takes_kernel
from eaft_ext._options import Reduce, TokenLoss
from eaft_ext._registration import stats_dtype
from eaft_ext.linear._operators import (
    linear_gated_ce_forward,
    linear_gated_ce_forward_with_grad,
)
from eaft_ext.parallel._group import Member
from eaft_ext.parallel._shard import VocabShard
from eaft_ext.reference import TokenStats


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

    @classmethod
    def of(cls, shard: VocabShard, member: Member, reduce_hidden: bool) -> WeightShard:
        """The shard of a member of a group, of words whose number is known."""
        assert shard.total is not None, "the chunks depend on it"
        group = (member.group.group_name, member.size)
        return cls(shard.start, shard.vocab_size, shard.total, *group, reduce_hidden)


class Chunking(NamedTuple):
    """How the tokens are divided, the gradients of their chunks added up, and rows dropped."""

    chunk_size: int | None
    accumulate_in_float32: bool | None
    drop_below: float = 0.0


def reduced_loss(
    product: Product,
    labels: Tensor,
    of_token: TokenLoss,
    reduce: Reduce,
    chunking: Chunking,
    shard: WeightShard | None = None,
) -> tuple[Tensor, TokenStats]:
    """The loss and the stats."""
    hidden, weight, bias = product
    total = weight.size(0)
    if shard is None:
        shard = WeightShard(0, None, total, None, 1, False)
    elif shard.group_size == 1 and shard.start == 0:
        # The only process needs no partial.
        shard = shard._replace(group=None)
    total = shard.total
    by_kernel = takes_kernel("gated_ce_forward_with_grad", hidden)
    options = (
        *of_token.kernel_arguments(),
        of_token.family(),
        of_token.num_extra,
        by_kernel,
        *chunking,
        *shard,
    )
    valid = labels != of_token.ignore_index
    wanted = [t is not None and t.requires_grad for t in product]
    # Where the gradient is a number times one that is known already, it is computed at once. Not
    # in float16, in which it would be rounded before a loss scale lifts it.
    at_once = (
        reduce.reduction != "none"
        and of_token.is_known_to_kernels
        and hidden.dtype != torch.float16
        and torch.is_grad_enabled()
        and any(wanted)
    )
    if at_once:
        dtype = stats_dtype(hidden)
        divisor = torch.ones((), dtype=dtype, device=hidden.device) * reduce.divisor(valid, dtype)
        loss, nll, entropy, given, extra, gone, *_ = linear_gated_ce_forward_with_grad(
            hidden, weight, bias, labels, divisor, reduce.token_weight, wanted, *options
        )
        dropped = gone if chunking.drop_below else None
        return loss, of_token.stats(nll, entropy, given, valid, extra, dropped)
    loss, nll, entropy, given, _, _, extra = linear_gated_ce_forward(
        hidden, weight, bias, labels, *options
    )
    if not of_token.is_known_to_kernels:
        # The loss of NoGate is the nll, with its gradient: any weight can be put on it.
        given = of_token.gate_weights(total, nll, entropy, valid)
        loss = reference.weigh(loss, given)
    if (rest := of_token.z_loss_alone) is not None:
        unreduced = Reduce("none", None)
        loss = loss + reduced_loss(product, labels, rest, unreduced, chunking, shard)[0]
    return reduce.reduced(loss, valid), of_token.stats(nll, entropy, given, valid, extra)
