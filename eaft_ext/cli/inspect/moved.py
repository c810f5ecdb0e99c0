"""What a second model thinks of the tokens of a first: base and tuned, region by region."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eaft_ext._landscape import REGIONS

from .shares import Columns


@dataclass(frozen=True)
class Move:
    """Of the tokens of a region of the first model: means of both models, and where they went."""

    tokens: int
    nll: tuple[float, float]
    entropy: tuple[float, float]
    to: dict[str, int]


Moved = dict[str, Move]


def moved(first: Columns, second: Columns) -> Moved:
    """Return the moves from each region of ``first``; entropies are over ln k."""
    found = {}
    for index, name in enumerate(REGIONS):
        mask = first.region == index
        count = int(mask.sum())

        def means(one: str, mask: object = mask, count: int = count) -> tuple[float, float]:
            a, b = (getattr(columns, one)[mask] for columns in (first, second))
            return (float(a.mean()), float(b.mean())) if count else (math.nan, math.nan)

        where = second.region[mask].bincount(minlength=len(REGIONS)).tolist()
        found[name] = Move(
            count,
            means("nll"),
            means("normalized_entropy"),
            dict(zip(REGIONS, where, strict=True)),
        )
    return found
