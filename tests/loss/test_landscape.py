"""The plane of probability and entropy: its cells, its regions, and those of the conflicts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eaft_ext import reference
from eaft_ext._conflicts import CONFLICT_ENTROPY, CONFLICT_PROBABILITY, confident_conflicts
from eaft_ext._landscape import CELLS, REGIONS, counts, regions

K = 20


def at(probability: float, normalized_entropy: float, k: int = K) -> tuple[Tensor, Tensor]:
    """nll and entropy of a token."""
    nll = -torch.tensor([probability], dtype=torch.float32).log()
    return nll, torch.tensor([normalized_entropy * math.log(k)])


def cells_of(nll: Tensor, entropy: Tensor, k: int = K) -> list[list[int]]:
    """Rows and columns of the cells with a token."""
    found = counts(nll, entropy, k, torch.ones_like(nll, dtype=torch.bool))
    assert found.shape == (CELLS, CELLS) and found.dtype == torch.int64
    cells: list[list[int]] = found.nonzero().tolist()
    return cells


@pytest.mark.parametrize(
    ("probability", "entropy", "cell"),
    [
        (0.0, 0.0, (0, 0)),
        (1.0, 0.0, (0, CELLS - 1)),
        (0.0, 1.0, (CELLS - 1, 0)),
        (1.0, 1.0, (CELLS - 1, CELLS - 1)),
        (0.51, 0.26, (int(0.26 * CELLS), int(0.51 * CELLS))),
        (0.5, 0.25, (CELLS // 4, CELLS // 2)),  # edges belong to the cell above
        (0.5, 1.0 + 1e-6, (CELLS - 1, CELLS // 2)),  # as rounded
        (1.0 + 1e-6, 0.5, (CELLS // 2, CELLS - 1)),
        (0.5, -1e-7, (0, CELLS // 2)),
    ],
)
def test_a_cell(probability: float, entropy: float, cell: tuple[int, int]) -> None:
    assert cells_of(*at(probability, entropy)) == [list(cell)]


def test_what_is_infinite_is_at_the_edge() -> None:
    infinite = torch.tensor([math.inf])
    assert cells_of(infinite, infinite) == [[CELLS - 1, 0]]
    assert cells_of(-infinite, -infinite) == [[0, CELLS - 1]]


def test_what_is_not_counted() -> None:
    """It is in no cell, not in that of others either."""
    nll = torch.tensor([[0.0, math.nan, 1.0], [1.0, 0.0, 0.0]])
    entropy = torch.tensor([[0.0, 1.0, math.nan], [1.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    found = counts(nll, entropy, K, valid)
    assert found.sum() == 3
    assert found[0, CELLS - 1] == 2
    assert counts(nll, entropy, K, torch.zeros_like(valid)).sum() == 0
    empty = torch.zeros(0)
    assert counts(empty, empty, K, empty.bool()).sum() == 0


@pytest.mark.parametrize("bound", [CONFLICT_PROBABILITY, CONFLICT_ENTROPY])
def test_bounds_of_regions_lie_between_two_cells(bound: float) -> None:
    assert bound * CELLS == pytest.approx(round(bound * CELLS), abs=1e-9)


def test_regions() -> None:
    """Each by a token inside; on a bound it is likely, or not sure."""
    for probability, entropy, region in [
        (0.05, 0.1, "conflict"),
        (0.5, 0.1, "known"),
        (0.05, 0.5, "unlikely"),
        (0.5, 0.5, "open"),
        (0.0, 0.0, "conflict"),
        (1.0, 0.0, "known"),
        (0.0, 1.0, "unlikely"),
        (1.0, 1.0, "open"),
    ]:
        assert REGIONS[int(regions(*at(probability, entropy), K))] == region
    nll = torch.tensor([-math.log(CONFLICT_PROBABILITY)], dtype=torch.float64)
    bound = torch.tensor([CONFLICT_ENTROPY * math.log(K)], dtype=torch.float64)
    assert REGIONS[int(regions(nll, torch.zeros(1), K))] == "known"
    assert REGIONS[int(regions(nll, bound, K))] == "open"
    nan = torch.tensor([math.nan])
    assert REGIONS[int(regions(nan, nan, K))] == "unlikely"


def stats(rows: int = 4000, vocabulary: int = 50) -> reference.TokenStats:
    """Of tokens all over the plane."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(rows, 1, generator=generator) * 12
    logits = torch.randn(rows, vocabulary, generator=generator) * scale
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[: rows // 2] = logits[: rows // 2].argmax(dim=-1)
    labels[::7] = -100
    _, found = reference.gated_ce(logits, labels, K, return_stats=True)
    return found


def test_cells_and_regions_and_conflicts_agree() -> None:
    found = stats()
    nll, entropy, valid = found.nll, found.entropy, found.valid
    of_region = regions(nll, entropy, K)
    conflicts = confident_conflicts(nll, entropy, K)
    assert torch.equal(of_region == REGIONS.index("conflict"), conflicts)

    # Within rounding of a bound a cell and a region may differ.
    probability, normalized = (-nll).exp(), entropy / math.log(K)
    near = (probability - CONFLICT_PROBABILITY).abs() < 1e-6
    near |= (normalized - CONFLICT_ENTROPY).abs() < 1e-6
    assert not (near & valid).any(), "tokens that the test can tell apart"
    cells = counts(nll, entropy, K, valid)
    assert cells.sum() == valid.sum()
    column, row = round(CONFLICT_PROBABILITY * CELLS), round(CONFLICT_ENTROPY * CELLS)
    parts = (
        cells[:row, :column],
        cells[:row, column:],
        cells[row:, :column],
        cells[row:, column:],
    )
    expected = torch.bincount(of_region[valid], minlength=len(REGIONS)).tolist()
    assert [int(part.sum()) for part in parts] == expected
    assert min(expected) > 50, "tokens in each region"


def test_a_vocabulary_of_one() -> None:
    """The model is sure, and of the label."""
    _, found = reference.gated_ce(
        torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), return_stats=True
    )
    assert cells_of(found.nll, found.entropy, k=1) == [[0, CELLS - 1]]
    assert [REGIONS[r] for r in regions(found.nll, found.entropy, 1)] == ["known"] * 3
    assert not confident_conflicts(found.nll, found.entropy, 1).any()


def test_counts_are_exact_where_floats_are_not() -> None:
    """A cell takes more than 2 ** 24 tokens, each of which counts."""
    tokens = 2**24 + 3
    one = torch.zeros(1)
    found = counts(
        one.expand(tokens), one.expand(tokens), K, torch.ones(1, dtype=torch.bool).expand(tokens)
    )
    assert found[0, CELLS - 1] == tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    """In the middle of a cell, where rounding does not leave it."""
    nll, entropy = at(12.5 / CELLS, 24.5 / CELLS)
    assert cells_of(nll.to(dtype), entropy.to(dtype)) == [[24, 12]]


def test_the_host_reads_nothing() -> None:
    """Tensors without values, of which a read raises."""
    with FakeTensorMode():
        nll, entropy = torch.empty(2, 3), torch.empty(2, 3)
        found = counts(nll, entropy, K, torch.empty(2, 3, dtype=torch.bool))
    assert found.shape == (CELLS, CELLS)
