"""What each region of the plane has of the tokens, the loss and the gradient, under each gate."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import eaft_ext
from eaft_ext._landscape import REGIONS
from eaft_ext.cli.gates_shown import GATES
from eaft_ext.cli.palette import LOSSES

from .tokens import View


@dataclass(frozen=True)
class Columns:
    """The numbers of all tokens, each a vector of float64; ``region`` is an index.

    ``k`` is that of the entropy, at most the vocabulary.
    """

    nll: Tensor
    normalized_entropy: Tensor
    gate: Tensor
    gradient: Tensor
    region: Tensor
    k: int

    @staticmethod
    def of(views: Iterable[View], k: int) -> Columns:
        """Those of the views."""
        flat = array("d")
        for view in views:
            numbers = (view.nll, view.normalized_entropy, view.gate, view.gradient)
            flat.extend((*numbers, REGIONS.index(view.region)))
        table = torch.tensor(flat, dtype=torch.float64).view(-1, 5)
        nll, entropy, gate, gradient, region = table.unbind(1)
        return Columns(nll, entropy, gate, gradient, region.long(), k)

    def __len__(self) -> int:
        return len(self.nll)

    @property
    def entropy(self) -> Tensor:
        """Of the k largest logits, in nats."""
        return self.normalized_entropy * math.log(self.k)


@dataclass(frozen=True)
class Share:
    """A region's part of all tokens, of their loss and of their gradients' norms; its mean gate.

    ``learned`` is its part of the gradients' norms times the gate. What cannot be said is NaN.
    """

    tokens: int
    of_tokens: float
    of_loss: float
    of_gradient: float
    learned: float
    mean_gate: float


def shares(columns: Columns) -> dict[str, Share]:
    """Return each region's share, and that of ``all``."""
    return {name: _share(columns, mask) for name, mask in _masks(columns).items()}


def _share(columns: Columns, mask: Tensor) -> Share:
    count = int(mask.sum())

    def part(values: Tensor) -> float:
        return _ratio(float(values[mask].sum()), float(values.sum()))

    return Share(
        tokens=count,
        of_tokens=count / len(columns),
        of_loss=part(columns.nll),
        of_gradient=part(columns.gradient),
        learned=part(columns.gate * columns.gradient),
        mean_gate=_ratio(float(columns.gate[mask].sum()), count),
    )


@dataclass(frozen=True)
class Kept:
    """What a gate keeps of the gradients' norms in each region, and the region's part of that."""

    title: str
    kept: dict[str, float]
    share: dict[str, float]


def kept(columns: Columns, chosen: eaft_ext.EntropyGate) -> dict[str, Kept]:
    """Return what each gate keeps, by the loss's short name; ``chosen`` is EAFT's place."""
    found = {}
    for name, title, weight in _weights(columns, chosen):
        norm = weight * columns.gradient
        before, after = (
            {n: float(v[m].sum()) for n, m in _masks(columns).items()}
            for v in (columns.gradient, norm)
        )
        found[name] = Kept(
            title,
            {n: _ratio(after[n], before[n]) for n in before},
            {n: _ratio(after[n], after["all"]) for n in before},
        )
    return found


CARRIED = (0.9, 0.99, 0.999)
"""Parts of the sum of all scores."""


def carriers(columns: Columns, chosen: eaft_ext.EntropyGate) -> dict[str, tuple[str, list[float]]]:
    """Return, for each gate, the least share of tokens that has each part of the sum of scores.

    A score is g (1 - p(y)), as for ``drop_below`` of :func:`eaft_ext.linear_gated_ce`: one less a
    part is what that can be, one less a share what it saves.
    """
    found = {}
    for name, title, weight in _weights(columns, chosen):
        scores = (weight * -torch.expm1(-columns.nll)).sort(descending=True)[0].cumsum(0)
        needed = [int((scores < part * scores[-1]).sum()) + 1 for part in CARRIED]
        is_any = bool(scores[-1] > 0)
        found[name] = (title, [n / len(columns) if is_any else math.nan for n in needed])
    return found


def _weights(columns: Columns, chosen: eaft_ext.EntropyGate) -> Iterator[tuple[str, str, Tensor]]:
    """Each gate's short name, title and weights, with ``chosen`` in EAFT's place."""
    for name, gate in GATES.items():
        if name == "eaft":
            yield name, gate_title(chosen), columns.gate
        elif gate != chosen:
            yield name, LOSSES[name].title, gate.for_k(columns.k)(columns.nll, columns.entropy)


def gate_title(gate: eaft_ext.EntropyGate) -> str:
    """What EAFT's gate is called, with what is not the paper's."""
    alpha = "" if gate.alpha == 1 else f", alpha {gate.alpha:g}"
    normalizer = "" if gate.normalizer is None else f", normalizer {gate.normalizer:g}"
    return LOSSES["eaft"].title + alpha + normalizer


def _masks(columns: Columns) -> dict[str, Tensor]:
    masks = {name: columns.region == index for index, name in enumerate(REGIONS)}
    return {**masks, "all": torch.ones(len(columns), dtype=torch.bool)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if 0 < whole < math.inf else math.nan
