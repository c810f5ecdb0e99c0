"""What a shard tells the others, what they make of it, and what takes no part in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from inputs import TRAPS, agree, make, same_bits, upstream_of
from parity import Outcome
from torch import Tensor
from vocab_shards import divide, losses_of_shards, outcome_of_shards, shards_at

from eaft_ext import EntropyGate, HardGate, NoGate, reference
from eaft_ext.parallel import _agreement

ops = torch.ops.eaft_ext

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.operator("gated_ce_merge"),
]

LABEL, REST, TARGET, TOP = 0, 1, 2, 3
"""Where a partial has what."""


def _partial(route: str, logits: Tensor, labels: Tensor, k: int, start: int) -> Tensor:
    if route == "kernel":
        return ops.gated_ce_partial(logits, labels, k, start, None, -100)
    return reference.shard_partial(logits, labels, k, start)


@pytest.mark.parametrize("route", ["kernel", "reference"])
def test_a_partial_by_hand(device: str, dtype: torch.dtype, route: str) -> None:
    """Words 10, 11 and 12 of a vocabulary; the labels are inside, before and behind, or ignored."""
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[1.0, 2.0, -inf]] * 7 + [[-inf] * 3], dtype=dtype, device=device)
    labels = torch.tensor([10, 11, 12, 9, 13, -1, -100, 10], device=device)
    found = _partial(route, logits, labels, 4, 10)
    e = math.exp(-1)
    expected = [
        [10, e, 1, 2, 1, -inf, nan],
        [11, e, 2, 2, 1, -inf, nan],
        [12, e, -inf, 2, 1, -inf, nan],
        [9, e, nan, 2, 1, -inf, nan],
        [13, e, nan, 2, 1, -inf, nan],
        [-1, e, nan, 2, 1, -inf, nan],
        [-100, -1, nan, nan, nan, nan, nan],
        [10, -1, -inf, -inf, -inf, -inf, nan],
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide and found.is_contiguous()
    rounding = 2 * torch.finfo(wide).eps
    torch.testing.assert_close(
        found.cpu(), torch.tensor(expected, dtype=wide), rtol=rounding, atol=0, equal_nan=True
    )


def _assert_same_partials(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    for field in (LABEL, TARGET, slice(TOP, None)):
        torch.testing.assert_close(
            found[..., field], expected[..., field], rtol=0, atol=0, equal_nan=True
        )
    epsilon = torch.finfo(found.dtype).eps
    # A kernel may have added some of the rest to the 1 of the largest.
    torch.testing.assert_close(
        found[..., REST], expected[..., REST], rtol=32 * epsilon, atol=4 * epsilon, equal_nan=True
    )


@pytest.mark.parametrize("columns", [1, 19, 20, 21, 130, 4097])
@pytest.mark.parametrize("trap", TRAPS)
def test_kernel_and_reference_tell_the_same(
    device: str, dtype: torch.dtype, trap: str, columns: int
) -> None:
    """k + 3 numbers a token, whether the shard has as many columns or not."""
    for num_rows in (2, 9):
        logits, labels = make(num_rows, columns, dtype, trap=trap, device=device)
        labels += 700
        labels[1] = 699 if num_rows == 2 else 700 + columns
        labels[-1] = -100 if num_rows == 9 else labels[-1]
        for k in (2, 20, 128):
            found = ops.gated_ce_partial(logits, labels, k, 700, None, -100)
            assert found.shape == (num_rows, k + 3)
            _assert_same_partials(found, reference.shard_partial(logits, labels, k, 700))


def test_no_label_wraps_around_into_a_shard(device: str) -> None:
    """However far below its first word."""
    logits, labels = make(4, 60, device=device)
    found = ops.gated_ce_partial(logits, labels.fill_(-(2**63)), 4, 2**63 - 61, None, -100)
    assert found[:, TARGET].isnan().all()


@pytest.mark.parametrize("num_words", [0, 1, 19, 20, 21, 59, 60, 61, 2**40])
@pytest.mark.parametrize("start", [0, 1000])
def test_a_partial_leaves_padding_out(
    device: str, dtype: torch.dtype, start: int, num_words: int
) -> None:
    """A shard with padding is one without these columns, whatever is in them."""
    logits, labels = make(9, 60, dtype, device=device, ignored=0.2)
    labels += start
    words = logits[:, :num_words].clone()
    logits[:, num_words:] = math.nan
    found = ops.gated_ce_partial(logits, labels, 20, start, start + num_words, -100)
    expected = ops.gated_ce_partial(words, labels, 20, start, None, -100)
    assert agree(found.nan_to_num(nan=7.5), expected.nan_to_num(nan=7.5))
    assert torch.equal(found.isnan(), expected.isnan())
    _assert_same_partials(found, reference.shard_partial(words, labels, 20, start))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (2, 3), ()], ids=str)
@pytest.mark.parametrize("columns", [0, 7])
def test_shapes_of_partials(device: str, shape: tuple[int, ...], columns: int) -> None:
    logits = torch.randn(*shape, columns, device=device)
    labels = torch.full(shape, 3, device=device)
    found = ops.gated_ce_partial(logits, labels, 20, 0, None, -100)
    assert found.shape == (*shape, 23)
    _assert_same_partials(found, reference.shard_partial(logits, labels, 20, 0))


@pytest.mark.parametrize("gate", [("entropy", [1.0]), ("focal", [2.0]), ("none", [])])
@pytest.mark.parametrize("vocab_size", [5, 130, 8200])
def test_merge_gives_what_the_forward_of_all_gives(
    device: str, dtype: torch.dtype, vocab_size: int, gate: tuple[str, list[float]]
) -> None:
    """Also maximum and log-sum, which the backward is made from."""
    logits, labels = make(40, vocab_size, dtype, device=device, ignored=0.2)
    parts = [
        (x, ops.gated_ce_partial(x, labels, 20, shard.start, None, -100))
        for x, shard in shards_at(logits, divide(vocab_size, 3))
    ]
    partials = torch.stack([partial for _, partial in parts])
    expected = ops.gated_ce_forward(logits, labels, 20, *gate, -100)
    found = [ops.gated_ce_merge(x, labels, partials, 20, *gate, -100, 0, None) for x, _ in parts]
    epsilon = torch.finfo(expected[0].dtype).eps
    for value, *others, wanted in zip(*found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=8 * epsilon, atol=8 * epsilon)
        assert all(same_bits(other, value) for other in others)
    assert same_bits(found[0][4], expected[4])
    spread = torch.stack([partials, partials], -1).transpose(0, 1).contiguous().transpose(0, 1)
    again = ops.gated_ce_merge(logits, labels, spread[..., 1], 20, *gate, -100, 0, None)
    assert all(same_bits(a, b) for a, b in zip(again, found[0], strict=True))


@pytest.mark.parametrize("start", [0, 3, 150, 290])
@pytest.mark.parametrize("width", [0, 1, 150])
@pytest.mark.parametrize("num_rows", [3, 12], ids=["few_rows", "many_rows"])
def test_backward_of_a_shard_is_a_part_of_the_whole_one(
    device: str, dtype: torch.dtype, num_rows: int, width: int, start: int
) -> None:
    logits, labels = make(num_rows, 300, dtype, device=device, ignored=0.2)
    upstream = upstream_of(labels)
    *_, row_max, log_sum, _ = ops.gated_ce_forward(logits, labels, 20, "none", [], -100)
    whole = ops.gated_ce_backward(upstream, logits, labels, row_max, log_sum, -100)
    saved = (labels, row_max, log_sum, -100)
    part = logits[:, start : start + width]
    expected = whole[:, start : start + width]
    found = ops.gated_ce_backward(upstream, part, *saved, start)
    assert agree(found, expected)
    if width == 0:
        return
    num_words = part.size(1) // 2
    padded = part.clone()
    padded[:, num_words:] = math.nan
    found = ops.gated_ce_backward(upstream, padded, *saved, start, start + num_words)
    assert agree(found[:, :num_words], expected[:, :num_words])
    assert same_bits(found[:, num_words:], torch.zeros_like(found[:, num_words:]))
    version = padded._version
    ops.gated_ce_backward_(upstream, padded, *saved, start, start + num_words)
    assert agree(padded, found) and padded._version > version


PADDED = {
    "one_column": ([20, 20, 20], 59),
    "last_of_its_shard": ([20, 20, 20], 41),
    "a_whole_shard": ([20, 20, 20], 40),
    "more_than_a_shard": ([20, 20, 20], 33),
    "all_but_one_shard": ([20, 20, 20], 5),
    "uneven": ([30, 1, 0, 29], 30),
}


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("widths", "vocab_size"), PADDED.values(), ids=PADDED.keys())
def test_padding_takes_no_part(
    device: str, dtype: torch.dtype, widths: list[int], vocab_size: int
) -> None:
    """The same bits as without the padding, which has a gradient of 0 and is NaN here."""
    logits, labels = make(12, vocab_size, dtype, device=device, ignored=0.2)
    upstream = upstream_of(labels)
    left = vocab_size
    words = []
    for width in widths:
        words.append(min(width, left))
        left -= words[-1]
    expected = outcome_of_shards(logits, labels, upstream, words, vocab_size=vocab_size)
    padded = torch.full((12, sum(widths)), math.nan, dtype=dtype, device=device)
    padded[:, :vocab_size] = logits
    found = outcome_of_shards(padded, labels, upstream, widths, vocab_size=vocab_size)
    gradient, padding = found.gradient.split([vocab_size, sum(widths) - vocab_size], -1)
    for name, a, b in zip(
        Outcome._fields, found._replace(gradient=gradient), expected, strict=True
    ):
        assert agree(a, b), name
    assert same_bits(padding, torch.zeros_like(padding))


@pytest.mark.usefixtures("route")
def test_a_label_in_the_padding_is_nowhere(device: str, dtype: torch.dtype) -> None:
    """NaN for its token alone. (On the CPU the public function raises before.)"""
    logits, labels = make(12, 60, dtype, device=device)
    labels %= 50
    upstream = torch.ones(12, device=device)
    expected = outcome_of_shards(logits, labels, upstream, [20, 20, 20], vocab_size=50)
    for wrong in (50, 59, 60, -1, 2**40):
        labels[2] = wrong
        found = outcome_of_shards(logits, labels, upstream, [20, 20, 20], vocab_size=50)
        _assert_only_row_2_is_nan(found, expected, 50)


def _assert_only_row_2_is_nan(found: Outcome, expected: Outcome, vocab_size: int) -> None:
    others = torch.arange(12) != 2
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert same_bits(a[others], b[others]), f"{name} of another row"
    assert found.loss[2].isnan() and found.nll[2].isnan() and found.entropy[2].isnan()
    assert found.gradient[2, :vocab_size].isnan().all()
    assert not found.gradient[2, vocab_size:].any()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [EntropyGate(), NoGate(), lambda nll, entropy: nll * entropy])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 19, 20, 30, 59])
def test_an_accident_in_a_shard_stays_in_its_row(
    device: str, dtype: torch.dtype, column: int, value: float, gate: Any
) -> None:
    """But reaches that row in all shards, whether the label is there or not."""
    logits, labels = make(12, 60, dtype, device=device)
    upstream = torch.ones(12, device=device)
    for label in (column, 25):
        labels[2] = label
        expected = outcome_of_shards(logits, labels, upstream, [20, 25, 15], gate=gate)
        broken = logits.clone()
        broken[2, column] = value
        found = outcome_of_shards(broken, labels, upstream, [20, 25, 15], gate=gate)
        _assert_only_row_2_is_nan(found, expected, 60)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_shard_of_nan_alone(device: str, dtype: torch.dtype, shard: int) -> None:
    logits, labels = make(12, 60, dtype, device=device)
    upstream = torch.ones(12, device=device)
    expected = outcome_of_shards(logits, labels, upstream, [20, 20, 20])
    logits[2, 20 * shard : 20 * shard + 20] = math.nan
    found = outcome_of_shards(logits, labels, upstream, [20, 20, 20])
    _assert_only_row_2_is_nan(found, expected, 60)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [EntropyGate(), HardGate(0.2), NoGate()], ids=str)
def test_masked_shards_and_masked_labels(device: str, dtype: torch.dtype, gate: Any) -> None:
    """A shard of -inf alone is no accident; an infinite nll is muted only by a gate of 0."""
    logits, labels = make(12, 60, dtype, device=device)
    logits[:, 20:45] = -math.inf
    labels[:6] = 30
    labels[6:] %= 20
    upstream = torch.ones(12, device=device)
    found = outcome_of_shards(logits, labels, upstream, [20, 25, 15], gate=gate)
    assert (found.nll[:6] == math.inf).all() and found.nll[6:].isfinite().all()
    assert found.gradient.isfinite().all()
    assert not found.gradient[6:, 20:45].any()
    at_label = found.gradient[:6, 30].float()
    torch.testing.assert_close(at_label, -found.gate[:6].float(), rtol=1e-2, atol=0)
    infinite = torch.where(found.gate[:6] == 0, 0.0, math.inf)
    assert torch.equal(found.loss[:6], infinite.to(found.loss))


@pytest.mark.usefixtures("route")
def test_no_finite_logit_in_any_shard(device: str, dtype: torch.dtype) -> None:
    """No loss: NaN, for its own row."""
    logits, labels = make(12, 60, dtype, device=device)
    upstream = torch.ones(12, device=device)
    expected = outcome_of_shards(logits, labels, upstream, [20, 40])
    logits[2] = -math.inf
    _assert_only_row_2_is_nan(outcome_of_shards(logits, labels, upstream, [20, 40]), expected, 60)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [EntropyGate(), NoGate()], ids=str)
@pytest.mark.parametrize("fault", ["in_no_shard", "in_two_shards", "labels_differ"])
def test_what_no_process_can_know(device: str, dtype: torch.dtype, fault: str, gate: Any) -> None:
    """Where nothing raises, a token of which the shards tell what cannot be has no loss: NaN."""
    logits, labels = make(12, 60, dtype, device=device)
    labels[2] = 25
    upstream = torch.ones(12, device=device)
    expected = outcome_of_shards(logits, labels, upstream, [20, 25, 15], gate=gate)
    told = labels.clone()
    shards = shards_at(logits, [20, 25, 15])
    if fault == "in_no_shard":
        told[2] = labels[2] = 60
    elif fault == "in_two_shards":  # both are at the same place in the vocabulary
        labels[:] = 3
        labels[2] = 25
        told = labels
        shards = [shards[1], shards[1]]
    else:
        told[2] = 26
    partials = torch.stack(
        [
            reference.shard_partial(x, told if rank else labels, 20, shard.start)
            for rank, (x, shard) in enumerate(shards)
        ]
    )
    row_max, nll = (reference.merge_partials(partials, labels)[i] for i in (2, 0))
    assert nll[2].isnan()
    kernel = ops.gated_ce_merge(logits, labels, partials, 20, "none", [], -100, 0, None)
    assert kernel[0][2].isnan() and kernel[1][2].isnan() and kernel[2][2].isnan()
    assert kernel[5][2].isnan(), "the gradient is made from the log-sum"
    assert same_bits(kernel[4], row_max)
    if fault == "in_two_shards":
        assert kernel[1].isnan().all()
        return
    others = torch.arange(12) != 2
    torch.testing.assert_close(kernel[1][others], expected.nll[others], rtol=1e-5, atol=1e-6)
    found = losses_of_shards(shards, labels, gate=gate)[0]
    assert found.loss[2].isnan() == (fault == "in_no_shard")


@pytest.mark.usefixtures("route")
def test_labels_beyond_what_float32_counts(device: str) -> None:
    """Of a partial's labels the same rounding is compared with."""
    logits, labels = make(4, 60, device=device)
    labels.fill_(2**24 + 1)
    shards = shards_at(logits, [30, 30])
    moved = [(x, shard._replace(start=shard.start + 2**24 - 20)) for x, shard in shards]
    found = losses_of_shards(moved, labels, gate=NoGate())[0]
    expected = losses_of_shards(shards, torch.full_like(labels, 21), gate=NoGate())[0]
    assert same_bits(found.loss, expected.loss)


@pytest.mark.parametrize("route", ["kernel", "reference"])
@pytest.mark.parametrize("columns", [2, 5, 300])
def test_nan_is_in_the_sum_and_not_among_the_largest(columns: int, route: str) -> None:
    logits, _ = make(3, columns)
    labels = torch.tensor([1, 0, 1])
    logits[0, 1] = logits[1, :] = math.nan
    found = _partial(route, logits, labels, 4, 0)
    count = min(4, columns)
    for row in range(3):
        largest = logits[row].nan_to_num(nan=-math.inf).sort(descending=True).values[:count]
        assert torch.equal(found[row, TOP : TOP + count], largest)
        assert found[row, TOP + count :].isnan().all()
    assert found[:, REST].isnan().tolist() == [True, True, False]
    assert found[:, TARGET].isnan().tolist() == [True, True, False]


def test_labels_that_shards_tell_of_differently() -> None:
    """The first one is named that cannot be, unless a NaN among the logits may be why."""
    labels = torch.tensor([[3, -100], [25, 59]])
    logits = torch.randn(2, 2, 60)

    def check(*starts: int, change: Any = None) -> None:
        partials = torch.stack(
            [ops.gated_ce_partial(logits[..., :30], labels, 4, at, None, -100) for at in starts]
        )
        if change:
            change(partials)
        _agreement.check_labels("op", partials, labels, -100)

    check(0, 30)
    with pytest.raises(ValueError, match=r"^op: the label at position \[1, 1\] is 59, in no shard"):
        check(0, 29)
    with pytest.raises(ValueError, match=r"at position \[0, 0\] is 3, in .* processes \[0, 2\]"):
        check(0, 30, 0)
    with pytest.raises(ValueError, match=r"labels at position \[0, 1\] differ: \[-100, 7\] in"):
        check(0, 30, change=lambda partials: partials[1, 0, 1, LABEL].fill_(7))
    check(0, 29, change=lambda partials: partials[0, 1, 1, REST].fill_(math.nan))
