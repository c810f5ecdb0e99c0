"""What may change without the result: the words' order, a constant, the other rows, the run."""

from __future__ import annotations

from typing import Any

import torch
from drawn import (
    ROWS,
    Call,
    Inputs,
    assert_truth,
    calls,
    gates,
    holds,
    inputs,
    ks,
    same,
    some_upstream,
)
from hypothesis import strategies as st
from inputs import threads
from parity import Outcome, outcome
from torch import Tensor

import eaft_ext


def _outcome(logits: Tensor, labels: Tensor, **how: Any) -> Outcome:
    return outcome(
        eaft_ext.gated_ce, logits, labels, some_upstream(labels), reduction="none", **how
    )


def _assert_same(found: Outcome, expected: Outcome, what: str) -> None:
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert same(a, b), f"{name} differs {what}"


@holds(call=calls())
def test_permuting_the_vocabulary_permutes_the_gradient(call: Call) -> None:
    drawn, how = call
    logits, labels = drawn.make()
    generator = torch.Generator().manual_seed(drawn.seed + 1)
    order = torch.randperm(drawn.vocab_size, generator=generator)
    new_place = order.argsort()
    ignored = labels == drawn.ignore_index
    permuted = torch.where(ignored, -100, new_place[labels.long().masked_fill(ignored, 0)])
    found = _outcome(logits[..., order], permuted, **how | {"ignore_index": -100})
    found = found._replace(gradient=found.gradient[..., new_place])
    assert_truth(found, logits, labels, some_upstream(labels), **how)


@holds(
    drawn=inputs(),
    k=ks,
    gate=gates,
    logit_scale=st.sampled_from([0.25, 1.0, 2.0]),
    constant=st.integers(-16, 16),
)
def test_adding_a_constant_to_rows_changes_nothing(
    drawn: Inputs, k: int | None, gate: Any, logit_scale: float, constant: int
) -> None:
    """In no bit, where every sum is a number of the dtype: eighths below 32, also of 8 bits."""
    logits, labels = drawn.make()
    generator = torch.Generator().manual_seed(drawn.seed)
    eighths = torch.randint(-127, 128, logits.shape, generator=generator) / 8
    how = {"k": k, "gate": gate, "logit_scale": logit_scale, "ignore_index": drawn.ignore_index}
    expected = _outcome(logits.copy_(eighths).clone(), labels, **how)
    _assert_same(_outcome(logits.copy_(eighths + constant), labels, **how), expected, "with it")


@holds(20, call=calls(), others=st.lists(st.integers(0, 15), min_size=1))
def test_rows_do_not_see_each_other(call: Call, others: list[int]) -> None:
    """Whatever becomes of every second one."""
    drawn, how = call
    logits, labels = drawn.make()
    expected = _outcome(logits, labels, **how)
    kinds = [*ROWS]
    changed, _ = drawn.make(tuple(kinds[i] for i in others))
    odd = (torch.arange(drawn.num_tokens) % 2 == 1).view(drawn.shape)
    mixed = drawn.place.put(torch.where(odd.unsqueeze(-1), changed, logits))
    found = _outcome(mixed, labels, **how)
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert same(a[~odd], b[~odd]), name


@holds(call=calls())
def test_a_row_alone_is_the_row_among_others(call: Call) -> None:
    drawn, how = call
    logits, labels = drawn.make()
    upstream = some_upstream(labels)
    among = _outcome(logits, labels, **how)
    flat = logits.reshape(-1, drawn.vocab_size)
    for i in range(min(3, drawn.num_tokens)):
        alone = outcome(
            eaft_ext.gated_ce,
            flat[i],
            labels.reshape(-1)[i],
            upstream.reshape(-1)[i],
            reduction="none",
            **how,
        )
        for name, a, b in zip(Outcome._fields, alone, among, strict=True):
            assert same(a, b.reshape(drawn.num_tokens, *a.shape)[i]), name


@holds(call=calls(), count=st.integers(1, 4), offset=st.integers(0, 9))
def test_a_second_run_gives_the_same_bits(call: Call, count: int, offset: int) -> None:
    """Also with other threads, and of logits that lie elsewhere."""
    drawn, how = call
    logits, labels = drawn.make()
    first = _outcome(logits, labels, **how)
    _assert_same(_outcome(logits, labels, **how), first, "in a second run")
    moved = torch.empty(offset + logits.numel(), dtype=logits.dtype)[offset:].view(logits.shape)
    with threads(count):
        _assert_same(_outcome(moved.copy_(logits), labels, **how), first, f"with {count} threads")
