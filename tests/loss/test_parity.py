"""Loss, statistics and gradient against the reference, over dtypes, sizes, gates and traps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gate_cases import FAMILY, GATES
from inputs import TRAPS, make
from parity import assert_parity

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VOCAB_SIZES = [1, 2, 5, 31, 33, 127, 128, 129, 4095, 4096, 4097, 50257, 151936]

# With fewer than 4 rows for each of the 2 threads they share the blocks of a row.
NUM_ROWS = {"few_rows": 3, "many_rows": 9}


@pytest.fixture(params=NUM_ROWS.values(), ids=NUM_ROWS.keys())
def num_rows(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_vocab_sizes(device: str, dtype: torch.dtype, vocab_size: int, num_rows: int) -> None:
    assert_parity(*make(num_rows, vocab_size, dtype, device=device, ignored=0.2))


@pytest.mark.parametrize("vocab_size", [5, 130, 8200])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(device: str, dtype: torch.dtype, trap: str, vocab_size: int) -> None:
    assert_parity(*make(9, vocab_size, dtype, trap=trap, device=device))


@pytest.mark.parametrize("vocab_size", [1, 5, 130, 8200])
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_family(
    device: str, dtype: torch.dtype, vocab_size: int, num_rows: int, family: dict[str, Any]
) -> None:
    assert_parity(*make(num_rows, vocab_size, dtype, device=device, ignored=0.2), **family)


@pytest.mark.parametrize("family", FAMILY, ids=str)
@pytest.mark.parametrize("trap", TRAPS)
def test_traps_of_the_family(
    device: str, dtype: torch.dtype, trap: str, family: dict[str, Any]
) -> None:
    if dtype == torch.float64 and trap in ("far_from_zero", "masked_with_lowest_float16"):
        # Of numbers of 3e4 a mean has no digits left below 1e-12, and of their squares below 1e-7.
        left_out = ("z_loss", "label_smoothing")
        family = {name: value for name, value in family.items() if name not in left_out}
    assert_parity(*make(9, 8200, dtype, trap=trap, device=device), **family)


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_at_full_size(device: str, trap: str) -> None:
    assert_parity(*make(2, 151936, torch.bfloat16, trap=trap, device=device))


@pytest.mark.parametrize("vocab_size", [5, 129, 4097, 20000])
@pytest.mark.parametrize("k", [2, 8, 20, 64, 128])
def test_k(device: str, k: int, vocab_size: int, num_rows: int) -> None:
    assert_parity(*make(num_rows, vocab_size, device=device), k=k)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: getattr(gate, "__name__", str(gate)))
def test_gates(device: str, dtype: torch.dtype, gate: Any) -> None:
    assert_parity(*make(12, 300, dtype, device=device, ignored=0.2), gate=gate)


@pytest.mark.parametrize(
    ("reduction", "num_items"),
    [("mean", None), ("mean", 7), ("sum", None)],
    ids=["mean-own_count", "mean-given_count", "sum-own_count"],
)
def test_reductions(device: str, dtype: torch.dtype, reduction: str, num_items: int | None) -> None:
    logits, labels = make(12, 300, dtype, device=device, ignored=0.2)
    assert_parity(logits, labels, reduction=reduction, num_items_in_batch=num_items)
