"""What must agree, mostly in every bit: runs, thread counts, divisions of the work, operators."""

from __future__ import annotations

import pytest
import torch
from inputs import agree, dtype_name, make, same_bits, threads, upstream_of
from parity import Outcome, outcome
from torch import Tensor

import eaft_ext

ops = torch.ops.eaft_ext

VOCAB_SIZES = [33, 4097, 50257]


def _everything(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    gated = outcome(eaft_ext.gated_ce, logits, labels, upstream_of(labels), reduction="none")
    return (*gated, *eaft_ext.topk(logits, min(20, logits.size(-1))))


def _assert_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...], what: str) -> None:
    names = (*Outcome._fields, "top_values", "top_indices")
    for name, one, other in zip(names, a, b, strict=True):
        assert same_bits(one, other), f"{name} differs {what}"


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_run_to_run(device: str, dtype: torch.dtype, vocab_size: int) -> None:
    logits, labels = make(9, vocab_size, dtype, device=device, ignored=0.1)
    first = _everything(logits, labels)
    for _ in range(3):
        _assert_same(first, _everything(logits.clone(), labels), "from run to run")


@pytest.mark.parametrize("num_rows", [1, 3, 9])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_thread_counts(dtype: torch.dtype, vocab_size: int, num_rows: int) -> None:
    """9 rows are many for one and two threads, and few for three and four."""
    logits, labels = make(num_rows, vocab_size, dtype, ignored=0.1)
    with threads(1):
        first = _everything(logits, labels)
    for count in (2, 3, 4):
        with threads(count):
            _assert_same(first, _everything(logits, labels), f"with {count} threads")


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_few_rows_are_a_part_of_many(device: str, dtype: torch.dtype, vocab_size: int) -> None:
    logits, labels = make(12, vocab_size, dtype, device=device, ignored=0.1)
    upstream = upstream_of(labels)
    many = outcome(eaft_ext.gated_ce, logits, labels, upstream, reduction="none")
    for rows in (slice(0, 1), slice(4, 7), slice(11, 12)):
        few = outcome(
            eaft_ext.gated_ce, logits[rows], labels[rows], upstream[rows], reduction="none"
        )
        for name, part, whole in zip(Outcome._fields, few, many, strict=True):
            assert agree(part, whole[rows]), f"{name} of rows {rows} differs"


@pytest.mark.parametrize("kept", [[39], [0, 17, 38], [*range(30, 40)]], ids=["1", "3", "10"])
@pytest.mark.parametrize("vocab_size", [33, 4097])
def test_long_runs_of_ignored_labels(
    device: str, dtype: torch.dtype, vocab_size: int, kept: list[int]
) -> None:
    """As padding leaves them: the rows with work are few, or many, among more without."""
    logits, labels = make(40, vocab_size, dtype, device=device)
    upstream = upstream_of(labels)
    upstream[1] = 2.0
    expected = outcome(
        eaft_ext.gated_ce, logits[kept], labels[kept], upstream[kept], reduction="none"
    )
    others = torch.ones(40, dtype=torch.bool)
    others[kept] = False
    labels[others] = -100
    found = outcome(eaft_ext.gated_ce, logits, labels, upstream, reduction="none")
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert agree(a[kept], b), name
        assert not a[others].any(), name


@pytest.mark.parametrize("gate", [("entropy", [2.0]), ("focal", [0.5]), ("none", [])])
@pytest.mark.parametrize("num_rows", [3, 20], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("vocab_size", [5, *VOCAB_SIZES])
@pytest.mark.operator("gated_ce_forward_with_grad")
def test_forward_with_grad_is_forward_then_backward(
    device: str, dtype: torch.dtype, vocab_size: int, num_rows: int, gate: tuple[str, list[float]]
) -> None:
    logits, labels = make(num_rows, vocab_size, dtype, device=device, ignored=0.2)
    upstream = upstream_of(labels, torch.float64 if dtype == torch.float64 else torch.float32)
    *stats, row_max, log_sum, extra = ops.gated_ce_forward(logits, labels, 20, *gate, -100)
    weight = upstream * stats[3]
    stats.append(extra)
    gradient = ops.gated_ce_backward(weight, logits, labels, row_max, log_sum, -100)

    *fused_stats, fused_gradient = ops.gated_ce_forward_with_grad(
        upstream, logits, labels, 20, *gate, -100
    )
    assert agree(gradient, fused_gradient)
    for fused, split in zip(fused_stats, stats, strict=True):
        assert agree(fused, split)

    overwritten = logits.clone()
    ops.gated_ce_backward_(weight, overwritten, labels, row_max, log_sum, -100)
    assert agree(gradient, overwritten)

    overwritten = logits.clone()
    in_place_stats = ops.gated_ce_forward_with_grad_(upstream, overwritten, labels, 20, *gate, -100)
    assert agree(gradient, overwritten)
    for fused, split in zip(in_place_stats, stats, strict=True):
        assert agree(fused, split)


@pytest.mark.parametrize("vocab_size", [7, 1000, 4097])
@pytest.mark.parametrize("half_type", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_sixteen_bits_are_float32_rounded_once(
    device: str, half_type: torch.dtype, vocab_size: int
) -> None:
    """Gradients over the whole range of the type: subnormal ones, ties, and beyond the largest."""
    logits, labels = make(64, vocab_size, half_type, device=device)
    upstream = 2.0 ** torch.linspace(-30, 30, 64, device=device)
    narrow, wide = (
        outcome(eaft_ext.gated_ce, x, labels, upstream, reduction="none")
        for x in (logits, logits.float())
    )
    for name in ("loss", "nll", "entropy", "gate"):
        assert agree(getattr(narrow, name), getattr(wide, name)), name
    assert agree(narrow.gradient, wide.gradient.to(half_type))
    if half_type == torch.float16:
        assert narrow.gradient.isinf().any()


@pytest.mark.parametrize("half_type", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_every_sixteen_bit_logit_is_read_as_it_is(device: str, half_type: torch.dtype) -> None:
    """Each number of the type is once the only finite logit of a row, and so its maximum."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(half_type)
    numbers = numbers[numbers.isfinite()].to(device)
    logits = torch.stack([numbers, torch.full_like(numbers, -torch.inf)], 1)
    labels = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    _, nll, _, _, row_max, log_sum, _ = ops.gated_ce_forward(logits, labels, 2, "none", [], -100)
    assert torch.equal(row_max, numbers.float())
    assert not nll.any() and not log_sum.any()
