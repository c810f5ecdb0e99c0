"""The CUDA kernels against the reference, on the host: what needs no GPU to be seen.

The shim is ``cuda_on_host``, and test_cuda_on_host.py is about it. What a kernel is given lies in
memory that is NaN everywhere else, and what it leaves unwritten is NaN.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import kernels_on_host
import pytest
import torch
from error_model import error_weights
from gate_cases import GATES
from inputs import IGNORED, TRAPS, dtype_name, make, same_bits, sparse_elements, upstream_of
from layouts import READ_IN_PLACE, each_far_layout, each_limit, far_rows
from layouts import V as LAYOUT_VOCAB_SIZE
from layouts import build as build_layout
from parity import Outcome, assert_outcome, outcome
from torch import Tensor

from eaft_ext import EntropyGate, HardGate, NoGate, reference
from eaft_ext._options import TokenLoss
from eaft_ext.gates import Gate

pytestmark = kernels_on_host.MARKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARED_BYTES = 200 * 1024  # for the span of a row that a block holds


@dataclass(frozen=True)
class Way:
    """How a row is shared out: split into ``count`` spans, or over a cluster of ``count`` blocks.

    A cluster of 0 is the kernel without clusters.
    """

    kernel: str
    count: int

    def __str__(self) -> str:
        return f"{self.kernel}_{self.count}"

    def takes(self, logits: Tensor) -> bool:
        """Whether shared memory has room for such rows."""
        if self.kernel != "cluster" or self.count == 0:
            return True
        return logits.size(-1) * logits.element_size() <= self.count * SHARED_BYTES

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
        asked = (k or 0, gate.name, gate.parameters(), ignore_index)
        family = TokenLoss(k, gate, ignore_index, **(family or {})).family()
        common = {"seed": seed, "family": family}
        if self.kernel == "cluster":
            options = {"cluster_size": self.count, **common, **gradient}
            *stats, _, gradient = kernels_on_host.forward_with_grad(
                upstream, logits, labels, *asked, **options
            )
            return Outcome(*stats, gradient)
        stats = kernels_on_host.forward(logits, labels, *asked, num_spans=self.count, **common)
        saved = (stats.row_max, stats.log_sum, ignore_index)
        options = {"upstream": upstream, **common, **gradient}
        found = kernels_on_host.backward(upstream * stats.gate, logits, labels, *saved, **options)
        return Outcome(stats.loss, stats.nll, stats.entropy, stats.gate, found)


WAYS = [Way("split", count) for count in (1, 2, 7)]
WAYS += [Way("cluster", count) for count in (0, 1, 2, 4, 8)]
FEW_WAYS = [Way("split", 1), Way("split", 3), Way("cluster", 0), Way("cluster", 1)]
FEW_WAYS += [Way("cluster", 4)]

each_dtype = pytest.mark.parametrize(
    "dtype",
    [*DTYPES[:2], pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=dtype_name,
)
each_way = pytest.mark.parametrize("way", FEW_WAYS, ids=str)


def assert_right(
    logits: Tensor,
    labels: Tensor,
    ways: Sequence[Callable[..., Outcome]] = WAYS,
    *,
    k: int | None = 20,
    gate: Gate = EntropyGate(),  # noqa: B008, a constant
    family: dict[str, float] | None = None,
    **gradient: Any,
) -> None:
    """Hold every way to the reference, each with another order of threads.

    An entropy that is a matter of the k largest alone is the same in every bit.
    """
    upstream = upstream_of(labels)
    family = family or {}
    options: dict[str, Any] = {"k": k, "gate": gate, "reduction": "none", **family}
    ref = outcome(reference.gated_ce, logits, labels, upstream, **options)
    gt = outcome(reference.gated_ce, logits.double(), labels, upstream.double(), **options)
    weights = error_weights(gt, logits, labels, upstream, **options)
    entropy = None
    for seed, way in enumerate(ways):
        found = way(logits, labels, k=k, gate=gate, seed=seed, family=family, **gradient)
        assert_outcome(found, ref, gt, weights, f", {way}")
        entropy = found.entropy if entropy is None else entropy
        if k is not None:
            assert same_bits(found.entropy, entropy), f"entropy, {way}"


def assert_others_unchanged(found: Outcome, expected: Outcome, row: int) -> None:
    """What is wrong with one row is no other row's concern."""
    others = torch.arange(len(found.loss)) != row
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert same_bits(a[others], b[others]), f"{name} of another row"


# ---- Right by the rules of tolerances.py.


@each_dtype
@pytest.mark.parametrize("k", [2, 20, 128])
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 31, 33, 127, 1000, 1024, 4099])
def test_vocab_sizes(dtype: torch.dtype, vocab_size: int, k: int) -> None:
    """Also a k that is more than there are, and more blocks than a row has vectors."""
    assert_right(*make(3, vocab_size, dtype), k=k)


@each_dtype
@pytest.mark.parametrize("vocab_size", [33, 20011])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(dtype: torch.dtype, trap: str, vocab_size: int) -> None:
    assert_right(*make(3, vocab_size, dtype, trap=trap, ignored=0.2))


@pytest.mark.slow
@pytest.mark.parametrize("trap", ["normal", "many_ties", "ascending", "probability_one_minus_1e-6"])
@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [(torch.float32, 50257), (torch.float32, 151936), (torch.bfloat16, 151936)],
    ids=["float32-50257", "float32-151936", "bfloat16-151936"],
)
def test_full_size(dtype: torch.dtype, vocab_size: int, trap: str) -> None:
    logits, labels = make(2, vocab_size, dtype, trap=trap)
    ways = [way for way in (*FEW_WAYS, Way("cluster", 8)) if way.takes(logits)]
    assert_right(logits, labels, ways)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("place", [0, 70_000, 151_935])
def test_small_terms_beside_a_large_one(dtype: torch.dtype, place: int) -> None:
    """What a thread adds to the label's 1 in each tile is just below half an ulp of it."""
    terms = 4 * 16 // dtype.itemsize  # of a tile
    logits = torch.zeros(1, 151_936, dtype=dtype)
    logits[0, place] = -math.log(0.9 * 2.0**-24 / terms)
    labels = torch.tensor([place])
    assert_right(logits, labels, [Way("split", 1), Way("cluster", 0)], gate=NoGate())


@each_way
def test_what_is_left_of_a_confident_token(way: Way) -> None:
    """1e-6 in all: 1 + 1e-6 as a float would be off by six percent of it."""
    logits, labels = make(8, 20011, trap="probability_one_minus_1e-6")
    truth = reference.gated_ce(logits.double(), labels, gate=NoGate(), reduction="none")
    found = way(logits, labels, torch.ones(8), gate=NoGate())
    at_label = -found.gradient.gather(1, labels[:, None])[:, 0]
    for value in (found.nll, at_label):
        torch.testing.assert_close(value.double(), truth, rtol=5e-3, atol=0)


@each_dtype
@pytest.mark.parametrize("gate", [gate for gate in GATES if isinstance(gate, Gate)], ids=str)
def test_gates(dtype: torch.dtype, gate: Gate) -> None:
    assert_right(*make(9, 300, dtype, ignored=0.2), FEW_WAYS, gate=gate, k=8)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("name", READ_IN_PLACE)
def test_layouts(dtype: torch.dtype, name: str) -> None:
    """The rows as they lie; in place, so does the gradient."""
    _, logits, labels = build_layout(name, dtype, "cpu")
    for way in FEW_WAYS:
        assert_right(logits, labels, [way])
        apart, inside = (way(logits, labels, inplace=inplace) for inplace in (False, True))
        assert same_bits(apart.gradient, inside.gradient)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
@pytest.mark.parametrize("shift", [0, 3])
def test_gradients_are_rounded_once(dtype: torch.dtype, shift: int) -> None:
    """Also where they are subnormal, or beyond the largest number of the type."""
    logits, labels = make(64, 1003, dtype)
    weight = 2.0 ** torch.linspace(-30, 30, 64)
    stats = kernels_on_host.forward(logits, labels, 20, "none", [], IGNORED)
    saved = (labels, stats.row_max, stats.log_sum, IGNORED)
    narrow = kernels_on_host.backward(weight, logits, *saved, shift=shift)
    wide = kernels_on_host.backward(weight, logits.float(), *saved)
    assert same_bits(narrow, wide.to(dtype))
    assert narrow.isinf().any() == (dtype == torch.float16)


@each_dtype
@pytest.mark.parametrize("factor", [1.0, 0.3, -2.0, 0.0, math.inf, math.nan])
def test_scaled_gradients(dtype: torch.dtype, factor: float) -> None:
    """Each element times the factor, rounded once; a factor of 1 touches nothing, also not NaN."""
    gradient = torch.randn(3, 2, 12345).to(dtype)[:, :, 1:-3].transpose(0, 1)
    gradient[0, 0, 7::100], gradient[1, 2, ::50] = math.nan, math.inf
    patterns = torch.tensor([0x7F81, -3], dtype=torch.int16).repeat(4 // dtype.itemsize)
    gradient[1, 1, 5:7] = patterns.view(dtype)[:2]
    for seed in range(3):
        found = kernels_on_host.scale_gradient(gradient, factor, seed=seed)
        if factor == 1:
            assert same_bits(found, gradient)
        else:
            wanted = (gradient.float() * torch.tensor(factor)).to(dtype)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@each_dtype
@each_way
def test_alignments(dtype: torch.dtype, way: Way) -> None:
    """Of the logits, as far as tolerances allow; of the gradient, with the same bits."""
    size = 16 // dtype.itemsize
    plain, labels = make(3, 4100, dtype)
    for start in range(size):
        logits = torch.empty(plain.numel() + start, dtype=dtype)[start:].view_as(plain)
        logits.copy_(plain)
        assert_right(logits, labels, [way], shift=1)
        expected = way(logits, labels)
        for shift in {1, size // 2, size - 1, start}:
            assert same_bits(way(logits, labels, shift=shift).gradient, expected.gradient)
        assert same_bits(way(logits, labels, inplace=True).gradient, expected.gradient)


@each_way
@pytest.mark.parametrize("vocab_size", [3 * 4096 + d for d in (-1, 0, 1, 3, 5)])
def test_whole_tiles(way: Way, vocab_size: int) -> None:
    """And a little less or more, from every alignment."""
    logits, labels = make(4, vocab_size)
    labels[0], labels[1] = 0, vocab_size - 1
    for shift in range(4):
        assert_right(logits, labels, [way], shift=shift)


@each_dtype
@each_way
def test_label_at_every_place(dtype: torch.dtype, way: Way) -> None:
    """Of a vector, of the edges of a span and of the row."""
    row, _ = make(1, 1045, dtype)
    places = {*range(20), *range(1025, 1045)}
    # Where a span of 32 or 64 times so many elements begins.
    begins = (288, 320, 352, 384, 576, 640, 704, 768, 864, 960)
    places |= {begin + step for begin in begins for step in range(-5, 6)}
    labels = torch.tensor(sorted(places))
    assert_right(row.repeat(len(labels), 1), labels, [way], gate=NoGate())


def test_nothing() -> None:
    logits, labels = make(0, 300)
    for way in WAYS:
        assert all(len(result) == 0 for result in way(logits, labels))
        assert all(len(result) == 0 for result in way(logits, labels, inplace=True))
    assert kernels_on_host.scale_gradient(logits, 2.0).shape == (0, 300)


# ---- Rows that defeat the list of candidates.


def _crowds(vocab_size: int, size: int) -> dict[str, Tensor]:
    """Rows by name, for vectors of that size: see select_span.cuh and scan_span.cuh."""
    noise = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    place = torch.arange(vocab_size)
    thread, lane, tile = place // size % 256, place // size % 32, place // (1024 * size)
    equal = torch.zeros(vocab_size).index_fill(0, place[7::4001], 1.0)
    few_above = torch.where(place % 7 == 0, 10.0 * tile + noise.abs(), noise - 5)
    return {
        "ascending": noise.sort().values,
        "ascending_far_below": noise.sort().values - 3e4,
        "descending": noise.sort(descending=True).values,
        "every_tile_larger": noise + 10 * tile,
        "a_few_of_every_tile_larger": few_above,
        "all_of_one_thread": noise + 20 * (thread == 77),
        "all_of_one_warp": noise + 20 * (thread // 32 == 3),
        "all_of_one_lane": noise + 20 * (lane == 5),
        "first_tile_is_empty": noise.masked_fill(tile == 0, -math.inf),
        "last_tile_is_larger": noise + 20 * (tile == tile.max()),
        "equal": torch.full_like(noise, -2.5),
        "equal_but_a_few": equal,
        "two_values": torch.where(noise > 0, 1.0, 1.0078125),
        "both_zeros": torch.where(noise > 0, 0.0, -0.0),
    }


CROWDS = list(_crowds(1, 4))


def crowd(name: str, dtype: torch.dtype, vocab_size: int = 40_003) -> tuple[Tensor, Tensor]:
    """Two such rows, the second one misaligned, and labels."""
    logits = _crowds(vocab_size, 16 // dtype.itemsize)[name].to(dtype).repeat(2, 1)
    return logits, torch.tensor([vocab_size - 1, 3])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("k", [2, 20, 128])
@pytest.mark.parametrize("name", CROWDS)
def test_crowds(name: str, k: int, dtype: torch.dtype) -> None:
    logits, labels = crowd(name, dtype)
    assert_right(logits, labels, FEW_WAYS, k=k)


@each_dtype
@pytest.mark.parametrize("name", ["normal", "ascending", "all_of_one_lane", "equal_but_a_few"])
def test_any_order_of_threads(name: str, dtype: torch.dtype) -> None:
    """The same bits."""
    logits, labels = make(2, 20011, dtype) if name == "normal" else crowd(name, dtype)
    for way in FEW_WAYS:
        first = way(logits, labels, k=64)
        for seed in range(1, 5):
            for field, a, b in zip(
                Outcome._fields, way(logits, labels, k=64, seed=seed), first, strict=True
            ):
                assert same_bits(a, b), f"{field}, {way}, seed {seed}"


# ---- Rows that do not count, and rows that are wrong.


@each_dtype
@each_way
def test_ignored_rows(dtype: torch.dtype, way: Way) -> None:
    logits, labels = make(9, 1003, dtype)
    labels[::4] = IGNORED
    expected = way(logits, labels)
    assert not any(values[::4].any() for values in expected)
    for options in ({}, {"shift": 1}, {"inplace": True}):
        found = way(logits.masked_fill((labels == IGNORED)[:, None], math.nan), labels, **options)
        for a, b in zip(found, expected, strict=True):
            assert same_bits(a, b)


@each_way
@pytest.mark.parametrize("ignore_index", [-1, 0, 17, 2**40])
def test_ignore_index(way: Way, ignore_index: int) -> None:
    """Also one inside the vocabulary; -100 is then out of it."""
    logits, labels = make(4, 300)
    labels[:] = torch.tensor([5, ignore_index, -100, 299])
    found = way(logits, labels, torch.ones(4), ignore_index=ignore_index)
    for values in found:
        assert not values[1].any()
        assert values[2].isnan().all()
        assert values[[0, 3]].isfinite().all() and values[0].any() and values[3].any()


def test_stats_of_ignored_rows() -> None:
    logits, labels = make(3, 300)
    labels[1] = IGNORED
    for num_spans in (1, 7):
        stats = kernels_on_host.forward(
            logits, labels, 20, "none", [], IGNORED, num_spans=num_spans
        )
        assert torch.equal(stats.row_max, logits.amax(1) * torch.tensor([1, 0, 1]))
        assert stats.log_sum[1] == 0 and (stats.log_sum[::2] > 0).all()


@each_dtype
@pytest.mark.parametrize("options", [{}, {"shift": 3}, {"inplace": True}], ids=str)
def test_rows_of_weight_0(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """They are not read by the backward, whatever was saved of them."""
    logits, labels = make(4, 5003, dtype)
    stats = kernels_on_host.forward(logits, labels, 20, "none", [], IGNORED)
    weight = torch.tensor([1.0, 0.0, -0.0, -2.0])
    logits[1], logits[2] = math.nan, math.inf
    stats.row_max[1], stats.log_sum[2] = math.nan, math.nan
    gradient = kernels_on_host.backward(
        weight, logits, labels, stats.row_max, stats.log_sum, IGNORED, **options
    )
    assert not gradient[1:3].any()
    assert gradient[::3].isfinite().all() and gradient[0].any() and gradient[3].any()


def test_rows_that_are_not_read_may_be_missing() -> None:
    """Ignored rows, and rows of weight 0 in a backward, lie where reading ends the process."""
    vocab_size, step = 4 * mmap.PAGESIZE, 2**25  # further apart than what the harness copies
    memory = sparse_elements(2 * step + vocab_size + mmap.PAGESIZE)
    logits = memory.as_strided((3, vocab_size), (step, 1))
    values, labels = make(3, vocab_size, torch.bfloat16)
    logits.copy_(values)
    protect = ctypes.CDLL(None).mprotect
    start = -(-logits[1].data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (ctypes.c_void_p(start), ctypes.c_size_t(7 * mmap.PAGESIZE))
    stats = kernels_on_host.forward(logits, labels, 20, "none", [], IGNORED)
    weight = torch.tensor([1.0, 0.0, 1.0])
    assert protect(*pages, 0) == 0
    try:
        kernels_on_host.backward(weight, logits, labels, stats.row_max, stats.log_sum, IGNORED)
        labels[1] = IGNORED
        for way in WAYS:
            assert way(logits, labels).loss[::2].all()
    finally:
        protect(*pages, mmap.PROT_READ | mmap.PROT_WRITE)


@each_way
@pytest.mark.parametrize("wrong", [-1, 1001, 1003, 2**31, 2**32 + 3, 2**63 - 1, -(2**63)])
def test_labels_out_of_range(way: Way, wrong: int) -> None:
    """NaN for their own row, and no wrong read. 1001 would be in the last vector of the row."""
    logits, labels = make(5, 1001)
    upstream = torch.ones(5)
    for gate in (NoGate(), EntropyGate(), HardGate(0.5)):
        expected = way(logits, labels, upstream, gate=gate)
        changed = labels.index_fill(0, torch.tensor([2]), wrong)
        for options in ({}, {"shift": 1}, {"inplace": True}):
            found = way(logits, changed, upstream, gate=gate, **options)
            assert_others_unchanged(found, expected, 2)
            assert all(values[2].isnan().all() for values in (found.loss, found.nll, found[4]))


@each_dtype
@each_way
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_values_that_spoil_their_row(way: Way, dtype: torch.dtype, value: float) -> None:
    """In the row's edges, in each thread's vectors, at the label; in any tile of it."""
    logits, labels = make(5, 8003, dtype)
    upstream = torch.ones(5)
    expected = way(logits, labels, upstream)
    for place in (0, 1, 2047, 4096, 4100, 8000, 8002, int(labels[2])):
        changed = logits.clone()
        changed[2, place] = value
        found = way(changed, labels, upstream, seed=place)
        assert_others_unchanged(found, expected, 2)
        assert all(values[2].isnan().all() for values in found)


@each_dtype
@each_way
def test_rows_without_a_finite_logit(way: Way, dtype: torch.dtype) -> None:
    """As in the reference, no loss. All at the lowest finite number, there is one: ln V."""
    logits, labels = make(5, 5003, dtype)
    upstream = torch.ones(5)
    expected = way(logits, labels, upstream)
    logits[2] = -math.inf
    found = way(logits, labels, upstream)
    assert_others_unchanged(found, expected, 2)
    assert all(values[2].isnan().all() for values in found)
    for lowest in (torch.finfo(dtype).min, -3e38 if dtype == torch.float32 else -6e4):
        logits[2], logits[3, 9:4990] = lowest, -math.inf
        assert_right(logits, labels, [way])
        torch.testing.assert_close(way(logits, labels).nll[2], torch.tensor(math.log(5003)))


@each_way
def test_a_label_without_probability(way: Way) -> None:
    logits, labels = make(5, 1003)
    logits[torch.arange(5), labels] = -math.inf
    assert_right(logits, labels, [way])
    assert (way(logits, labels).nll == math.inf).all()
    # A gate of 0 mutes it: 0 times infinity is 0 here.
    muted = way(logits, labels, torch.ones(5), gate=HardGate(2.0))
    assert not muted.loss.any() and not muted.gradient.any()


@each_limit
@each_far_layout
def test_far_rows(dims: int, limit: int) -> None:
    """Their elements lie beyond what 31 or 32 bits can count."""
    both: list[dict[str, Any]] = [{}, {"inplace": True}]
    logits = far_rows(dims, limit, LAYOUT_VOCAB_SIZE)
    plain, labels = make(logits.shape[:-1].numel(), LAYOUT_VOCAB_SIZE, torch.bfloat16)
    near = torch.empty(len(plain), LAYOUT_VOCAB_SIZE + 5, dtype=plain.dtype)  # the same alignment
    near, labels = near[:, :-5].view_as(logits), labels.view(logits.shape[:-1])
    near.copy_(plain.view_as(near))
    for way in FEW_WAYS:
        for options in both:
            logits.copy_(near)
            expected = way(near, labels, **options)
            for a, b in zip(way(logits, labels, **options), expected, strict=True):
                assert same_bits(a, b)
    logits.copy_(near)
