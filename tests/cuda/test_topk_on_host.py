"""The CUDA kernels of ``topk``, on the host: the order of a stable sort, the bits of the logits."""

from __future__ import annotations

import math

import kernels_on_host
import pytest
import torch
from inputs import TRAPS, bits, make
from layouts import READ_IN_PLACE, each_far_layout, each_limit, far_rows
from layouts import build as build_layout
from test_kernels_on_host import CROWDS, crowd, each_dtype
from torch import Tensor

pytestmark = kernels_on_host.MARKS


def assert_topk(logits: Tensor, *ks: int, seeds: int = 1) -> None:
    """In any number of spans, and in any order of threads."""
    # The lowest index first among equals, and NaN before every number.
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    for k in ks:
        for seed, num_spans in enumerate((1, 2, 7) * seeds):
            values, indices = kernels_on_host.topk(logits, k, num_spans=num_spans, seed=seed)
            assert torch.equal(indices, order[..., :k]), f"k {k}, {num_spans} spans, seed {seed}"
            assert torch.equal(bits(values), bits(logits).gather(-1, indices))


@each_dtype
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 33, 128, 129, 1000, 4099])
def test_vocab_sizes(dtype: torch.dtype, vocab_size: int) -> None:
    """From 1 to all."""
    logits, _ = make(3, vocab_size, dtype)
    assert_topk(logits, *{min(k, vocab_size) for k in (1, 2, 20, 33, 127, 128)})


@each_dtype
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(dtype: torch.dtype, trap: str) -> None:
    logits, _ = make(3, 20011, dtype, trap=trap)
    assert_topk(logits, 1, 20, 128)


@each_dtype
@pytest.mark.parametrize("name", CROWDS)
def test_crowds(dtype: torch.dtype, name: str) -> None:
    logits, _ = crowd(name, dtype)
    assert_topk(logits, 1, 20)
    assert_topk(logits, 128, seeds=2)


@pytest.mark.parametrize("trap", ["normal", "many_ties", "ascending"])
def test_full_size(trap: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, _ = make(2, 151936, dtype, trap=trap)
        assert_topk(logits, 20)


@each_dtype
@pytest.mark.parametrize("name", READ_IN_PLACE)
def test_layouts(dtype: torch.dtype, name: str) -> None:
    _, logits, _ = build_layout(name, dtype, "cpu")
    assert_topk(logits, 20)


@each_dtype
def test_ties(dtype: torch.dtype) -> None:
    """The lowest index first: also at the k-th place, across spans, and of zeros of both signs."""
    logits = torch.zeros(6, 9001, dtype=dtype)
    logits[0, 6000::1000] = 1
    logits[1, ::2] = -0.0
    logits[2, 1::2] = -0.0
    logits[3] = -math.inf
    logits[4, 4501:] = math.inf
    logits[5, -1], logits[5, :-200] = -0.0, -1
    assert_topk(logits, 1, 2, 128, seeds=2)


@each_dtype
@pytest.mark.parametrize("vocab_size", [7, 127])
def test_all_of_a_row_in_order(dtype: torch.dtype, vocab_size: int) -> None:
    """Nothing is larger than -inf but one logit, wherever that is."""
    logits = torch.full((vocab_size, vocab_size), -math.inf, dtype=dtype)
    logits.fill_diagonal_(1)
    assert_topk(logits, vocab_size, vocab_size - 1)


@each_dtype
@pytest.mark.parametrize("count", [1, 5, 129, 4000, 4300])
def test_nan(dtype: torch.dtype, count: int) -> None:
    """Before +inf, whatever its sign and payload, which are kept."""
    logits, _ = make(3, 4300, dtype)
    patterns = torch.tensor([0x7FC0_0001, -0x3F_FFFF, 0x7FFF_FFFF, -1], dtype=torch.int32)
    if dtype != torch.float32:
        patterns = torch.tensor([0x7FC1, -0x3F, 0x7FFF, -1], dtype=torch.int16)
    where = torch.randperm(4300)[:count]
    logits[1, where] = patterns.view(dtype).repeat(count)[:count]
    logits[0, 77] = logits[1, 78] = math.inf
    assert_topk(logits, 1, 20, 128)


@each_limit
@each_far_layout
def test_far_rows(dims: int, limit: int) -> None:
    """Their elements lie beyond what 31 or 32 bits can count."""
    logits = far_rows(dims, limit, 4099)
    logits.copy_(make(logits.shape[:-1].numel(), 4099, torch.bfloat16)[0].view_as(logits))
    assert_topk(logits, 20)


def test_nothing() -> None:
    values, indices = kernels_on_host.topk(torch.empty(0, 2, 300), 5)
    assert values.shape == indices.shape == (0, 2, 5)
