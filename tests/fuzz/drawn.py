"""What properties are tried on: calls drawn by hypothesis, each told by a few small numbers.

A drawn thing has no tensors, so that a failure prints in few lines, and shrinks; its methods make
them. ``EAFT_EXT_FUZZ_EXAMPLES=N`` tries N calls of every property, other ones in each run; by
default it is a few, always the same.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from error_model import error_weights
from gate_cases import BUILT_IN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import DTYPES, IGNORED, same_bits, upstream_of
from parity import Outcome, assert_outcome, outcome
from torch import Tensor

from eaft_ext import ConflictGate, EntropyGate, HardGate, ThresholdGate, reference

ASKED = os.environ.get("EAFT_EXT_FUZZ_EXAMPLES")
FEW = 12

TRIED: Counter[str] = Counter()
"""How often each property was tried in this process."""


def holds(few: int = FEW, **drawn: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """A test that must pass for whatever is drawn; ``few`` is how many it tries unless asked."""

    def decorate(test: Any) -> Any:
        name = f"{test.__module__}.{test.__name__}"

        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            TRIED[name] += 1
            test(*args, **kwargs)

        options = settings(
            max_examples=int(ASKED or few),
            derandomize=ASKED is None,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        return options(given(**drawn)(counted))

    return decorate


def _huge(row: Tensor, label: int) -> Tensor:
    return (1e4 * row).clamp(-6e4, 6e4)


def _put(value: float) -> Callable[[Tensor, int], Tensor]:
    def change(row: Tensor, label: int) -> Tensor:
        row[len(row) // 2] = value
        return row

    return change


def _masked(row: Tensor, label: int) -> Tensor:
    kept = row[label].clone()
    row[::2] = -math.inf
    row[label] = kept
    return row


def _label_alone(row: Tensor, label: int) -> Tensor:
    alone = torch.full_like(row, -math.inf)
    alone[label] = row[label]
    return alone


def _label_at(value: float) -> Callable[[Tensor, int], Tensor]:
    def change(row: Tensor, label: int) -> Tensor:
        row[label] = value
        return row

    return change


# From normal numbers and the label to a row of logits.
ROWS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "normal": lambda row, label: row,
    "equal": lambda row, label: torch.full_like(row, -7.25),
    "ties": lambda row, label: row.round(),
    "zeros_of_both_signs": lambda row, label: torch.copysign(torch.zeros_like(row), row),
    "subnormal": lambda row, label: row * 1e-40,
    "far_from_zero": lambda row, label: row - 1000,
    "huge": _huge,
    "outlier": _put(1e4),
    "confident": _label_at(25.0),
    "unlikely": _label_at(-60.0),
    "masked": _masked,
    "label_alone": _label_alone,
    "label_masked": _label_at(-math.inf),
    "none_finite": lambda row, label: torch.full_like(row, -math.inf),
    "infinite": _put(math.inf),
    "nan": _put(math.nan),
}
FINITE = [
    "normal",
    "equal",
    "ties",
    "zeros_of_both_signs",
    "subnormal",
    "far_from_zero",
    "huge",
    "outlier",
    "confident",
    "unlikely",
]


@dataclass(frozen=True)
class Place:
    """Where logits lie: in what order of dimensions, with what beside them, and from where on."""

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    step: int
    offset: int

    def put(self, values: Tensor) -> Tensor:
        """The same numbers in a buffer of NaN."""
        sizes = [size + gap for size, gap in zip(values.shape, self.gaps, strict=True)]
        sizes[-1] *= self.step
        in_memory = [sizes[dim] for dim in self.order]
        buffer = torch.full((self.offset + math.prod(sizes),), math.nan, dtype=values.dtype)
        back = [self.order.index(dim) for dim in range(len(sizes))]
        view = buffer[self.offset :].view(in_memory).permute(back)
        for dim, size in enumerate(values.shape):
            view = view.narrow(dim, 0, size * self.step if dim == values.dim() - 1 else size)
        return view[..., :: self.step].copy_(values)


@dataclass(frozen=True)
class Inputs:
    """Logits and labels: a kind of row for each token, in turn, and the first of them ignored."""

    shape: tuple[int, ...]
    vocab_size: int
    dtype: torch.dtype
    rows: tuple[str, ...]
    num_ignored: int
    seed: int
    place: Place
    labels_dtype: torch.dtype = torch.int64
    ignore_index: int = IGNORED

    @property
    def num_tokens(self) -> int:
        """Ignored ones, too."""
        return math.prod(self.shape)

    def make(self, rows: tuple[str, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Logits and labels; other kinds of rows, where they are asked for."""
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.num_tokens, self.vocab_size)
        logits = 3 * torch.randn(size, generator=generator, dtype=torch.float64)
        labels = torch.randint(self.vocab_size, (self.num_tokens,), generator=generator)
        kinds = rows or self.rows
        for i, label in enumerate(labels.tolist()):
            logits[i] = ROWS[kinds[i % len(kinds)]](logits[i].clone(), label)
        drop = torch.randperm(self.num_tokens, generator=generator)[: self.num_ignored]
        labels[drop] = self.ignore_index
        logits = logits.to(self.dtype).view(*self.shape, self.vocab_size)
        return self.place.put(logits), labels.to(self.labels_dtype).view(self.shape)


def some_upstream(labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nowhere 0: a row of NaN has then a gradient of 0 or of NaN, as its gate has it."""
    upstream = upstream_of(labels, dtype)
    return upstream.masked_fill(upstream == 0, 0.5)


sizes = st.one_of(
    st.integers(1, 40), st.sampled_from([127, 128, 129, 300, 1000, 4095, 4096, 4097, 5001])
)
dtypes = st.sampled_from(DTYPES)


@st.composite
def inputs(
    draw: st.DrawFn,
    rows: list[str] | None = None,
    vocab_sizes: st.SearchStrategy[int] = sizes,
    most_rows: int = 24,
) -> Inputs:
    """Of any shape, layout, dtype and kind of rows."""
    sides = draw(st.lists(st.integers(0, 5), max_size=3).filter(lambda s: math.prod(s) <= 24))
    if len(sides) == 1:  # rows enough for each thread to have some of its own
        sides = [draw(st.integers(0, most_rows))]
    vocab_size = draw(vocab_sizes)
    dims = len(sides) + 1
    plain = Place(tuple(range(dims)), (0,) * dims, 1, 0)
    placed = st.builds(
        Place,
        order=st.permutations(range(dims)).map(tuple),
        gaps=st.tuples(*[st.integers(0, 3)] * dims),
        step=st.sampled_from([1, 1, 1, 2, 3]),
        offset=st.integers(0, 9),
    )
    # A label that is ignored may be a word.
    ignore_index = draw(st.sampled_from([IGNORED, -1, 0, vocab_size - 1, 2**31 - 1]))
    return Inputs(
        tuple(sides),
        vocab_size,
        draw(dtypes),
        tuple(draw(st.lists(st.sampled_from(rows or [*ROWS]), min_size=1, max_size=5))),
        draw(st.sampled_from([0, 0, 1, 3, 1000])),
        draw(st.integers(0, 2**16)),
        draw(st.one_of(st.just(plain), placed)),
        draw(st.sampled_from([torch.int64, torch.int32])),
        ignore_index,
    )


def own_gate(nll: Tensor, entropy: Tensor) -> Tensor:
    """One that no kernel knows."""
    return entropy / (1 + nll)


# Thresholds that no entropy of equal logits hits, nor one over their number: a rounding would
# decide.
gates = st.one_of(
    st.sampled_from(
        [g for g in BUILT_IN if not isinstance(g, (HardGate, ConflictGate, ThresholdGate))]
    ),
    st.builds(EntropyGate, st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), st.sampled_from([1.0, 3.0])),
    st.sampled_from([HardGate(0.4371), ConflictGate(0.5123, 0.0871), ThresholdGate(0.0937)]),
    st.just(own_gate),
)
ks = st.one_of(st.integers(2, 128), st.just(20), st.none())


@st.composite
def options(draw: st.DrawFn, family: bool = True) -> dict[str, Any]:
    """What a token's loss is."""
    found: dict[str, Any] = {"k": draw(ks), "gate": draw(gates)}
    if not family:
        return found
    drawn = {
        "softcap": draw(st.sampled_from([None, None, 2.0, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.0625, 0.7, 3.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 0.0, 1e-4, 1e-2])),
    }
    plain = {"softcap": None, "logit_scale": 1.0, "label_smoothing": 0.0, "z_loss": 0.0}
    return found | {name: value for name, value in drawn.items() if value != plain[name]}


Call = tuple[Inputs, dict[str, Any]]


@st.composite
def calls(draw: st.DrawFn, rows: list[str] | None = None, family: bool = True) -> Call:
    """Inputs, and the options of a call with them, ``ignore_index`` among them."""
    how = draw(options(family))
    if how["gate"] is own_gate:
        how.pop("z_loss", None)  # whose gradient is then rounded by itself
    drawn = draw(inputs(rows))
    return drawn, how | {"ignore_index": drawn.ignore_index}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree in every bit, but for the sign and the payload of a NaN."""
    return same_bits(a.masked_fill(a.isnan(), math.nan), b.masked_fill(b.isnan(), math.nan))


def assert_truth(
    found: Outcome,
    logits: Tensor,
    labels: Tensor,
    upstream: Tensor,
    told_entropy: bool = False,
    **how: Any,
) -> None:
    """Hold a result to the reference in float64, by the rules of tolerances.py.

    ``told_entropy``: of all logits, which shards round before they tell it.
    """
    how = {"reduction": "none"} | how
    ref = outcome(reference.gated_ce, logits, labels, upstream, **how)
    gt = outcome(reference.gated_ce, logits.double(), labels, upstream.double(), **how)
    weights = error_weights(gt, logits, labels, upstream, **how)
    roundings = {"loss": 1} if told_entropy and how["k"] is None else {}
    assert_outcome(found, ref, gt, weights, roundings=roundings)
