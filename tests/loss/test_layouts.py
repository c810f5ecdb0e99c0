"""Layouts of logits: read in place, copied or refused, with the same results for all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inputs import DTYPES, REFUSAL, agree, bits, same_bits, upstream_of
from layouts import ALL, COPIED, OVERLAPPING, READ_IN_PLACE, Layout, build
from parity import Outcome, outcome
from torch import Tensor

import eaft_ext

ops = torch.ops.eaft_ext

WORDS = 7

# Without elements: contiguous, as PyTorch has it, whatever their strides are.
NO_ROWS: dict[str, Layout] = {
    "matrix": ((0, WORDS), lambda buffer: buffer),
    "every_other_logit": ((0, 2 * WORDS), lambda buffer: buffer[:, ::2]),
    "vocabulary_first": ((WORDS, 0), lambda buffer: buffer.t()),
    "expanded_logits": ((0, 1), lambda buffer: buffer.expand(0, WORDS)),
    "none_of_expanded_rows": ((1, 1), lambda buffer: buffer.expand(5, WORDS)[:0]),
    "empty_sequences": ((1, 0, 5, 2 * WORDS), lambda buffer: buffer[..., ::2]),
    "empty_batch": ((WORDS, 5, 0), lambda buffer: buffer.permute(2, 1, 0)),
    "seven_dimensions": (
        (2, 2, 2, 2, 2, WORDS + 2, 0),
        lambda buffer: buffer.permute(4, 3, 2, 1, 0, 6, 5)[..., :WORDS],
    ),
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ALL)
def test_the_same_as_contiguous(device: str, dtype: torch.dtype, name: str, route: str) -> None:
    _, logits, labels = build(name, dtype, device)
    assert logits.isfinite().all()
    upstream = upstream_of(labels)
    expected = outcome(eaft_ext.gated_ce, logits.contiguous(), labels, upstream, reduction="none")
    found = outcome(eaft_ext.gated_ce, logits, labels, upstream, reduction="none")
    for field, a, b in zip(Outcome._fields, found, expected, strict=True):
        if route == "kernel":
            assert agree(a, b), field
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_the_buffer(device: str, dtype: torch.dtype, name: str) -> None:
    """Nothing but the logits' own elements has a gradient, and NaN beside them does not leak."""
    buffer, logits, labels = build(name, dtype, device)
    upstream = upstream_of(labels)
    expected = outcome(eaft_ext.gated_ce, logits.contiguous(), labels, upstream, reduction="none")
    buffer.requires_grad_()
    view = ALL[name][1](buffer)
    eaft_ext.gated_ce(view, labels, reduction="none").backward(upstream)
    (wanted,) = torch.autograd.grad(ALL[name][1](buffer), buffer, expected.gradient)
    assert buffer.grad is not None
    assert agree(buffer.grad, wanted)


@pytest.mark.parametrize("name", ALL)
def test_fused_gradient(device: str, dtype: torch.dtype, name: str) -> None:
    _, logits, labels = build(name, dtype, device)
    upstream = upstream_of(labels)
    plain = ops.gated_ce_forward_with_grad(
        upstream, logits.contiguous(), labels, 20, "entropy", [1.0], -100
    )
    found = ops.gated_ce_forward_with_grad(upstream, logits, labels, 20, "entropy", [1.0], -100)
    for a, b in zip(found, plain, strict=True):
        assert agree(a, b)


@pytest.mark.parametrize("name", ALL)
def test_gradient_in_forward_is_scaled(device: str, dtype: torch.dtype, name: str) -> None:
    """In its own memory, in whatever order that has the dimensions."""
    _, logits, labels = build(name, dtype, device)
    gradients = []
    for leaf in (logits.contiguous().requires_grad_(), logits.detach().requires_grad_()):
        loss = eaft_ext.gated_ce(leaf, labels, gradient_in_forward=True)
        (gradient,) = torch.autograd.grad(-2.5 * loss, leaf)
        gradients.append(gradient)
    assert gradients[0].count_nonzero() > 0
    assert agree(gradients[1], gradients[0])


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["rows", "batch"])
@pytest.mark.parametrize("inplace", [False, True], ids=["of_its_own", "in_place"])
def test_one_word_in_rows_that_are_apart(
    device: str, shape: tuple[int, ...], inplace: bool
) -> None:
    wide = torch.randn(*shape, 3, device=device)
    leaf = wide[..., :1].detach().requires_grad_()
    labels = torch.zeros(shape, dtype=torch.int64, device=device)
    loss = eaft_ext.gated_ce(
        leaf, labels, gate=eaft_ext.NoGate(), gradient_in_forward=True, inplace_backward=inplace
    )
    (gradient,) = torch.autograd.grad(0.5 * loss, leaf)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(gradient))


def _spread(values: Tensor) -> Tensor:
    """The same numbers, every other one of a buffer of NaN."""
    buffer = torch.full((*values.shape, 2), math.nan, dtype=values.dtype, device=values.device)
    buffer[..., 1] = values
    return buffer[..., 1]


@pytest.mark.parametrize("fused", [False, True], ids=["backward", "forward_with_grad"])
@pytest.mark.parametrize("kind", ["expanded", "strided", "float64", "bfloat16"])
def test_numbers_per_row_of_any_layout(device: str, kind: str, fused: bool) -> None:
    """Upstream gradients as autograd hands them over, stride 0 and all, and saved statistics."""
    _, logits, labels = build("matrix", torch.float32, device)
    numbers = torch.tensor([2.0, -1.0, 0.5, 0.0, 4.0, -8.0], device=device)
    changed = {
        "expanded": lambda x: x[:1].expand(6) if x is numbers else x,
        "strided": _spread,
        "float64": torch.Tensor.double,
        "bfloat16": lambda x: x.bfloat16() if x is numbers else x,
    }[kind]
    plain = torch.full_like(numbers, 2.0) if kind == "expanded" else numbers
    *_, row_max, log_sum, _ = ops.gated_ce_forward(logits, labels, 20, "none", [], -100)
    if fused:
        options = (logits, labels, 20, "none", [], -100)
        expected = ops.gated_ce_forward_with_grad(plain, *options)[-1]
        found = ops.gated_ce_forward_with_grad(changed(numbers), *options)[-1]
    else:
        expected = ops.gated_ce_backward(plain, logits, labels, row_max, log_sum, -100)
        saved = changed(row_max), changed(log_sum)
        found = ops.gated_ce_backward(changed(numbers), logits, labels, *saved, -100)
    assert same_bits(found, expected)


@pytest.mark.operator("topk")
@pytest.mark.parametrize("name", ALL)
def test_topk(device: str, dtype: torch.dtype, name: str) -> None:
    _, logits, _ = build(name, dtype, device)
    values, indices = eaft_ext.topk(logits, 20)
    expected_values, expected_indices = eaft_ext.topk(logits.contiguous(), 20)
    assert torch.equal(values, expected_values) and torch.equal(indices, expected_indices)


@pytest.mark.parametrize("name", READ_IN_PLACE)
@pytest.mark.parametrize("fused", [False, True], ids=["backward_", "forward_with_grad_"])
def test_in_place_changes_the_view_alone(
    device: str, dtype: torch.dtype, name: str, fused: bool
) -> None:
    buffer, logits, labels = build(name, dtype, device)
    before = bits(buffer).clone()
    upstream = upstream_of(labels)
    expected = outcome(
        eaft_ext.gated_ce, logits.contiguous(), labels, upstream, reduction="none"
    ).gradient
    version = logits._version
    if fused:
        ops.gated_ce_forward_with_grad_(upstream, logits, labels, 20, "entropy", [1.0], -100)
    else:
        _, _, _, gate, row_max, log_sum, _ = ops.gated_ce_forward(
            logits, labels, 20, "entropy", [1.0], -100
        )
        ops.gated_ce_backward_(upstream * gate, logits, labels, row_max, log_sum, -100)
    assert agree(logits, expected)
    assert logits._version > version
    outside = torch.ones(buffer.shape, dtype=torch.bool, device=device)
    READ_IN_PLACE[name][1](outside).fill_(False)
    assert torch.equal(bits(buffer)[outside], before[outside])


@pytest.mark.parametrize("name", COPIED | OVERLAPPING)
@pytest.mark.parametrize("fused", [False, True], ids=["backward_", "forward_with_grad_"])
def test_in_place_refuses_what_it_cannot_overwrite(
    device: str, dtype: torch.dtype, name: str, fused: bool
) -> None:
    buffer, logits, labels = build(name, dtype, device)
    before = bits(buffer).clone()
    stats = torch.ones(labels.shape, device=device)
    with pytest.raises(REFUSAL, match=r"in place.*sizes \[.*strides \["):
        if fused:
            ops.gated_ce_forward_with_grad_(stats, logits, labels, 20, "none", [], -100)
        else:
            ops.gated_ce_backward_(stats, logits, labels, stats, stats, -100)
    assert torch.equal(bits(buffer), before)


@pytest.mark.parametrize("name", COPIED | OVERLAPPING)
def test_inplace_backward_is_refused_in_the_forward(
    device: str, dtype: torch.dtype, name: str
) -> None:
    """Before the work is done; and not at all where there will be no backward."""
    buffer, logits, labels = build(name, dtype, device)
    logits = logits.detach()
    expected = eaft_ext.gated_ce(logits, labels)
    with pytest.raises(ValueError, match=r"in place.*sizes \[.*strides \["):
        eaft_ext.gated_ce(ALL[name][1](buffer.requires_grad_()), labels, inplace_backward=True)
    assert same_bits(eaft_ext.gated_ce(logits, labels, inplace_backward=True), expected)


def _no_rows(name: str, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits in every dtype, and labels."""
    shape, view = NO_ROWS[name]
    for dtype in DTYPES:
        if dtype != torch.float64 or device == "cpu":
            logits = view(torch.empty(shape, dtype=dtype, device=device))
            yield logits, torch.empty(logits.shape[:-1], dtype=torch.int64, device=device)


def _assert_nothing_to_learn(loss: Tensor, labels: Tensor, *leaves: Tensor) -> None:
    assert loss.shape in (torch.Size(), labels.shape) and not loss.any()
    gradients = torch.autograd.grad(loss.sum(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
        assert not gradient.any()


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"num_items_in_batch": 3}, {"gradient_in_forward": True}],
    ids=str,
)
@pytest.mark.parametrize("name", NO_ROWS)
def test_no_rows(
    device: str, name: str, options: dict[str, Any], inplace: bool, route: str
) -> None:
    for logits, labels in _no_rows(name, device):
        leaf = logits.requires_grad_()
        loss, stats = eaft_ext.gated_ce(
            leaf, labels, inplace_backward=inplace, return_stats=True, **options
        )
        assert all(stat.shape == labels.shape for stat in stats if stat is not None)
        _assert_nothing_to_learn(loss, labels, leaf)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"chunk_size": 2}], ids=str)
@pytest.mark.parametrize("name", NO_ROWS)
def test_no_rows_of_hidden(device: str, name: str, options: dict[str, Any], route: str) -> None:
    for hidden, labels in _no_rows(name, device):
        weight = torch.ones(11, WORDS, dtype=hidden.dtype, device=device)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        loss = eaft_ext.linear_gated_ce(*leaves, labels, **options)
        _assert_nothing_to_learn(loss, labels, *leaves)


@pytest.mark.parametrize("name", NO_ROWS)
def test_operators_on_no_rows(device: str, name: str) -> None:
    """The whole vocabulary, a shard with padding, and one of nothing but padding."""
    entropy = ("entropy", [1.0], -100)
    for logits, labels in _no_rows(name, device):
        shape = labels.shape
        *forward, extra = ops.gated_ce_forward(logits, labels, 20, *entropy, True)
        row_max = forward[4]
        options = (row_max, logits, labels, 20, *entropy)
        *fused, fused_extra, gradient = ops.gated_ce_forward_with_grad(*options)
        *in_place, in_place_extra = ops.gated_ce_forward_with_grad_(*options)
        assert {stat.shape for stat in (*forward, *fused, *in_place)} == {shape}
        extras = (extra, fused_extra, in_place_extra)
        assert {extra.shape for extra in extras} == {(0, *shape)}
        assert gradient.shape == logits.shape
        for shard in ((), (3, None), (3, 3 + WORDS - 2), (3, 2)):
            arguments = (row_max, logits, labels, row_max, row_max, -100, *shard)
            assert ops.gated_ce_backward(*arguments).shape == logits.shape
            ops.gated_ce_backward_(*arguments)
            if shard:
                partial = ops.gated_ce_partial(logits, labels, 20, *shard, -100)
                assert partial.shape == (*shape, 23)
                *merged, extra = ops.gated_ce_merge(
                    logits, labels, partial.unsqueeze(0), 20, *entropy, *shard, True
                )
                assert {stat.shape for stat in merged} == {shape} and extra.shape == (0, *shape)
        ops.scale_gradient_(logits, torch.ones((), dtype=torch.float32, device=device))
        values, indices = eaft_ext.topk(logits, 3)
        assert values.shape == indices.shape == (*shape, 3) and values.dtype == logits.dtype
