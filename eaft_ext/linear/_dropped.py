"""Rows that teach nothing, or little: which ones the products of the gradients are made without.

A row's gradient by its logits is u g (softmax - onehot(y)), of upstream u and gate g: known before
it is computed, and of an L1 norm of 2 s, with the score s = |u| g (1 - p(y)). Rows of weight 0 have
none. Of the others those with the smallest scores can be dropped, up to a share of their sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eaft_ext._options import TokenLoss
from eaft_ext.linear._chunks import SLICE_BYTES, TILE


class Weights(NamedTuple):
    """What a row's gradient is multiplied by, and its nll, each (rows); the nll of scores alone."""

    upstream: Tensor
    gate: Tensor
    nll: Tensor | None


def scores(of_token: TokenLoss, weights: Weights) -> Tensor:
    """Half of the L1 norm that a row's gradient by its logits has, at most, in float32 at least.

    Without label smoothing it has that norm, but for a softcap, which makes it smaller, and times
    the logit_scale.
    """
    upstream, gate, nll = weights
    assert nll is not None, "scores are asked for"
    smoothing = of_token.label_smoothing
    surprise = -torch.expm1(-nll)
    return (upstream * gate).abs() * ((1 - smoothing) * surprise + smoothing)


def dropped(of_token: TokenLoss, weights: Weights, drop_below: float) -> Tensor:
    """Return which rows are to be left out, bool (rows), on the device, for the same rows the same.

    Those of weight 0; and of the others those with the smallest scores, as many as have at most
    ``drop_below`` of the sum of all. What is not finite stays, and so does all beside it.
    """
    upstream, gate, _ = weights
    # A z-loss is of all rows, whatever their gates.
    weightless = (upstream if of_token.z_loss else upstream * gate) == 0
    if drop_below == 0:
        return weightless
    score = scores(of_token, weights)
    ordered, order = score.sort(stable=True)
    # MPS has no float64.
    total = ordered.cumsum(0, dtype=None if score.device.type == "mps" else torch.float64)
    small = torch.empty_like(weightless)
    small[order] = (total <= drop_below * total[-1:]) & total[-1:].isfinite()
    return weightless | small


def kept_rows(gone: Tensor) -> Tensor | None:
    """Return the rows that stay, as indices on the CPU, in order; None if that is all of them.

    It takes a synchronisation. On a GPU they are filled up to whole tiles, with what may go.
    """
    stays = ~gone.cpu()
    missing = -int(stays.sum()) % TILE if gone.is_cuda else 0
    if missing:
        stays[(~stays).nonzero().squeeze(1)[:missing]] = True
    kept = stays.nonzero().squeeze(1)
    return None if len(kept) == len(stays) else kept


def moved_up(rows: Tensor, kept: Tensor) -> Tensor:
    """Make the first rows of ``rows`` those of ``kept``; return which each one was.

    Rows from behind take the places of those that go: no more are moved than go or stay.
    """
    count = len(kept)
    order = torch.arange(count)
    stay = kept < count
    free = torch.ones(count, dtype=torch.bool)
    free[kept[stay]] = False
    holes, movers = free.nonzero().squeeze(1), kept[~stay]
    order[holes] = movers
    move = _move_one_by_one if rows.device.type == "cpu" else _move_some_at_a_time
    move(rows, holes, movers)
    return order.to(rows.device)


def _move_one_by_one(rows: Tensor, holes: Tensor, movers: Tensor) -> None:
    """On a CPU fresh memory for several takes longer than to copy them."""
    for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
        rows[hole] = rows[mover]


def _move_some_at_a_time(rows: Tensor, holes: Tensor, movers: Tensor) -> None:
    step = max(1, SLICE_BYTES // max(1, rows.size(1) * rows.element_size()))
    for some, sources in zip(holes.split(step), movers.split(step), strict=True):
        rows.index_copy_(0, some.to(rows.device), rows[sources.to(rows.device)])
