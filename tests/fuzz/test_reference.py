"""Whatever is called, it gives what the reference gives, by the rules of tolerances.py."""

from __future__ import annotations

from typing import Any

import torch
from drawn import Call, Inputs, assert_truth, calls, holds, inputs, same, some_upstream
from error_model import error_weights
from hypothesis import strategies as st
from inputs import dtype_name
from parity import Outcome, outcome
from tolerances import LOSS_FACTOR, assert_within
from torch import Tensor

import eaft_ext
from eaft_ext import GatedCrossEntropyLoss, reference

REDUCTIONS = [
    {"reduction": "none"},
    {"reduction": "sum"},
    {"reduction": "mean"},
    {"reduction": "mean", "num_items_in_batch": 7},
    {"reduction": "mean", "num_items_in_batch": 0},
    {"reduction": "mean", "num_items_in_batch": torch.tensor(3)},
]
reductions = st.sampled_from(REDUCTIONS)


def _token_weight(drawn: Inputs, labels: Tensor, weighs: bool) -> dict[str, Any]:
    if not weighs:
        return {}
    generator = torch.Generator().manual_seed(drawn.seed)
    weight = torch.randint(0, 5, labels.shape, generator=generator) / 4
    return {"token_weight": weight}


@holds(60, call=calls(), reduction=reductions, weighs=st.booleans())
def test_gated_ce(call: Call, reduction: dict[str, Any], weighs: bool) -> None:
    drawn, how = call
    logits, labels = drawn.make()
    weight = _token_weight(drawn, labels, weighs)
    unreduced = reduction["reduction"] == "none"
    upstream = some_upstream(labels) if unreduced else torch.tensor(-1.75)
    how = how | reduction | weight
    found = outcome(eaft_ext.gated_ce, logits, labels, upstream, **how)
    assert_truth(found, logits, labels, upstream, **how)


@holds(call=calls(), reduction=reductions)
def test_the_module_is_the_function(call: Call, reduction: dict[str, Any]) -> None:
    drawn, how = call
    logits, labels = drawn.make()
    items = {k: v for k, v in reduction.items() if k == "num_items_in_batch"}
    how = how | {"reduction": reduction["reduction"]}
    module = GatedCrossEntropyLoss(**how)
    assert same(module(logits, labels, **items), eaft_ext.gated_ce(logits, labels, **how, **items))


@holds(call=calls(), reduction=st.sampled_from(["mean", "sum"]))
def test_ways_to_a_gradient(call: Call, reduction: str) -> None:
    """In place or not, in the forward or not: the same bits of the gradient."""
    drawn, how = call
    logits, labels = drawn.make()
    how = how | {"reduction": reduction}
    found = {}
    for in_place in (False, True):
        for in_forward in (False, True):
            leaf = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype)
            leaf = leaf.copy_(logits).requires_grad_()
            try:
                loss = eaft_ext.gated_ce(
                    leaf, labels, inplace_backward=in_place, gradient_in_forward=in_forward, **how
                )
            except ValueError as error:
                assert in_place and "in place" in str(error), error
                continue
            (gradient,) = torch.autograd.grad(loss, leaf)
            found[in_place, in_forward] = loss.detach(), gradient.clone()
    _, expected = found[False, False]
    for way, (_, gradient) in found.items():
        assert same(gradient, expected), way


@holds(drawn=inputs(), k=st.integers(1, 128))
def test_topk(drawn: Inputs, k: int) -> None:
    logits, _ = drawn.make()
    k = min(k, drawn.vocab_size)
    values, indices = eaft_ext.topk(logits, k)
    expected_values, expected_indices = reference.topk(logits, k)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected_indices), dtype_name(logits.dtype)


@holds(call=calls())
def test_statistics(call: Call) -> None:
    """All that can be told of a token, where the label's place among the logits does not decide."""
    drawn, how = call
    logits, labels = drawn.make()
    full = how | {"return_stats": "full"}
    _, stats = eaft_ext.gated_ce(logits, labels, **full)
    _, ref = reference.gated_ce(logits, labels, **full)
    _, truth = reference.gated_ce(logits.double(), labels, **full)
    assert torch.equal(stats.valid, truth.valid)
    weights = error_weights(truth, logits, labels, **how)
    for name in ("lse", "z_loss", "vocab_entropy"):
        values = [getattr(told, name) for told in (stats, ref, truth)]
        if values[0] is None:
            assert values[1] is None, name
            continue
        vectors = [value if value.dim() else value.unsqueeze(0) for value in values]
        assert_within(name, *vectors, LOSS_FACTOR, weights[name])
    if not {"softcap", "logit_scale"} & set(how):
        assert torch.equal(stats.correct, truth.correct)


def test_outcome_has_what_is_compared() -> None:
    """A property that compares nothing would hold."""
    logits, labels = torch.randn(3, 7), torch.tensor([1, 2, -100])
    found = outcome(eaft_ext.gated_ce, logits, labels, torch.ones(3), reduction="none")
    assert len(found) == len(Outcome._fields) and found.gradient.count_nonzero() == 14
