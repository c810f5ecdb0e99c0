"""The k largest logits: the values of torch.topk, the order of a stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import TRAPS, bits, make, same_bits
from torch import Tensor

from eaft_ext import topk

pytestmark = [pytest.mark.operator("topk"), pytest.mark.usefixtures("poisoned_memory")]


def _assert_topk(logits: Tensor, *ks: int) -> None:
    # A stable sort has the lowest index first among equals, and NaN before every number.
    expected = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    for k in ks:
        values, indices = topk(logits, k)
        assert values.dtype == logits.dtype and indices.dtype == torch.int64
        assert values.shape == indices.shape == (*logits.shape[:-1], k)
        assert torch.equal(indices, expected[..., :k])
        same = bits(values) == bits(logits).gather(-1, indices)
        assert (same | values.isnan()).all()
        torch.testing.assert_close(
            values, logits.topk(k).values, rtol=0, atol=0, equal_nan=True, msg="torch.topk"
        )


@pytest.mark.parametrize("num_rows", [3, 9], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 31, 127, 128, 129, 4096, 4097, 50257])
def test_vocab_sizes(device: str, dtype: torch.dtype, vocab_size: int, num_rows: int) -> None:
    logits, _ = make(num_rows, vocab_size, dtype, device=device)
    _assert_topk(logits, *{min(k, vocab_size) for k in (1, 2, 20, 64, 127, 128)})


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("vocab_size", [1, 5, 4097])
def test_without_kernels(dtype: torch.dtype, vocab_size: int) -> None:
    logits, _ = make(9, vocab_size, dtype, trap="many_ties")
    logits[2, vocab_size // 2] = math.nan
    _assert_topk(logits, *{min(k, vocab_size) for k in (1, 20, 128)})


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(device: str, dtype: torch.dtype, trap: str) -> None:
    """Ties among them, within 16-bit logits and at the k-th place."""
    logits, _ = make(9, 8200, dtype, trap=trap, device=device)
    _assert_topk(logits, 1, 8, 20, 128)


def test_full_size(device: str) -> None:
    for trap in ("normal", "many_ties", "ascending", "largest_one_in_a_group"):
        logits, _ = make(2, 151936, torch.bfloat16, trap=trap, device=device)
        _assert_topk(logits, 20, 128)


@pytest.mark.parametrize("k", [1, 2, 7, 128])
def test_long_runs_of_equals(device: str, dtype: torch.dtype, k: int) -> None:
    """More equals than any buffer holds, before and after a few larger ones."""
    logits = torch.zeros(4, 20000, dtype=dtype, device=device)
    logits[0, -3:] = 1
    logits[1, 10000:10003] = 1
    logits[2, 3::128] = 1
    logits[3] = -math.inf
    _assert_topk(logits, k)


def test_zeros_of_both_signs_are_equal(device: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-0.0, 0.0, -1.0, -0.0, 0.0]], dtype=dtype, device=device)
    values, indices = topk(logits, 4)
    assert indices.tolist() == [[0, 1, 3, 4]]
    assert same_bits(values, logits[:, [0, 1, 3, 4]])


@pytest.mark.parametrize("num_rows", [3, 9], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("count", [1, 5, 4000, 4300])
def test_nan_comes_first(device: str, dtype: torch.dtype, count: int, num_rows: int) -> None:
    """Before +inf too, the lowest index first; other rows are as ever."""
    logits, _ = make(num_rows, 4300, dtype, device=device)
    where = torch.randperm(4300)[:count].to(device)
    logits[1, where] = math.nan
    logits[0, 77] = logits[1, 78] = math.inf
    _assert_topk(logits, 1, 20, 128)


def test_nan_bits_are_kept(device: str) -> None:
    patterns = torch.tensor([0x7FC00001, -0x3FFFFF], dtype=torch.int32, device=device)
    logits = torch.zeros(1, 300, device=device)
    logits[0, [5, 200]] = patterns.view(torch.float32)
    values, indices = topk(logits, 3)
    assert indices.tolist() == [[5, 200, 0]]
    assert torch.equal(bits(values)[0, :2], patterns)


@pytest.mark.parametrize("shape", [(9,), (0, 9), (2, 0, 9), (2, 3, 4, 9)], ids=str)
def test_shapes(device: str, shape: tuple[int, ...]) -> None:
    _assert_topk(torch.randn(shape, device=device), 4)


def test_gradient(device: str, dtype: torch.dtype) -> None:
    """It flows back to where the values were, and nowhere else."""
    logits, _ = make(9, 300, dtype, device=device)
    upstream = torch.randn(9, 20, device=device).to(dtype)
    found = logits.clone().requires_grad_()
    topk(found, 20)[0].backward(upstream)
    assert found.grad is not None
    _, indices = topk(logits, 20)
    assert torch.equal(found.grad.gather(1, indices), upstream)
    assert torch.count_nonzero(found.grad) == 9 * 20
