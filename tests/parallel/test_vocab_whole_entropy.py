"""Shards of a vocabulary: the entropy of all logits, and what else is told of a token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from error_model import error_weights
from gate_cases import FAMILY, GATES
from inputs import REFUSAL, TOLD, TRAPS, make, same_bits, upstream_of
from parity import Outcome, assert_same_stats
from tolerances import LOSS_FACTOR, assert_within
from torch import Tensor
from torch import distributed as dist
from vocab_shards import (
    assert_shards_match,
    divide,
    losses_of_shards,
    outcome_of_shards,
    partial_of,
    shards_at,
)

from eaft_ext import (
    EntropyGate,
    Gate,
    NoGate,
    TokenStats,
    gated_ce,
    reference,
    vocab_parallel_gated_ce,
)
from eaft_ext._options import TokenLoss
from eaft_ext.gates import GateFunction
from eaft_ext.parallel._shard import VocabShard, token_losses

ops = torch.ops.eaft_ext

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.operator("gated_ce_merge"),
]

WIDTHS: dict[str, list[int]] = {
    "one": [60],
    "two": [30, 30],
    "three_uneven": divide(60, 3),
    "four": divide(60, 4),
    "first_empty": [0, 40, 20],
    "middle_empty": [40, 0, 20],
    "one_column": [1, 58, 1],
}
each_division = pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
each_k = pytest.mark.parametrize("k", [None, 20])

REST, TARGET, TOP = 1, 2, 3
"""Where a partial has what."""


class _OfK(Gate):
    """A gate of one's own that depends on k, of which there are as many as words."""

    def for_k(self, k: int) -> GateFunction:
        return lambda nll, entropy: entropy / k


def _of_token(k: int | None, return_stats: Any = True, **options: Any) -> TokenLoss:
    return TokenLoss(k, EntropyGate(), -100, return_stats=return_stats, **options)


def _full_stats(logits: Tensor, labels: Tensor, widths: list[int], **options: Any) -> TokenStats:
    """The same bits for all shards."""
    found = losses_of_shards(shards_at(logits, widths), labels, return_stats="full", **options)
    for of_shard in found[1:]:
        assert_same_stats(of_shard.stats, found[0].stats)
    return found[0].stats


@pytest.mark.usefixtures("route")
@each_division
def test_divisions(device: str, dtype: torch.dtype, widths: list[int]) -> None:
    logits, labels = make(9, 60, dtype, device=device, ignored=0.2)
    assert_shards_match(logits, labels, upstream_of(labels), widths, k=None)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 3, 4])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(device: str, dtype: torch.dtype, trap: str, num_shards: int) -> None:
    logits, labels = make(9, 1003, dtype, trap=trap, device=device)
    widths = divide(1003, num_shards)
    assert_shards_match(logits, labels, upstream_of(labels), widths, k=None)


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_without_kernels(without_kernels: None, dtype: torch.dtype, trap: str) -> None:
    logits, labels = make(9, 130, dtype, trap=trap)
    assert_shards_match(logits, labels, upstream_of(labels), divide(130, 3), k=None)


@pytest.mark.parametrize("num_rows", [2, 9], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 8193, 50257])
def test_vocab_sizes(device: str, dtype: torch.dtype, vocab_size: int, num_rows: int) -> None:
    logits, labels = make(num_rows, vocab_size, dtype, device=device, ignored=0.2)
    widths = divide(vocab_size, 3)
    assert_shards_match(logits, labels, upstream_of(labels), widths, k=None)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [*GATES, _OfK()], ids=lambda gate: getattr(gate, "name", "own"))
def test_gates(device: str, dtype: torch.dtype, gate: Any) -> None:
    """Their k is the number of all words."""
    logits, labels = make(12, 300, dtype, device=device, ignored=0.2)
    assert_shards_match(logits, labels, upstream_of(labels), [100, 0, 200], k=None, gate=gate)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [None, _OfK()], ids=["entropy", "own"])
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_family(device: str, dtype: torch.dtype, family: dict[str, Any], gate: Any) -> None:
    logits, labels = make(12, 300, dtype, device=device, ignored=0.2)
    options = family | {"k": None, "gate": gate}
    if gate is None:
        options.pop("gate")
    assert_shards_match(logits, labels, upstream_of(labels), divide(300, 3), **options)


def _assert_stats_are_the_truth(
    stats: TokenStats, logits: Tensor, labels: Tensor, **options: Any
) -> None:
    options = options | {"reduction": "none"}
    (_, ref), (_, gt) = (
        reference.gated_ce(x, labels, return_stats="full", **options)
        for x in (logits, logits.double())
    )
    weights = error_weights(gt, logits, labels, **options)
    for name, *values in zip(stats._fields, stats, ref, gt, strict=True):
        if values[0] is None:
            assert values == [None] * 3, name
        elif values[0].dtype == torch.bool:
            assert torch.equal(values[0], values[2]), name
        else:
            assert_within(name, *values, LOSS_FACTOR, weights[name])


@pytest.mark.usefixtures("route")
@each_k
@each_division
def test_full_stats(device: str, dtype: torch.dtype, widths: list[int], k: int | None) -> None:
    """The same in all shards, and those of the whole rows."""
    logits, labels = make(9, 60, dtype, device=device, ignored=0.2)
    labels[::2] = torch.where(labels[::2] == -100, -100, logits[::2].argmax(-1))
    stats = _full_stats(logits, labels, widths, k=k)
    assert stats.correct is not None and stats.correct.any() and not stats.correct.all()
    _assert_stats_are_the_truth(stats, logits, labels, k=k)


@pytest.mark.usefixtures("route")
@each_k
@pytest.mark.parametrize("gate", [EntropyGate(), _OfK()], ids=["entropy", "own"])
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_full_stats_of_the_family(
    device: str, family: dict[str, Any], gate: Any, k: int | None
) -> None:
    logits, labels = make(9, 300, device=device, ignored=0.2)
    stats = _full_stats(logits, labels, divide(300, 3), k=k, gate=gate, **family)
    _assert_stats_are_the_truth(stats, logits, labels, k=k, gate=gate, **family)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(
    "options", [{}, {"gate": _OfK()}, *FAMILY], ids=["nothing", "own_gate", *map(str, FAMILY)]
)
def test_asking_for_more_changes_nothing(
    device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Of the loss, its gradient, and the stats that were there: in every bit."""
    logits, labels = make(9, 300, dtype, device=device, ignored=0.2)
    upstream = upstream_of(labels)
    few, more, full = (
        outcome_of_shards(logits, labels, upstream, divide(300, 3), return_stats=asked, **options)
        for asked in (False, True, "full")
    )
    for name, *values in zip(Outcome._fields, few, more, full, strict=True):
        assert same_bits(values[1], values[0]) and same_bits(values[2], values[0]), name


@pytest.mark.usefixtures("route")
@each_k
def test_ties_across_shards_are_correct(device: str, dtype: torch.dtype, k: int | None) -> None:
    logits, labels = make(6, 60, dtype, device=device)
    labels[:] = torch.tensor([0, 30, 59, 10, 25, 40])
    for row, other in enumerate((59, 0, 30, 31, 26)):
        logits[row, [labels[row].item(), other]] = 20.0
    logits[3, 31] = 20.25
    logits[5, 3] = 20.0
    stats = _full_stats(logits, labels, [20, 25, 15], k=k)
    assert stats.correct is not None
    assert stats.correct.tolist() == [True, True, True, False, True, False]


@pytest.mark.usefixtures("route")
@each_k
def test_ignored_tokens(device: str, dtype: torch.dtype, k: int | None) -> None:
    logits, labels = make(12, 60, dtype, device=device)
    options: dict[str, Any] = {"k": k, "z_loss": 1e-2}
    kept = _full_stats(logits, labels, [20, 25, 15], **options)
    labels[1::3] = -100
    ignored = labels == -100
    found = _full_stats(
        logits.masked_fill(ignored[:, None], math.nan), labels, [20, 25, 15], **options
    )
    for name, a, b in zip(TOLD, found, kept, strict=False):
        assert not a[ignored].any(), name
        assert same_bits(a[~ignored], b[~ignored]), name


@pytest.mark.usefixtures("route")
@each_k
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 19, 20, 59])
def test_an_accident_in_a_shard_stays_in_its_row(
    device: str, dtype: torch.dtype, column: int, value: float, k: int | None
) -> None:
    logits, labels = make(12, 60, dtype, device=device)
    others = torch.arange(12) != 2
    expected = _full_stats(logits, labels, [20, 25, 15], k=k)
    logits[2, column] = value
    found = _full_stats(logits, labels, [20, 25, 15], k=k)
    assert_same_stats(found.map(lambda x: x[others]), expected.map(lambda x: x[others]))
    assert found.nll[2].isnan() and found.entropy[2].isnan()
    assert found.vocab_entropy is not None and found.vocab_entropy[2].isnan()
    assert found.correct is not None and (not found.correct[2] or value == math.inf)


@pytest.mark.usefixtures("route")
@each_k
def test_masked_shards(device: str, dtype: torch.dtype, k: int | None) -> None:
    """One of -inf alone tells nothing, as one without columns does."""
    logits, labels = make(12, 60, dtype, device=device)
    labels %= 20
    logits[:, 20:45] = -math.inf
    stats = _full_stats(logits, labels, [20, 25, 15], k=k, gate=NoGate())
    _assert_stats_are_the_truth(stats, logits, labels, k=k, gate=NoGate())
    rest = torch.cat([logits[:, :20], logits[:, 45:]], 1)
    alone = _full_stats(rest, labels, [20, 0, 15], k=k, gate=NoGate())
    assert_same_stats(alone, stats)


@pytest.mark.usefixtures("route")
@each_k
def test_padding_takes_no_part(device: str, dtype: torch.dtype, k: int | None) -> None:
    logits, labels = make(12, 50, dtype, device=device, ignored=0.2)
    padded = torch.full((12, 60), math.nan, dtype=dtype, device=device)
    padded[:, :50] = logits
    options: dict[str, Any] = {"k": k, "return_stats": "full"}
    found = losses_of_shards(shards_at(padded, [20, 25, 15], 50), labels, **options)
    expected = losses_of_shards(shards_at(logits, [20, 25, 5]), labels, **options)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a.loss, b.loss)
        assert_same_stats(a.stats, b.stats)


# What a shard tells of a token: the options, and how many numbers.
SIZES: list[tuple[TokenLoss, int]] = [
    (_of_token(None), 5),
    (_of_token(None, "full"), 5),
    (_of_token(None, label_smoothing=0.1), 6),
    (_of_token(20), 23),
    (_of_token(20, "full"), 24),
    (_of_token(20, "full", label_smoothing=0.1), 25),
    (_of_token(128, "full"), 132),
]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("columns", [0, 7, 300])
@pytest.mark.parametrize(("of_token", "size"), SIZES)
def test_sizes_of_partials(
    device: str, dtype: torch.dtype, of_token: TokenLoss, size: int, columns: int
) -> None:
    logits, labels = torch.randn(3, columns, device=device).to(dtype), torch.ones(3).long()
    partial = partial_of(logits, labels.to(device), of_token, VocabShard(0, None, columns))
    assert partial.shape == (3, size) and of_token.partial_size == size
    assert partial.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.usefixtures("route")
def test_a_partial_by_hand(device: str, dtype: torch.dtype) -> None:
    """Words 10, 11 and 12; the labels are inside, outside or ignored, and a row is masked."""
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[1.0, 2.0, -inf]] * 3 + [[-inf] * 3], dtype=dtype, device=device)
    labels = torch.tensor([10, 9, -100, 10], device=device)
    shard = VocabShard(10, None, 20)
    e = math.exp(-1)
    entropy = math.log1p(e) + e / (1 + e)
    for k, top in ((None, [[2], [2], [nan], [-inf]]), (2, [[2, 1]] * 2 + [[nan] * 2, [-inf] * 2])):
        found = partial_of(logits, labels, _of_token(k, "full"), shard)
        head = [[10, e, 1], [9, e, nan], [-100, -1, nan], [10, -1, -inf]]
        own = [[entropy], [entropy], [0], [nan]]
        expected = [a + b + c for a, b, c in zip(head, top, own, strict=True)]
        rounding = 2 * torch.finfo(found.dtype).eps
        torch.testing.assert_close(
            found.cpu(),
            torch.tensor(expected, dtype=found.dtype),
            rtol=rounding,
            atol=0,
            equal_nan=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("columns", [0, 1, 130, 4097])
@pytest.mark.parametrize("trap", TRAPS)
def test_kernel_and_reference_tell_the_same(
    device: str, dtype: torch.dtype, trap: str, columns: int
) -> None:
    if columns == 0:
        logits, labels = torch.empty(9, 0, dtype=dtype, device=device), torch.ones(9).long()
        labels = labels.to(device)
    else:
        logits, labels = make(9, columns, dtype, trap=trap, device=device)
    labels[-1] = -100
    for k in (None, 20):
        of_token = _of_token(k, "full")
        found = ops.gated_ce_partial(logits, labels, k or 0, 0, None, -100, [], True)
        expected = of_token.shard_partial(logits, labels, 0)
        truth = of_token.shard_partial(logits.double(), labels, 0)
        top = slice(TOP, TOP + of_token.num_top)
        for field in (0, TARGET, top):
            torch.testing.assert_close(
                found[..., field], expected[..., field], rtol=0, atol=0, equal_nan=True
            )
        # The entropy of the shard, behind the largest.
        epsilon = torch.finfo(found.dtype).eps
        for field in (REST, -1):
            a, b, t = (x[..., field].double() for x in (found, expected, truth))
            error = (b - t).abs()
            assert ((a - t).abs() <= 4 * error + 32 * epsilon * (1 + t.abs())).all()


@pytest.mark.parametrize("k", [0, 20])
@pytest.mark.parametrize("vocab_size", [5, 130, 8200])
def test_merge_gives_what_the_forward_of_all_gives(
    device: str, dtype: torch.dtype, vocab_size: int, k: int
) -> None:
    logits, labels = make(40, vocab_size, dtype, device=device, ignored=0.2)
    gate = ("entropy", [1.0], -100)
    partials = torch.stack(
        [
            ops.gated_ce_partial(x, labels, k, shard.start, None, -100, [], True)
            for x, shard in shards_at(logits, divide(vocab_size, 3))
        ]
    )
    expected = ops.gated_ce_forward(logits, labels, k, *gate, False, [], 3)
    shard = (0, None, False, [], vocab_size)
    found = ops.gated_ce_merge(logits[:, :0], labels, partials, k, *gate, *shard, 3)
    epsilon = torch.finfo(expected[0].dtype).eps
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=8 * epsilon, atol=8 * epsilon)
    extra = found[-1]
    assert extra.shape == (3, 40) and same_bits(extra[1], expected[-1][1])
    for num_extra in (0, 2):
        fewer = ops.gated_ce_merge(
            logits[:, :0], labels, _without_entropy(partials, k), k, *gate, *shard, num_extra
        )
        assert same_bits(fewer[-1], extra[:num_extra])
        assert all(same_bits(a, b) for a, b in zip(fewer[:-1], found[:-1], strict=True))


def _without_entropy(partials: Tensor, k: int) -> Tensor:
    """As where it is told by those alone that need it."""
    return partials if k == 0 else partials[..., :-1]


@pytest.mark.parametrize(
    ("k", "size", "num_extra", "sentence"),
    [
        (0, 4, 0, r"\(num_shards, ..., 5\) with k = 0, got \[2, 3, 4\]"),
        (0, 6, 3, r"\(num_shards, ..., 5\) with k = 0, got \[2, 3, 6\]"),
        (4, 7, 3, r"\(num_shards, ..., 8\) with k = 4, got \[2, 3, 7\]"),
        (4, 8, 2, r"\(num_shards, ..., 7\) with k = 4, got \[2, 3, 8\]"),
        (1, 5, 0, "k must be from 2 to 128, or 0 for all logits, got 1"),
        (4, 7, 4, "num_extra must be from 0 to 3, got 4"),
    ],
)
def test_merge_checks_for_itself(k: int, size: int, num_extra: int, sentence: str) -> None:
    logits, labels, partials = torch.zeros(3, 9), torch.zeros(3).long(), torch.zeros(2, 3, size)
    with pytest.raises(REFUSAL, match=sentence):
        ops.gated_ce_merge(
            logits, labels, partials, k, "none", [], -100, 0, None, num_extra=num_extra
        )


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [EntropyGate(), _OfK()], ids=["built_in", "own"])
def test_the_number_of_words_has_to_be_known(gate: Any) -> None:
    logits, labels = make(3, 9)
    of_token = TokenLoss(None, gate, -100)
    sentence = "with k=None, vocab_start goes with vocab_size: how many words the shards have"
    with pytest.raises(ValueError, match=sentence):
        token_losses(logits, labels, of_token, VocabShard(0, None, None), lambda part: part[None])


@pytest.mark.usefixtures("route", "group_of_one")
def test_a_group_of_one(device: str) -> None:
    """Its shard is the whole of it; and the number of words has to be said where it is asked."""
    logits, labels = make(12, 300, device=device, ignored=0.2)
    options: dict[str, Any] = {"k": None, "return_stats": "full", "z_loss": 1e-2}
    loss, stats = gated_ce(logits, labels, **options)
    for given in ({}, {"vocab_start": 0, "vocab_size": 300}):
        found = vocab_parallel_gated_ce(logits, labels, group=dist.group.WORLD, **options, **given)
        torch.testing.assert_close(found[0], loss)
        for name, a, b in zip(stats._fields, found[1], stats, strict=True):
            torch.testing.assert_close(a, b, msg=name)
    with pytest.raises(ValueError, match="with k=None, vocab_start goes with vocab_size"):
        vocab_parallel_gated_ce(logits, labels, None, group=dist.group.WORLD, vocab_start=0)
    with pytest.raises(ValueError, match="return_stats must be True, False or 'full', got 'all'"):
        vocab_parallel_gated_ce(
            logits,
            labels,
            group=dist.group.WORLD,
            return_stats="all",  # type: ignore[call-overload]
        )
