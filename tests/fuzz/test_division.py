"""The whole and its parts: shards of the vocabulary, and chunks of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from drawn import (
    FINITE,
    Call,
    assert_truth,
    calls,
    dtypes,
    gates,
    holds,
    ks,
    options,
    some_upstream,
)
from hypothesis import strategies as st
from inputs import dtype_name
from linear_cases import assert_linear_parity, linear_gradients, linear_inputs
from tolerances import ATOL
from torch.nn.functional import pad
from vocab_shards import outcome_of_shards

from eaft_ext import gated_ce, linear_gated_ce

cuts = st.lists(st.floats(0, 1), max_size=6)


def _widths(columns: int, cuts: list[float]) -> list[int]:
    """Of shards that end at these shares of the columns; some are empty."""
    ends = [*sorted(round(cut * columns) for cut in cuts), columns]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@holds(30, call=calls(), cuts=cuts, padding=st.integers(0, 40))
def test_shards_in_any_division_are_the_whole(call: Call, cuts: list[float], padding: int) -> None:
    """With padding behind the words, which is NaN here."""
    drawn, how = call
    logits, labels = drawn.make()
    padded = pad(logits, (0, padding), value=math.nan)
    upstream = some_upstream(labels)
    widths = _widths(padded.size(-1), cuts)
    found = outcome_of_shards(padded, labels, upstream, widths, vocab_size=drawn.vocab_size, **how)
    assert not found.gradient[..., drawn.vocab_size :].any()
    found = found._replace(gradient=found.gradient[..., : drawn.vocab_size])
    assert_truth(found, logits, labels, upstream, told_entropy=True, **how)


products = {
    "num_tokens": st.integers(0, 20),
    "vocab_size": st.one_of(st.integers(1, 70), st.sampled_from([128, 999])),
    "hidden_size": st.integers(1, 24),
    "ignored": st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    "seed": st.integers(0, 2**16),
}
sizes_of_products = st.fixed_dictionaries(products)
chunks = st.one_of(st.none(), st.integers(1, 25))


@holds(
    20,
    sizes=sizes_of_products,
    dtype=dtypes,
    k=ks,
    gate=gates,
    chunk_size=chunks,
    has_bias=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_the_linear_loss_is_that_of_its_logits(
    sizes: dict[str, Any], dtype: torch.dtype, has_bias: bool, **how: Any
) -> None:
    *tensors, labels = linear_inputs(dtype=dtype, **sizes)
    if not has_bias:
        tensors[2] = None
    assert_linear_parity(tensors, labels, **how)


@holds(
    20,
    sizes=sizes_of_products,
    how=options(),
    first=chunks,
    second=chunks,
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_chunks_of_any_size_are_one(
    sizes: dict[str, Any],
    how: dict[str, Any],
    first: int | None,
    second: int | None,
    reduction: str,
) -> None:
    """In float64, where nothing but the order of sums is left to differ."""
    *tensors, labels = linear_inputs(dtype=torch.float64, **sizes)
    upstream = torch.tensor(-1.75, dtype=torch.float64)
    if reduction == "none":
        upstream = some_upstream(labels, torch.float64)
    runs = [
        linear_gradients(
            linear_gated_ce, tensors, labels, upstream, chunk_size=size, reduction=reduction, **how
        )
        for size in (first, second)
    ]
    (loss, stats, gradients), (its_loss, its_stats, its_gradients) = runs
    pairs = {"loss": (loss, its_loss), "entropy": (stats.entropy, its_stats.entropy)}
    pairs |= {name: (gradients[name], its_gradients[name]) for name in gradients}
    for name, (a, b) in pairs.items():
        atol = ATOL[torch.float64] * (1 + b.abs().max().item() if b.numel() else 1)
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=name)


@holds(call=calls(FINITE), cut=st.integers(0, 24))
def test_batches_in_any_division_are_the_whole(call: Call, cut: int) -> None:
    """As gradient accumulation divides them, over the number of items of all."""
    drawn, how = call
    logits, labels = drawn.make()
    logits = logits.reshape(-1, drawn.vocab_size)
    labels = labels.reshape(-1)
    number = int((labels != drawn.ignore_index).sum())
    whole = logits.clone().requires_grad_()
    gated_ce(whole, labels, **how).backward()
    parts = logits.clone().requires_grad_()
    for rows in (slice(0, cut), slice(cut, None)):
        gated_ce(parts[rows], labels[rows], num_items_in_batch=number, **how).backward()
    assert whole.grad is not None and parts.grad is not None
    assert torch.equal(parts.grad, whole.grad), dtype_name(drawn.dtype)
