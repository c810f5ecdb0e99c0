"""Rows whose elements lie beyond 2^31 and 2^32 of their tensor's start."""

from __future__ import annotations

import pytest
import torch
from inputs import make, same_bits, sparse_elements, upstream_of
from layouts import each_limit, far_rows
from parity import outcome

import eaft_ext

ops = torch.ops.eaft_ext

V = 4200


@pytest.mark.parametrize("num_rows", [3, 9], ids=["few_rows", "many_rows"])
@each_limit
def test_far_rows(limit: int, num_rows: int) -> None:
    step = limit // (num_rows - 1) + 8
    buffer = sparse_elements((num_rows - 1) * step + V)
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
    _, _, _, gate, row_max, log_sum, _ = ops.gated_ce_forward(logits, *arguments)
    ops.gated_ce_backward_(upstream * gate, logits, labels, row_max, log_sum, -100)
    assert same_bits(logits, expected.gradient)


@each_limit
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
