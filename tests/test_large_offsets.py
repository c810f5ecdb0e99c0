"""Rows whose elements lie beyond 2^31 and 2^32 of their tensor's start."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from inputs import make, same_bits, upstream_of
from parity import outcome
from torch import Tensor

import eaft_ext

ops = torch.ops.eaft_ext

V = 4200


def _sparse_elements(count: int) -> Tensor:
    """bfloat16 of which only what is written to takes memory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs memory that is not backed until it is written, as on Linux")
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        memory = mmap.mmap(-1, 2 * count, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for {2 * count >> 30} GB: {error}")
    return torch.frombuffer(memory, dtype=torch.bfloat16)


def far_rows(dims: int, limit: int, vocab_size: int) -> Tensor:
    """(3, V) or (2, 3, V): rows that far apart, in the fastest dimension. All of one alignment."""
    memory = _sparse_elements(2 * limit + 2 * vocab_size + 16)
    next_block = (vocab_size + 15) // 8 * 8
    shape, strides = ((2, 3, vocab_size), (next_block, limit, 1))
    return memory.as_strided(shape[2 - dims :], strides[2 - dims :])


each_far_layout = pytest.mark.parametrize("dims", [1, 2], ids=["rows", "blocks_of_rows"])
each_limit = pytest.mark.parametrize("limit", [2**31, 2**32], ids=["2^31", "2^32"])


@pytest.mark.parametrize("num_rows", [3, 9], ids=["few_rows", "many_rows"])
@each_limit
def test_far_rows(limit: int, num_rows: int) -> None:
    step = limit // (num_rows - 1) + 8
    buffer = _sparse_elements((num_rows - 1) * step + V)
    logits = buffer.as_strided((num_rows, V), (step, 1))
    plain, labels = make(num_rows, V, torch.bfloat16)
    logits.copy_(plain)
    assert (num_rows - 1) * logits.stride(0) >= limit
    upstream = upstream_of(labels)
    upstream[1] = 2.0
    expected = outcome(eaft_ext.gated_ce, plain, labels, upstream, reduction="none")
    found = outcome(eaft_ext.gated_ce, logits, labels, upstream, reduction="none")
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)
    for a, b in zip(eaft_ext.topk(logits, 20), eaft_ext.topk(plain, 20), strict=True):
        assert torch.equal(a, b)

    arguments = (labels, 20, "entropy", [1.0], -100)
    ops.gated_ce_forward_with_grad_(upstream, logits, *arguments)
    assert same_bits(logits, expected.gradient)
    logits.copy_(plain)
    _, _, _, gate, row_max, log_sum = ops.gated_ce_forward(logits, *arguments)
    ops.gated_ce_backward_(upstream * gate, logits, labels, row_max, log_sum, -100)
    assert same_bits(logits, expected.gradient)


@pytest.mark.parametrize("limit", [2**31, 2**32], ids=["2^31", "2^32"])
def test_many_elements(limit: int) -> None:
    """More of them than fit in 31 or 32 bits, one row in memory, and few labels that count."""
    row, _ = make(1, 151936)
    num_rows = limit // 151936 + 10
    labels = torch.full((num_rows,), -100)
    where = torch.tensor([0, 1, num_rows // 2, num_rows - 1])
    labels[where] = torch.tensor([3, 151935, 70000, 9])
    logits = row.expand(num_rows, -1)
    assert logits.numel() > limit
    loss, stats = eaft_ext.gated_ce(logits, labels, reduction="none", return_stats=True)
    expected = eaft_ext.gated_ce(row.expand(4, -1), labels[where], reduction="none")
    assert same_bits(loss[where], expected)
    assert torch.count_nonzero(loss) == 4 and stats.valid.sum() == 4


@each_limit
def test_far_rows_of_blocks(limit: int) -> None:
    """A row's number is divided by a size, and the rest times a stride is beyond 32 bits."""
    logits = far_rows(2, limit, V)
    plain, labels = (t.unflatten(0, (2, 3)) for t in make(6, V, torch.bfloat16))
    logits.copy_(plain)
    upstream = upstream_of(labels)
    expected = outcome(eaft_ext.gated_ce, plain, labels, upstream, reduction="none")
    found = outcome(eaft_ext.gated_ce, logits, labels, upstream, reduction="none")
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)
    for a, b in zip(eaft_ext.topk(logits, 20), eaft_ext.topk(plain, 20), strict=True):
        assert torch.equal(a, b)
    ops.gated_ce_forward_with_grad_(upstream, logits, labels, 20, "entropy", [1.0], -100)
    assert same_bits(logits, expected.gradient)
