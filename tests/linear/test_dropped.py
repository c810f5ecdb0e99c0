"""Tokens that teach nothing are left out of the gradients, exactly; with drop_below, some more."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from inputs import IGNORED, dtype_name, same_bits
from linear_cases import linear_inputs
from tolerances import GRADIENT_FACTOR, assert_within
from torch import Tensor

from eaft_ext import (
    ConflictGate,
    EntropyGate,
    HardGate,
    NoGate,
    ThresholdGate,
    linear_gated_ce,
    reference,
)
from eaft_ext._options import TokenLoss
from eaft_ext.linear import _dropped, _operators
from eaft_ext.linear._dropped import Weights, dropped, kept_rows, moved_up, scores

TOKENS, WORDS, WIDTH = 67, 101, 24
NAMES = ("hidden", "weight", "bias")


def _half(device: str, dtype: torch.dtype = torch.float32) -> float:
    """A threshold of the entropy that mutes about half of the tokens, and that none is close to."""
    hidden, weight, bias, _ = linear_inputs(TOKENS, WORDS, dtype, device=device, hidden_size=WIDTH)
    logits = torch.nn.functional.linear(hidden.float(), weight.float(), bias.float())
    middle = (reference.topk_entropy(logits, 20) / math.log(20)).sort()[0][
        TOKENS // 3 : -TOKENS // 3
    ]
    widest = int(middle.diff().argmax())
    return float(middle[widest : widest + 2].mean())


def _inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    *inputs, labels = linear_inputs(TOKENS, WORDS, dtype, device=device, hidden_size=WIDTH)
    return inputs, labels


def _gradients(
    inputs: list[Tensor], labels: Tensor, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Any, list[Tensor]]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    hidden, weight, bias = leaves
    loss, stats = linear_gated_ce(hidden, weight, labels, bias, return_stats=True, **options)
    found = torch.autograd.grad(loss, leaves, upstream)
    return loss.detach(), stats, list(found)


def _nothing_dropped(of_token: Any, weights: Weights, drop_below: float) -> Tensor:
    return torch.zeros_like(weights.upstream, dtype=torch.bool)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each chunk's products were of."""
    rows: list[int] = []
    original = _operators._Gradients.add

    def add(self: Any, chunk: Any, hidden: Tensor, gradient: Tensor) -> None:
        rows.append(len(gradient))
        assert len(hidden) == len(gradient) == chunk.size
        original(self, chunk, hidden, gradient)

    monkeypatch.setattr(_operators._Gradients, "add", add)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("in_float32", [True, False])
@pytest.mark.usefixtures("route")
def test_exact_zeros(
    device: str,
    dtype: torch.dtype,
    chunk_size: int | None,
    reduction: str,
    in_float32: bool,
    products: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hard gate's gradients are those without dropping; loss and stats are the same bits."""
    inputs, labels = _inputs(device, dtype)
    options: dict[str, Any] = {"gate": HardGate(_half(device, dtype)), "chunk_size": chunk_size}
    options |= {"reduction": reduction, "accumulate_in_float32": in_float32}
    upstream = torch.linspace(-2, 2, TOKENS, device=device) if reduction == "none" else None
    if upstream is not None:
        upstream = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
    loss, stats, found = _gradients(inputs, labels, upstream, **options)
    count = sum(products)
    valid = int((labels != IGNORED).sum())
    expected = stats.gate != 0
    if upstream is not None:
        expected &= upstream != 0
    assert count == int(expected.sum()) < 0.7 * valid
    products.clear()
    with monkeypatch.context() as patched:
        patched.setattr(_operators, "dropped", _nothing_dropped)
        whole_loss, whole_stats, whole = _gradients(inputs, labels, upstream, **options)
    assert sum(products) == valid
    assert same_bits(loss, whole_loss) and same_bits(stats.gate, whole_stats.gate)
    options.pop("chunk_size"), options.pop("accumulate_in_float32")
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    exact = reference.linear_gated_ce(*wide[:2], labels, wide[2], **options)
    truth = torch.autograd.grad(exact, wide, None if upstream is None else upstream.double())
    # Sums of other rows are rounded elsewhere: once, or after each chunk.
    roundings = 0 if dtype != torch.bfloat16 else 1 if in_float32 else len(products)
    for name, one, other, true in zip(NAMES, found, whole, truth, strict=True):
        assert_within(name, one, other, true, GRADIENT_FACTOR, roundings=roundings)
    assert not found[0][~expected].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "gate", [ConflictGate(0.9, 0.5), ThresholdGate(0.02), HardGate(2.0), HardGate(-1.0), NoGate()]
)
def test_other_gates(device: str, gate: Any, reduction: str, products: list[int]) -> None:
    """Also those that mute all tokens or none."""
    inputs, labels = _inputs(device)
    options: dict[str, Any] = {"gate": gate, "reduction": reduction, "chunk_size": 16}
    upstream = torch.ones(TOKENS, device=device) if reduction == "none" else None
    _, stats, found = _gradients(inputs, labels, upstream, **options)
    assert sum(products) == int((stats.gate != 0).sum())
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    del options["chunk_size"]
    whole = reference.linear_gated_ce(*leaves[:2], labels, leaves[2], **options)
    expected = torch.autograd.grad(whole, leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_upstream_gradients_of_zero(device: str, products: list[int]) -> None:
    """Also beside a z-loss, of which a token with a gate of 0 has a part."""
    inputs, labels = _inputs(device)
    upstream = torch.ones(TOKENS, device=device)
    upstream[::3] = 0
    options: dict[str, Any] = {"gate": HardGate(_half(device)), "z_loss": 0.1}
    options["reduction"] = "none"
    _, _, found = _gradients(inputs, labels, upstream, **options)
    assert sum(products) == int(((labels != IGNORED) & (upstream != 0)).sum())
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    whole = reference.linear_gated_ce(*leaves[:2], labels, leaves[2], **options)
    for a, b in zip(found, torch.autograd.grad(whole, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nan_stays(device: str) -> None:
    """In the gradient of its token's hidden, and of all weights."""
    (hidden, weight, bias), labels = _inputs(device)
    labels[5] = 3
    hidden[5, 0] = math.nan
    gate = HardGate(_half(device))
    for options in ({}, {"drop_below": 0.5}, {"reduction": "none"}):
        upstream = torch.ones(TOKENS, device=device) if options.get("reduction") else None
        _, _, found = _gradients([hidden, weight, bias], labels, upstream, gate=gate, **options)
        assert found[0][5].isnan().all() and found[1].isnan().all()
        others = torch.arange(TOKENS, device=device) != 5
        assert not found[0][others].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("share", [1e-3, 0.1, 0.6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_drop_below(
    device: str,
    dtype: torch.dtype,
    share: float,
    reduction: str,
    smoothing: float,
    products: list[int],
) -> None:
    """The smallest scores of each chunk go, as many as the share allows, and the error is bounded.

    Scores are computed here from the definition: half of the L1 norm of the gradient by the logits.
    """
    inputs, labels = _inputs(device, dtype)
    chunk = 20 if reduction != "none" else TOKENS
    options: dict[str, Any] = {"chunk_size": chunk, "reduction": reduction}
    options["label_smoothing"] = smoothing
    upstream = None
    if reduction == "none":
        upstream = torch.linspace(-2, 2, TOKENS, device=device)
        upstream = upstream.to(torch.float64 if dtype == torch.float64 else torch.float32)
    loss, stats, found = _gradients(inputs, labels, upstream, drop_below=share, **options)
    whole_loss, whole_stats, whole = _gradients(inputs, labels, upstream, **options)
    assert same_bits(loss, whole_loss) and same_bits(stats.nll, whole_stats.nll)
    assert whole_stats.dropped is None
    surprise = -torch.expm1(-stats.nll)
    score = stats.gate * ((1 - smoothing) * surprise + smoothing)
    if upstream is not None:
        score = score * upstream.abs()
    places = (labels != IGNORED).nonzero().squeeze(1)
    expected = torch.zeros_like(labels, dtype=torch.bool)
    start = pending = 0
    while start < len(places):  # as many as fit beside what is left of the chunk before
        some = places[start : start + chunk - pending]
        start += len(some)
        order = some[score[some].argsort(stable=True)]
        total = score[order].double().cumsum(0)
        expected[order[total <= share * total[-1]]] = True
        pending += int((~expected[some]).sum())
        pending *= 2 * pending < chunk
    gone = ~found[0].any(-1) & (labels != IGNORED)
    assert torch.equal(gone, expected) and (share < 0.1 or expected.any())
    if reduction == "none":
        assert stats.dropped is None
    else:
        assert torch.equal(stats.dropped, expected)
        assert (score * stats.dropped).sum() <= share * score.sum() * (1 + 1e-5)
    if dtype == torch.bfloat16:
        return
    hidden, weight, _ = (tensor.double() for tensor in inputs)
    scale = score.double()
    if reduction == "mean":
        scale = scale / len(places)
    bound = math.sqrt(2) * (scale * hidden.norm(dim=1))[expected].sum()
    slack = 1e-5 * whole[1].double().norm()
    assert (found[1].double() - whole[1].double()).norm() <= bound + slack
    torch.testing.assert_close(found[0][~expected], whole[0][~expected], rtol=1e-5, atol=1e-6)
    lost = math.sqrt(2) * scale[expected] * torch.linalg.matrix_norm(weight, 2)
    assert (whole[0][expected].double().norm(dim=1) <= lost + slack).all()


def test_scores_are_half_of_the_norm(device: str) -> None:
    (hidden, weight, bias), labels = _inputs(device)
    labels = labels.clamp(min=0)
    x = torch.nn.functional.linear(hidden, weight, bias).double().requires_grad_()
    loss, stats = reference.gated_ce(x, labels, reduction="none", return_stats=True)
    upstream = torch.linspace(-2, 2, TOKENS, device=device, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss, x, upstream)
    of_token = TokenLoss(20, EntropyGate(), IGNORED)
    found = scores(of_token, Weights(upstream, stats.gate, stats.nll))
    torch.testing.assert_close(2 * found, gradient.abs().sum(-1))


@pytest.mark.parametrize(
    "kept", [[], [0], [5], [0, 1, 2], [3, 4, 5], [0, 2, 4], [1, 3, 5], [0, 1, 2, 3, 4, 5]]
)
@pytest.mark.parametrize("step", [None, 1, 2, 100])
def test_rows_move_up_in_place(kept: list[int], step: int | None, monkeypatch: Any) -> None:
    """One by one as on a CPU, and some at a time as elsewhere."""
    if step is not None:
        monkeypatch.setattr(_dropped, "SLICE_BYTES", step * 3 * 4)
        monkeypatch.setattr(_dropped, "_move_one_by_one", _dropped._move_some_at_a_time)
    rows = torch.arange(18.0).view(6, 3)
    before = rows.clone()
    order = moved_up(rows, torch.tensor(kept, dtype=torch.int64))
    assert sorted(order.tolist()) == kept
    assert torch.equal(rows[: len(kept)], before[order])


def test_which_rows_are_dropped() -> None:
    of_token = TokenLoss(20, NoGate(), IGNORED)
    p = torch.tensor([0.9, 0.5, 0.98, 0.99, 0.2])
    weights = Weights(torch.ones(5), torch.ones(5), -p.log())
    # Scores: .1 .5 .02 .01 .8, of 1.43.
    for share, expected in [
        (0.0, []),
        (0.006, []),
        (0.0075, [3]),
        (0.022, [2, 3]),
        (0.1, [0, 2, 3]),
        (0.99, [0, 1, 2, 3]),
    ]:
        gone = dropped(of_token, weights, share)
        assert gone.nonzero().squeeze(1).tolist() == expected, share
        kept = kept_rows(gone)
        assert (kept is None) == (not expected)
    for upstream in (math.nan, math.inf):
        changed = weights._replace(upstream=torch.tensor([1, 1, upstream, 1, 0.0]))
        assert dropped(of_token, changed, 0.5).tolist() == [False] * 4 + [True]
    assert dropped(of_token, Weights(*torch.ones(3, 0)), 0.5).tolist() == []


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"drop_below": "much"}, TypeError, "drop_below must be a number, got 'much'"),
        ({"drop_below": True}, TypeError, "drop_below must be a number, got True"),
        ({"drop_below": 1.0}, ValueError, "drop_below must be at least 0 and below 1, got 1.0"),
        ({"drop_below": -0.1}, ValueError, "drop_below must be at least 0 and below 1, got -0.1"),
        ({"drop_below": math.nan}, ValueError, "drop_below must be at least 0 and below 1"),
        (
            {"drop_below": 0.1, "z_loss": 0.5},
            ValueError,
            "drop_below=0.1 drops tokens of which a z_loss learns, got z_loss=0.5",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    (hidden, weight, bias), labels = _inputs("cpu")
    with pytest.raises(error, match="linear_gated_ce: ") as raised:
        linear_gated_ce(hidden, weight, labels, bias, **options)
    assert str(raised.value).startswith(f"linear_gated_ce: {sentence}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gates_of_your_own(device: str, reduction: str, products: list[int]) -> None:
    """They come in by the upstream gradient, of 0 where they are 0."""
    inputs, labels = _inputs(device)
    half = _half(device) * math.log(20)

    def gate(nll: Tensor, entropy: Tensor) -> Tensor:
        return (entropy > half).to(nll.dtype)

    upstream = torch.ones(TOKENS, device=device) if reduction == "none" else None
    options = {"reduction": reduction}
    _, stats, found = _gradients(inputs, labels, upstream, gate=gate, **options)
    assert sum(products) == int((stats.gate != 0).sum()) < 0.7 * TOKENS
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    whole = reference.linear_gated_ce(*leaves[:2], labels, leaves[2], gate=gate, **options)
    for a, b in zip(found, torch.autograd.grad(whole, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
