"""The plane of the paper: normalised entropy against the label's probability, in cells and regions.

A token is at (p(y), H / ln k), both from 0 to 1. The bounds of a confident conflict cut the plane
into four regions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eaft_ext._conflicts import CONFLICT_PROBABILITY, sure

CELLS = 40
"""Steps of each axis, equal ones; the regions' bounds, 0.1 and 0.3, lie between two."""

FAINTEST = 0.15
"""Where a ramp of colours begins, as a share of it, so that a cell of a single token is seen."""

REGIONS = ("conflict", "known", "unlikely", "open")
"""Sure of something else; sure, and of the label; unsure, of what is unlikely or not."""


def regions(nll: Tensor, entropy: Tensor, k: int) -> Tensor:
    """Return the index in ``REGIONS`` of each token, int64; nll and entropy are in nats.

    NaN is neither sure nor likely.
    """
    is_likely = nll <= -math.log(CONFLICT_PROBABILITY)
    return 2 * (~sure(entropy, k)).long() + is_likely.long()


def counts(nll: Tensor, entropy: Tensor, k: int, valid: Tensor) -> Tensor:
    """Return how many tokens are in each cell, int64 [CELLS, CELLS], on the device.

    Rows are steps of the entropy, columns of the probability, both from 0. What is not ``valid``,
    or NaN, is not counted. The host reads nothing.
    """
    # Edges belong to the cell above, but for 1, which has none.
    row = _cell(entropy / math.log(k) if k > 1 else torch.zeros_like(entropy))
    column = _cell((-nll).exp())
    counted = valid & ~entropy.isnan() & ~nll.isnan()
    # Whole numbers, as floats lose counts from 2 ** 24; of 32 bits, as MPS adds no others by index.
    found = torch.zeros(CELLS * CELLS, dtype=torch.int32, device=nll.device)
    cell = torch.where(counted, row * CELLS + column, 0)
    found.index_add_(0, cell.flatten(), counted.flatten().to(found.dtype))
    return found.view(CELLS, CELLS).long()


def _cell(value: Tensor) -> Tensor:
    return (value.nan_to_num(0.0).clamp(0.0, 1.0) * CELLS).long().clamp(max=CELLS - 1)
