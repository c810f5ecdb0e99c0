"""The CUDA kernels for a divided vocabulary, on the host: partial of each shard, merge, backward.

Against the reference for whole rows, by the rules of tolerances.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kernels_on_host
import pytest
import torch
from gate_cases import GATES
from inputs import IGNORED, TRAPS, dtype_name, make, same_bits, upstream_of
from layouts import READ_IN_PLACE
from layouts import build as build_layout
from parity import Outcome
from test_kernels_on_host import Way, assert_others_unchanged, assert_right, each_dtype
from torch import Tensor

from eaft_ext import EntropyGate, NoGate, reference
from eaft_ext._options import TokenLoss
from eaft_ext.gates import Gate

pytestmark = kernels_on_host.MARKS

WHOLE = Way("split", 1)


@dataclass(frozen=True)
class Shards:
    """Rows divided at ``cuts``, given as shares of the vocabulary, then each shard into spans."""

    cuts: tuple[float, ...]
    num_spans: int = 1

    def __str__(self) -> str:
        return f"shards_at_{'_'.join(map(str, self.cuts))}_in_{self.num_spans}"

    def divide(self, logits: Tensor) -> list[tuple[int, Tensor]]:
        """Every shard that has columns, and its first word."""
        vocab_size = logits.size(-1)
        bounds = [0, *(int(cut * vocab_size) for cut in self.cuts), vocab_size]
        pairs = itertools.pairwise(bounds)
        return [(start, logits[..., start:end]) for start, end in pairs if start < end]

    def partials(
        self,
        logits: Tensor,
        labels: Tensor,
        k: int,
        ignore_index: int,
        seed: int = 0,
        family: Sequence[float] = (),
        tells_entropy: bool = False,
    ) -> Tensor:
        """What all shards tell."""
        return torch.stack(
            [
                kernels_on_host.partial(
                    shard,
                    labels,
                    k,
                    start,
                    ignore_index,
                    num_spans=self.num_spans,
                    seed=seed,
                    family=family,
                    tells_entropy=tells_entropy,
                )
                for start, shard in self.divide(logits)
            ]
        )

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        upstream: Tensor | None = None,
        *,
        k: int | None = 20,
        gate: Gate = EntropyGate(),  # noqa: B008, a constant
        ignore_index: int = IGNORED,
        seed: int = 0,
        family: dict[str, float] | None = None,
        **gradient: Any,
    ) -> Outcome:
        """Loss, stats and the gradient of ``sum(upstream * loss)``."""
        upstream = upstream_of(labels) if upstream is None else upstream
        of_family = TokenLoss(k, gate, ignore_index, **(family or {})).family()
        partials = self.partials(logits, labels, k or 0, ignore_index, seed, of_family)
        stats = kernels_on_host.merge(
            partials,
            labels,
            k or 0,
            gate.name,
            gate.parameters(),
            ignore_index,
            seed=seed,
            family=of_family,
            num_words=logits.size(-1),
        )
        if of_family:
            total = {"num_words": logits.size(-1)}
            gradient |= {"family": of_family, "upstream": upstream, **total}
        saved = (labels, stats.row_max, stats.log_sum, ignore_index)
        gradients = [
            kernels_on_host.backward(
                upstream * stats.gate, shard, *saved, vocab_start=start, seed=seed, **gradient
            )
            for start, shard in self.divide(logits)
        ]
        return Outcome(
            stats.loss, stats.nll, stats.entropy, stats.gate, torch.cat(gradients, dim=-1)
        )

    def extra(
        self, logits: Tensor, labels: Tensor, k: int | None, family: list[float], num_extra: int
    ) -> Tensor:
        """What is told of the tokens besides."""
        tells = num_extra == 3
        partials = self.partials(logits, labels, k or 0, IGNORED, 0, family, tells)
        asked = (k or 0, "entropy", [1.0], IGNORED)
        return kernels_on_host.merge(
            partials,
            labels,
            *asked,
            family=family,
            num_words=logits.size(-1),
            num_extra=num_extra,
        ).extra


HALVES = Shards((0.5,))
WAYS = [
    Shards(()),
    HALVES,
    Shards((0.1, 0.6), num_spans=3),
    Shards((0.25, 0.5, 0.75)),
    # More shards than a warp has lanes: two rounds of the merge, and three.
    Shards(tuple(i / 40 for i in range(1, 40))),
    Shards(tuple(i / 70 for i in range(1, 70))),
]


@each_dtype
@pytest.mark.parametrize("k", [2, 20, 128])
@pytest.mark.parametrize(
    "vocab_size",
    [1, 2, 5, 33, *(pytest.param(size, marks=pytest.mark.slow) for size in (127, 1000, 4099))],
)
def test_vocab_sizes(dtype: torch.dtype, vocab_size: int, k: int) -> None:
    """Also a k that exceeds every shard, or all of them together."""
    assert_right(*make(9, vocab_size, dtype), [WHOLE, *WAYS], k=k)


@each_dtype
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(dtype: torch.dtype, trap: str) -> None:
    assert_right(*make(3, 20011, dtype, trap=trap, ignored=0.2), WAYS[:4])


@pytest.mark.parametrize("trap", ["normal", "ascending", "probability_one_minus_1e-6"])
def test_full_size(trap: str) -> None:
    assert_right(*make(2, 151936, torch.bfloat16, trap=trap), WAYS[1:4])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_left_of_a_confident_token(way: Shards) -> None:
    """1e-6 in all, which must come through the float32 partials."""
    logits, labels = make(8, 20011, trap="probability_one_minus_1e-6")
    truth = reference.gated_ce(logits.double(), labels, gate=NoGate(), reduction="none")
    found = way(logits, labels, torch.ones(8), gate=NoGate())
    at_label = -found.gradient.gather(1, labels[:, None])[:, 0]
    for value in (found.nll, at_label):
        torch.testing.assert_close(value.double(), truth, rtol=5e-3, atol=0)


@each_dtype
@pytest.mark.parametrize("gate", [gate for gate in GATES if isinstance(gate, Gate)], ids=str)
def test_gates(dtype: torch.dtype, gate: Gate) -> None:
    """Also over fewer logits than k, where ln k is another one."""
    assert_right(*make(9, 300, dtype, ignored=0.2), WAYS[:4], gate=gate, k=8)
    assert_right(*make(9, 6, dtype, ignored=0.2), WAYS[:4], gate=gate, k=8)


@pytest.mark.parametrize("name", READ_IN_PLACE)
def test_layouts(name: str) -> None:
    _, logits, labels = build_layout(name, torch.bfloat16, "cpu")
    assert_right(logits, labels, WAYS[1:3])
    apart, inside = (HALVES(logits, labels, inplace=inplace) for inplace in (False, True))
    assert same_bits(apart.gradient, inside.gradient)


@each_dtype
@pytest.mark.parametrize("num_spans", [1, 3])
def test_a_partial_is_that_of_the_reference(dtype: torch.dtype, num_spans: int) -> None:
    logits, labels = make(6, 5000, dtype, ignored=0.3)
    for start, k in ((0, 20), (2000, 128), (4990, 20), (4999, 2)):
        shard = logits[:, start:]
        found = kernels_on_host.partial(shard, labels, k, start, IGNORED, num_spans=num_spans)
        truth = reference.shard_partial(shard.double(), labels, k, start)
        assert torch.equal(found.isnan(), truth.isnan())
        sums = torch.arange(k + 3) == 1
        # Label and logits are told as they are.
        assert same_bits(found[:, ~sums].nan_to_num(), truth[:, ~sums].float().nan_to_num())
        torch.testing.assert_close(found[:, sums].double(), truth[:, sums], rtol=1e-5, atol=1e-7)


def test_all_shards_have_the_same_bits_whatever_their_order_of_threads() -> None:
    logits, labels = make(20, 3000, torch.float32)
    way = WAYS[4]
    first = way(logits, labels)
    for seed in (1, 2, 3):
        for a, b in zip(way(logits, labels, seed=seed), first, strict=True):
            assert same_bits(a, b)


def test_ignored_rows_are_not_read() -> None:
    logits, labels = make(9, 300, ignored=0.4)
    logits[labels == IGNORED] = math.nan
    ignored = labels == IGNORED
    found = WAYS[2](logits, labels)
    assert ignored.any() and not ignored.all()
    for value in found:
        assert (value[ignored] == 0).all() and value[~ignored].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 1001, 2**31, 2**32 + 3, 2**63 - 1, -(2**63)])
def test_a_label_in_no_shard_spoils_its_row(wrong: int) -> None:
    logits, labels = make(5, 1001)
    expected = HALVES(logits, labels, torch.ones(5))
    labels[2] = wrong
    found = HALVES(logits, labels, torch.ones(5))
    for value in found:
        assert value[2].isnan().all()
    assert_others_unchanged(found, expected, 2)


def test_labels_that_differ_spoil_their_row() -> None:
    logits, labels = make(5, 1001)
    labels[2] = 7
    other = labels.clone()
    other[2] = 8
    partials = HALVES.partials(logits, labels, 20, IGNORED)
    partials[1] = HALVES.partials(logits, other, 20, IGNORED)[1]
    stats = kernels_on_host.merge(partials, labels, 20, "none", [], IGNORED)
    assert stats.loss.isnan().tolist() == [False, False, True, False, False]
    assert stats.log_sum.isnan().tolist() == stats.loss.isnan().tolist()


def test_a_label_in_two_shards_spoils_its_row() -> None:
    logits, labels = make(5, 1001)
    labels[:] = torch.tensor([10, 400, 490, 600, 1000])
    pairs = [(0, logits[:, :500]), (450, logits[:, 450:])]
    partials = torch.stack(
        [kernels_on_host.partial(x, labels, 20, start, IGNORED) for start, x in pairs]
    )
    stats = kernels_on_host.merge(partials, labels, 20, "none", [], IGNORED)
    assert stats.loss.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [3, 900])
def test_values_that_spoil_their_row(dtype: torch.dtype, value: float, column: int) -> None:
    logits, labels = make(5, 1001, dtype)
    labels[1] = 17
    expected = HALVES(logits, labels, torch.ones(5))
    logits[1, column] = value
    found = HALVES(logits, labels, torch.ones(5))
    for field in found:
        assert field[1].isnan().all()
    assert_others_unchanged(found, expected, 1)


def test_a_shard_without_a_finite_logit() -> None:
    """As where a mask covers all of it."""
    logits, labels = make(6, 1000)
    labels %= 500
    logits[:, 500:] = -math.inf
    assert_right(logits, labels, [WHOLE, HALVES, Shards((0.5, 0.75))])


def test_rows_of_weight_0_are_not_read() -> None:
    """Their logits may be gone when the gradient is asked for."""
    logits, labels = make(4, 1001)
    stats = kernels_on_host.merge(
        HALVES.partials(logits, labels, 20, IGNORED), labels, 20, "none", [], IGNORED
    )
    logits[1] = math.nan
    for start, shard in HALVES.divide(logits):
        gradient = kernels_on_host.backward(
            torch.tensor([1.0, 0.0, 1.0, 1.0]),
            shard,
            labels,
            stats.row_max,
            stats.log_sum,
            IGNORED,
            vocab_start=start,
        )
        assert (gradient[1] == 0).all() and gradient.isfinite().all()


def test_nothing() -> None:
    logits, labels = make(0, 100)
    assert all(value.numel() == 0 for value in HALVES(logits, labels, torch.ones(0)))
