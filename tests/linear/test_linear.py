"""linear_gated_ce: the loss and the gradients of an output layer whose logits are never all there.

The truth is the reference on all logits, by the rules of tolerances.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from inputs import IGNORED, dtype_name, same_bits, upstream_of
from linear_cases import NAMES, assert_linear_parity, linear_gradients, linear_inputs
from torch import Tensor

from eaft_ext import EntropyGate, FocalGate, HardGate, NoGate, linear_gated_ce, reference
from eaft_ext.linear import _chunks

pytestmark = pytest.mark.operator("gated_ce_forward_with_grad")


def _own_gate(nll: Tensor, entropy: Tensor) -> Tensor:
    return entropy / (1 + nll)


GATES: list[Any] = [EntropyGate(), EntropyGate(2.0, 3.0), FocalGate(1.5), NoGate(), _own_gate]
CHUNKS = [None, 1, 7, 1000]


def _inputs(
    device: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[Tensor], Tensor]:
    *inputs, labels = linear_inputs(dtype=dtype, device=device, **options)
    return inputs, labels


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gate", GATES, ids=lambda g: getattr(g, "name", "own"))
def test_is_the_unfused_loss(
    device: str, dtype: torch.dtype, gate: Any, reduction: str, chunk_size: int | None, route: str
) -> None:
    inputs, labels = _inputs(device, dtype, num_tokens=19, vocab_size=101, hidden_size=32)
    assert_linear_parity(inputs, labels, gate=gate, reduction=reduction, chunk_size=chunk_size)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab_size", [97, 101, 104, 50_257])
def test_nothing_is_read_that_was_not_written(
    device: str, dtype: torch.dtype, vocab_size: int, reduction: str, route: str
) -> None:
    """Rows of logits are longer than the vocabulary; what is behind it, NaN here, has no part."""
    inputs, labels = _inputs(device, dtype, num_tokens=67, vocab_size=vocab_size, hidden_size=24)
    upstream = torch.ones(67 if reduction == "none" else (), device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills fresh memory with NaN
    try:
        *_, found = linear_gradients(linear_gated_ce, inputs, labels, upstream, reduction=reduction)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(gradient.isfinite().all() for gradient in found.values())


class _OwnEntropyGate(EntropyGate):
    """The same function, which no kernel knows, and which depends on k."""


@pytest.mark.parametrize("gate", [EntropyGate(), _OwnEntropyGate()], ids=["built_in", "own"])
@pytest.mark.parametrize("vocab_size", [1, 2, 19, 33, 1000, 4099])
def test_vocabularies(
    device: str, dtype: torch.dtype, vocab_size: int, gate: Any, route: str
) -> None:
    """Also smaller ones than k."""
    hidden, weight, _ = linear_inputs(40, vocab_size, dtype, device=device, hidden_size=24)[:3]
    labels = linear_inputs(40, vocab_size, device=device)[3]
    assert_linear_parity([hidden, weight, None], labels, chunk_size=16, gate=gate)


@pytest.mark.parametrize("k", [2, 20, 128])
def test_k_and_num_items(device: str, k: int) -> None:
    inputs, labels = _inputs(device, vocab_size=300)
    for num_items in (7, torch.tensor(9), torch.tensor(9, device=device)):
        assert_linear_parity(inputs, labels, k=k, num_items_in_batch=num_items, chunk_size=4)


def test_definitions(device: str) -> None:
    """Without a gate it is PyTorch's own cross-entropy; with it, EAFT's formula written out."""
    (hidden, weight, bias), labels = _inputs(device, vocab_size=90)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = linear_gated_ce(hidden, weight, labels, bias, gate=NoGate(), chunk_size=4)
    torch.testing.assert_close(found, plain.sum() / (labels != IGNORED).sum())
    top = logits.topk(20).values.softmax(-1)
    entropy = -(top * top.log()).sum(-1)
    for normalizer, divisor in ((None, math.log(20)), (3.0, 3.0), (1.0, 1.0)):
        found = linear_gated_ce(
            hidden, weight, labels, bias, normalizer=normalizer, reduction="sum", chunk_size=4
        )
        torch.testing.assert_close(found, (plain * entropy / divisor).sum())


@pytest.mark.parametrize("num_chunks", [1, 2, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_sums_in_float32(
    device: str, dtype: torch.dtype, num_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as one product, however many chunks; in slices too."""
    monkeypatch.setattr(_chunks, "SLICE_BYTES", 4 * 70 * 64)
    inputs, labels = _inputs(
        device, dtype, num_tokens=64, vocab_size=300, hidden_size=48, ignored=0
    )
    options = {"chunk_size": 64 // num_chunks, "accumulate_in_float32": True}
    assert_linear_parity(inputs, labels, **options)


@pytest.mark.parametrize("column_size", [1, 48, 2560, 3584, 100_000])
def test_slices_begin_at_aligned_addresses(column_size: int) -> None:
    """Of 16 bytes; together they are all columns, and each takes the memory that it may take."""
    gradient = torch.empty(512, 50_257, dtype=torch.bfloat16, device="meta")
    slices = list(_chunks._slices(gradient, column_size))
    assert all(columns.start % _chunks.VECTOR == 0 for columns in slices)
    assert [i for columns in slices for i in range(columns.start, columns.stop)] == [*range(50_257)]
    width = max(columns.stop - columns.start for columns in slices)
    share = min(_chunks.SLICE_BYTES, gradient.nbytes // _chunks.SLICE_SHARE)
    if width not in (_chunks.VECTOR, 50_257):
        assert 4 * width * column_size <= share < 8 * width * column_size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_sums_in_the_weights_own_dtype(device: str, dtype: torch.dtype) -> None:
    """Every chunk rounds once, by at most half an epsilon of what has been added up so far."""
    inputs, labels = _inputs(device, dtype, num_tokens=64, vocab_size=300, ignored=0)
    found = {}
    for exact in (True, False):
        options = {"chunk_size": 8, "accumulate_in_float32": exact, "reduction": "sum"}
        upstream = torch.ones((), device=device)
        *_, found[exact] = linear_gradients(linear_gated_ce, inputs, labels, upstream, **options)
    parts = []
    for start in range(0, 64, 8):
        part = slice(start, start + 8)
        chunk = [inputs[0][part], *inputs[1:]]
        *_, its = linear_gradients(linear_gated_ce, chunk, labels[part], upstream, reduction="sum")
        parts.append(its["weight"].float())
    so_far = torch.stack(parts).cumsum(0).abs()
    epsilon = torch.finfo(dtype).eps
    error = (found[False]["weight"].float() - found[True]["weight"].float()).abs()
    assert (error <= epsilon * so_far.sum(0) + epsilon * torch.stack(parts).abs().sum(0)).all()
    assert error.max() > 0, "the two ways are one"
    assert same_bits(found[True]["hidden"], found[False]["hidden"])


def test_small_sums_are_in_float32_by_default(device: str) -> None:
    bfloat16, on = torch.bfloat16, torch.device(device)
    limit = _chunks.max_chunk_bytes(on) // 8 // 4
    assert _chunks.sum_dtype(torch.Size([limit, 1]), bfloat16, None, on) == torch.float32
    assert _chunks.sum_dtype(torch.Size([limit + 1, 1]), bfloat16, None, on) == bfloat16
    assert _chunks.sum_dtype(torch.Size([limit, 1]), bfloat16, False, on) == bfloat16
    assert _chunks.sum_dtype(torch.Size([limit + 1, 1]), bfloat16, True, on) == torch.float32
    assert _chunks.sum_dtype(torch.Size([9]), torch.float64, True, on) == torch.float64


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_one_chunk_needs_no_sum(device: str, num_chunks: int) -> None:
    weight = torch.ones(3, 2, dtype=torch.bfloat16, device=device)
    total = _chunks.WeightSum(weight, num_chunks, True)
    for _ in range(num_chunks):
        total.add(torch.ones(5, 3, device=device).bfloat16(), weight.new_ones(5, 2))
    assert total._total.dtype == (torch.bfloat16 if num_chunks == 1 else torch.float32)
    assert torch.equal(total.result(), torch.full_like(weight, 5 * num_chunks))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(route: str, reduction: str) -> None:
    """Of the loss as it is: with NoGate no factor is detached."""
    inputs, labels = _inputs("cpu", torch.float64, num_tokens=5, vocab_size=9, hidden_size=4)
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gated_ce(
            hidden, weight, labels, bias, gate=NoGate(), reduction=reduction, chunk_size=2
        )

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_tokens", [0, 6])
def test_nothing_to_learn_from(device: str, reduction: str, num_tokens: int, route: str) -> None:
    inputs, labels = _inputs(device, num_tokens=num_tokens, ignored=1.1)
    inputs[0].fill_(math.nan)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    hidden, weight, bias = leaves
    loss = linear_gated_ce(hidden, weight, labels, bias, reduction=reduction)
    assert not loss.any() and not loss.isnan().any()
    loss = loss.sum()
    loss /= 2
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_are_left_out(device: str, reduction: str, poisoned_memory: None) -> None:
    """What is in their place, in memory that nobody wrote and in the hidden, does not matter."""
    inputs, labels = _inputs(device, num_tokens=23, ignored=0.5)
    upstream = upstream_of(labels) if reduction == "none" else torch.ones((), device=device)
    options = {"reduction": reduction, "chunk_size": 4}
    valid = labels != IGNORED
    assert valid.any() and not valid.all()
    poisoned = [inputs[0].masked_fill(~valid[:, None], math.nan), *inputs[1:]]
    loss, stats, gradients = linear_gradients(
        linear_gated_ce, poisoned, labels, upstream, **options
    )
    alone = [inputs[0][valid], *inputs[1:]]
    its_upstream = upstream[valid] if reduction == "none" else upstream
    its_loss, its_stats, its_gradients = linear_gradients(
        linear_gated_ce, alone, labels[valid], its_upstream, **options
    )
    expected = torch.zeros_like(inputs[0])
    expected[valid] = its_gradients["hidden"]
    torch.testing.assert_close(gradients["hidden"], expected)
    torch.testing.assert_close(gradients["weight"], its_gradients["weight"])
    torch.testing.assert_close(loss[valid] if reduction == "none" else loss, its_loss)
    for found, its in zip(stats, its_stats, strict=True):
        assert (found is None) == (its is None)
        if found is not None:
            torch.testing.assert_close(found[valid], its)
            assert not found[~valid].any()


@pytest.mark.parametrize("factor", [1.0, 0.25, -3.7, 0.0])
def test_a_loss_that_is_scaled(device: str, factor: float) -> None:
    inputs, labels = _inputs(device)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    hidden, weight, bias = leaves
    expected = torch.autograd.grad(
        factor * reference.linear_gated_ce(hidden, weight, labels, bias), leaves
    )
    loss = linear_gated_ce(hidden, weight, labels, bias)
    for gradient, its in zip(torch.autograd.grad(factor * loss, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, its)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_backwards(device: str, reduction: str) -> None:
    inputs, labels = _inputs(device)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    hidden, weight, bias = leaves
    loss = linear_gated_ce(hidden, weight, labels, bias, reduction=reduction).sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    for gradient, its in zip(again, expected, strict=True):
        torch.testing.assert_close(gradient, 3 * its)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(device: str, reduction: str) -> None:
    inputs, labels = _inputs(device)
    hidden, weight, bias = (tensor.requires_grad_() for tensor in inputs)
    loss = linear_gated_ce(hidden, weight, labels, bias, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        gradient.sum().backward()


def test_losses_are_the_same_bits_again(device: str) -> None:
    inputs, labels = _inputs(device, num_tokens=50, vocab_size=3000)
    upstream = torch.ones((), device=device)
    runs = [
        linear_gradients(linear_gated_ce, inputs, labels, upstream, chunk_size=16) for _ in range(3)
    ]
    for loss, _, gradients in runs[1:]:
        assert same_bits(loss, runs[0][0])
        for name in NAMES:
            assert same_bits(gradients[name], runs[0][2][name]), name


@pytest.mark.parametrize(
    ("num_tokens", "row_bytes", "expected"),
    [
        (0, 100, 1),
        (1, 100, 1),
        (700, 100, 700),
        (10_000, 100, 3392),  # at most 4096, and three alike, rounded up to 64
        (4096, 4 * 49_152, 320),  # at most 64 MiB: 341, rounded down to 64
        (330, 4 * 49_152, 192),
        (4096, 4 * 1_000_000, 128),  # at least 128
        (5, 2**40, 5),
    ],
)
def test_default_chunks_on_the_cpu(num_tokens: int, row_bytes: int, expected: int) -> None:
    found = _chunks.default_chunk_size(num_tokens, row_bytes, torch.device("cpu"))
    assert found == expected
    longest = max(128, _chunks.max_chunk_bytes(torch.device("cpu")) // row_bytes)
    assert found <= longest


def test_hard_gates_and_infinite_logits(device: str) -> None:
    """A weight of 0 removes a token, whatever its nll is."""
    inputs, labels = _inputs(device, ignored=0)
    inputs[2][labels[3]] = -math.inf
    upstream = torch.ones((), device=device)
    options = {"gate": HardGate(2.0), "reduction": "sum", "chunk_size": 5}
    loss, _, gradients = linear_gradients(linear_gated_ce, inputs, labels, upstream, **options)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
