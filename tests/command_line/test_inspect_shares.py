"""What each region has, what each gate keeps of it, and what moved between two models."""

from __future__ import annotations

import math

import pytest
import torch

from eaft_ext import EntropyGate
from eaft_ext._landscape import REGIONS
from eaft_ext.cli.gates_shown import GATES
from eaft_ext.cli.inspect.moved import moved
from eaft_ext.cli.inspect.shares import CARRIED, Columns, carriers, kept, shares
from eaft_ext.cli.inspect.tokens import View

K = 7


def _columns(seed: int, gate: EntropyGate, count: int = 200) -> Columns:
    """Tokens in all regions but the last."""
    generator = torch.Generator().manual_seed(seed)
    nll, entropy, gradient = torch.rand(3, count, generator=generator, dtype=torch.float64)
    nll, entropy = 8 * nll, entropy * math.log(K)
    entropy[nll < -math.log(0.1)] *= 0.29  # none is uncertain and likely
    weight = gate.for_k(K)(nll, entropy)
    views = []
    for one in zip(nll.tolist(), entropy.tolist(), weight.tolist(), gradient.tolist(), strict=True):
        sure, unlikely = one[1] < 0.3 * math.log(K), math.exp(-one[0]) < 0.1
        region = REGIONS[2 * (not sure) + (not unlikely)]
        numbers = (math.exp(-one[0]), one[0], one[1], one[1] / math.log(K), *one[2:])
        views.append(View(*numbers, region, []))
    return Columns.of(views, K)


@pytest.mark.parametrize("gate", [EntropyGate(), EntropyGate(2.0, 1.5)])
def test_shares(gate: EntropyGate) -> None:
    columns = _columns(0, gate)
    found = shares(columns)
    assert list(found) == [*REGIONS, "all"]
    for index, name in enumerate(REGIONS):
        share, mask = found[name], columns.region == index
        assert share.tokens == int(mask.sum())
        assert share.of_tokens == share.tokens / len(columns)
        learned = columns.gate * columns.gradient
        for value, of in [
            (share.of_loss, columns.nll),
            (share.of_gradient, columns.gradient),
            (share.learned, learned),
        ]:
            assert value == pytest.approx(float(of[mask].sum() / of.sum()))
    assert found["open"].tokens == 0 and math.isnan(found["open"].mean_gate)
    parts = [found[name] for name in REGIONS]
    assert sum(share.tokens for share in parts) == found["all"].tokens == len(columns)
    assert sum(share.learned for share in parts) == pytest.approx(1)


@pytest.mark.parametrize("gate", [EntropyGate(), EntropyGate(2.0, 1.5)])
def test_kept(gate: EntropyGate) -> None:
    """EAFT's line is of the gate that was asked for, and says so."""
    columns = _columns(1, gate)
    found = kept(columns, gate)
    assert list(found) == list(GATES)
    title = "EAFT" if gate == EntropyGate() else "EAFT, alpha 2, normalizer 1.5"
    assert found["eaft"].title == title
    entropy = columns.normalized_entropy * math.log(K)
    for name, one in found.items():
        used = gate if name == "eaft" else GATES[name]
        norm = used.for_k(K)(columns.nll, entropy) * columns.gradient
        for index, region in enumerate(REGIONS[:-1]):
            mask = columns.region == index
            expected = float(norm[mask].sum() / columns.gradient[mask].sum())
            assert one.kept[region] == pytest.approx(expected)
            assert one.share[region] == pytest.approx(float(norm[mask].sum() / norm.sum()))
        assert math.isnan(one.kept["open"]) and one.share["all"] == pytest.approx(1)
    assert "eaft3" not in kept(_columns(1, GATES["eaft3"]), GATES["eaft3"])
    assert found["sft"].kept["conflict"] == 1 and found["mask"].kept["conflict"] == 0


@pytest.mark.parametrize("gate", [EntropyGate(), EntropyGate(2.0, 1.5)])
def test_carriers(gate: EntropyGate) -> None:
    """As many tokens as are needed, and no fewer."""
    columns = _columns(4, gate)
    for name, (_, found) in carriers(columns, gate).items():
        used = gate if name == "eaft" else GATES[name]
        score = used.for_k(K)(columns.nll, columns.entropy) * (1 - torch.exp(-columns.nll))
        largest = score.sort(descending=True)[0]
        for part, share in zip(CARRIED, found, strict=True):
            count = round(share * len(columns))
            assert largest[:count].sum() >= part * score.sum() * (1 - 1e-12)
            assert largest[: count - 1].sum() < part * score.sum()


def test_moved() -> None:
    first, second = (_columns(seed, EntropyGate()) for seed in (2, 3))
    found = moved(first, second)
    for index, name in enumerate(REGIONS):
        mask = first.region == index
        move = found[name]
        assert move.tokens == int(mask.sum()) == sum(move.to.values())
        for other, to in enumerate(REGIONS):
            assert move.to[to] == int((mask & (second.region == other)).sum())
        if move.tokens:
            expected = [float(columns.nll[mask].mean()) for columns in (first, second)]
            assert list(move.nll) == pytest.approx(expected)
    assert math.isnan(found["open"].nll[0])
