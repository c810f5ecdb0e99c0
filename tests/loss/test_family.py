"""The loss's family: capped and scaled logits, a z-loss, weights of tokens.

Against the same in plain PyTorch in float64. Parity with the reference, on inputs that break
implementations, is in test_parity.py; shards are in tests/parallel.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gate_cases import FAMILY
from inputs import make, same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import eaft_ext
from eaft_ext import EntropyGate, HardGate, NoGate, gated_ce, linear_gated_ce
from eaft_ext.gates import Gate

V = 300
REDUCTIONS = ["mean", "sum", "none"]


def _weights(labels: Tensor) -> Tensor:
    return torch.linspace(0, 2, labels.numel(), device=labels.device).view(labels.shape)


def _by_hand(
    logits: Tensor,
    labels: Tensor,
    gate: Any,
    reduction: str,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
) -> Tensor:
    """In float64, from whole distributions."""
    x = logits.double() * logit_scale
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    nll = F.cross_entropy(x.view(-1, V), labels.view(-1), reduction="none").view(labels.shape)
    entropy = torch.distributions.Categorical(logits=x.topk(20).values).entropy()
    is_gate = isinstance(gate, Gate)
    weight = (gate.for_k(20) if is_gate else gate)(nll.detach(), entropy.detach())
    smoothed = F.cross_entropy(
        x.view(-1, V), labels.view(-1), reduction="none", label_smoothing=label_smoothing
    )
    loss = weight * smoothed.view(labels.shape) + z_loss * torch.logsumexp(x, -1) ** 2 * (
        labels != -100
    )
    if token_weight is not None:
        loss = loss * token_weight
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (labels != -100).sum()


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 2e-5)
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance * 1e-1
    )


def _own_gate(nll: Tensor, entropy: Tensor) -> Tensor:
    return entropy / (1 + nll)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(
    "gate", [NoGate(), EntropyGate(), _own_gate], ids=["none", "entropy", "own"]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_loss_and_gradient(
    device: str,
    dtype: torch.dtype,
    family: dict[str, Any],
    reduction: str,
    gate: Any,
    weighted: bool,
) -> None:
    logits, labels = make(12, V, dtype, device=device, ignored=0.2)
    logits, labels = logits.view(3, 4, V), labels.view(3, 4)
    options = family | ({"token_weight": _weights(labels)} if weighted else {})
    x, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = gated_ce(x, labels, gate=gate, reduction=reduction, **options)
    expected = _by_hand(truth, labels, gate, reduction, **options)
    _close(loss, expected, torch.float64 if dtype == torch.float64 else torch.float32)
    loss.sum().backward()
    expected.sum().backward()
    assert x.grad is not None and truth.grad is not None and x.grad.dtype == dtype
    _close(x.grad, truth.grad, dtype)


@pytest.mark.operator("gated_ce_forward_with_grad")
@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_gradient_in_forward(
    device: str, family: dict[str, Any], reduction: str, inplace: bool
) -> None:
    logits, labels = make(12, V, device=device, ignored=0.2)
    options = {**family, "reduction": reduction, "token_weight": _weights(labels)}
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = gated_ce(found, labels, gradient_in_forward=True, inplace_backward=inplace, **options)
    plain = gated_ce(expected, labels, **options)
    torch.testing.assert_close(loss, plain)
    loss.backward()
    plain.backward()
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.operator("gated_ce_forward_with_grad")
@pytest.mark.parametrize("route", ["kernel", "reference"], indirect=True)
@pytest.mark.parametrize("gate", [EntropyGate(), _own_gate], ids=["entropy", "own"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_linear(device: str, route: str, family: dict[str, Any], reduction: str, gate: Any) -> None:
    """In chunks, of which the last is shorter: as of all logits."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 16, generator=generator).to(device)
    weight = torch.randn(V, 16, generator=generator).to(device)
    labels = torch.randint(V, (11,), generator=generator).to(device)
    labels[3] = -100
    options = {**family, "gate": gate, "reduction": reduction, "token_weight": _weights(labels)}
    gradients = []
    losses = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            loss = linear_gated_ce(h, w, labels, chunk_size=4, **options)
        else:
            loss = _by_hand(h.double() @ w.double().t(), labels, **options)
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append((h.grad, w.grad))
    _close(*losses)
    for found, expected in zip(*gradients, strict=True):
        assert found is not None and expected is not None
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("route")
def test_z_loss_of_a_muted_token(device: str) -> None:
    """The gate is not on it."""
    logits, labels = make(12, V, device=device)
    x = logits.clone().requires_grad_()
    loss = gated_ce(x, labels, gate=HardGate(2.0), z_loss=0.1, reduction="none")
    _close(loss, 0.1 * logits.double().logsumexp(-1) ** 2)
    loss.sum().backward()
    lse = logits.double().logsumexp(-1, keepdim=True)
    assert x.grad is not None
    _close(x.grad, 0.2 * lse * logits.double().softmax(-1))


@pytest.mark.usefixtures("route")
def test_ignored_tokens(device: str) -> None:
    """Their logits may be anything, and their gradient is 0, also the z-loss's."""
    logits, labels = make(12, V, device=device, ignored=0.4)
    logits[labels == -100] = math.nan
    x = logits.clone().requires_grad_()
    weight = torch.ones(12, device=device)
    loss = gated_ce(x, labels, softcap=5.0, z_loss=0.1, token_weight=weight, reduction="none")
    loss.sum().backward()
    assert x.grad is not None
    assert not loss[labels == -100].any() and not x.grad[labels == -100].any()
    assert loss.isfinite().all() and x.grad.isfinite().all() and x.grad.any()


@pytest.mark.usefixtures("route")
def test_a_soft_cap_where_it_saturates(device: str, dtype: torch.dtype) -> None:
    """Of infinity it makes the cap; and where tanh has no slope the gradient is 0, not NaN."""
    logits = torch.tensor([[1e4, -1e4, 0.5, math.inf, -math.inf, 1.0]] * 9)
    logits = logits.to(device, dtype).requires_grad_()
    labels = torch.full((9,), 2, device=device)
    loss, stats = gated_ce(
        logits, labels, k=4, softcap=5.0, gate=NoGate(), reduction="none", return_stats=True
    )
    loss.sum().backward()
    assert logits.grad is not None
    x = 5 * torch.tanh(logits.detach().double() / 5)
    _close(loss, F.cross_entropy(x, labels, reduction="none"))
    _close(stats.entropy, torch.distributions.Categorical(logits=x.topk(4).values).entropy())
    expected = (x.softmax(-1) - F.one_hot(labels, 6)) * (1 - (x / 5) ** 2)
    _close(logits.grad, expected, dtype)
    assert not logits.grad[:, [0, 1, 3, 4]].any()


@pytest.mark.usefixtures("route")
def test_a_label_that_is_the_largest_under_a_cap(device: str, dtype: torch.dtype) -> None:
    """Its x' is that of the maximum in every bit: the nll is ln S alone, and never negative."""
    logits, _ = make(16, V, dtype, device=device)
    logits[:, 7] = 9.0
    labels = torch.full((16,), 7, device=device)
    stats = gated_ce(logits, labels, softcap=10.0, return_stats=True)[1]
    x = 10 * torch.tanh(logits.double() / 10)
    _close(stats.nll, F.cross_entropy(x, labels, reduction="none"))
    assert (stats.nll > 0).all()


@pytest.mark.usefixtures("route")
def test_a_vocabulary_of_one(device: str) -> None:
    logits = torch.tensor([[2.0], [-3.0]], device=device, requires_grad=True)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    loss = gated_ce(logits, labels, softcap=4.0, logit_scale=2.0, z_loss=0.5, reduction="none")
    x = 4 * torch.tanh(logits.detach().double() / 2)
    _close(loss, 0.5 * x[:, 0] ** 2)
    loss.sum().backward()
    assert logits.grad is not None
    _close(logits.grad, x * (1 - (x / 4) ** 2) * 2)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_as_cross_entropy_has_them(device: str, reduction: str) -> None:
    """``weight[labels]``, but for its mean, which divides by the sum of the weights."""
    logits, labels = make(12, V, device=device, ignored=0.2)
    by_word = torch.rand(V, device=device)
    token_weight = by_word[labels.clamp(min=0)]
    loss = gated_ce(logits, labels, gate=NoGate(), reduction=reduction, token_weight=token_weight)
    plain = F.cross_entropy(logits, labels, by_word, reduction=reduction)
    if reduction == "mean":
        valid = labels != -100
        plain = plain * token_weight[valid].sum() / valid.sum()
    _close(loss, plain)


@pytest.mark.usefixtures("route")
def test_a_weight_of_0_mutes_its_token(device: str) -> None:
    """Whatever its logits are; and it counts in the mean."""
    logits, labels = make(12, V, device=device)
    logits[4] = math.nan
    weight = torch.ones(12, device=device)
    weight[4] = 0
    for options in ({}, {"gradient_in_forward": True}, {"z_loss": 0.0}):
        x = logits.clone().requires_grad_()
        loss = gated_ce(x, labels, token_weight=weight, gate=NoGate(), **options)
        loss.backward()
        others = torch.arange(12, device=device) != 4
        _close(loss, F.cross_entropy(logits[others].double(), labels[others]) * 11 / 12)
        assert x.grad is not None and not x.grad[4].any() and x.grad[others].any()


@pytest.mark.usefixtures("route")
def test_a_weight_of_nan_is_that_of_its_token(device: str) -> None:
    logits, labels = make(12, V, device=device)
    weight = torch.ones(12, device=device)
    weight[7] = math.nan
    x = logits.clone().requires_grad_()
    losses = gated_ce(x, labels, token_weight=weight, gate=NoGate(), reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [row == 7 for row in range(12)]
    assert x.grad is not None
    assert x.grad.isnan().any(1).tolist() == [row == 7 for row in range(12)]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("value", [math.nan, math.inf, -100.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_ignored_tokens_may_be_anything(
    device: str, reduction: str, value: float
) -> None:
    logits, labels = make(12, V, device=device)
    labels[3] = -100
    weight = torch.ones(12, device=device)
    weight[3] = value
    x = logits.clone().requires_grad_()
    loss = gated_ce(x, labels, token_weight=weight, reduction=reduction)
    assert same_bits(loss, gated_ce(logits, labels, reduction=reduction))
    loss.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and not x.grad[3].any()


def test_fake_weights() -> None:
    with FakeTensorMode():
        logits, labels = torch.randn(3, 9), torch.zeros(3, dtype=torch.int64)
        assert gated_ce(logits, labels, token_weight=torch.ones(3)).shape == ()


@pytest.mark.parametrize(
    "weights", [torch.int64, torch.bool, torch.bfloat16, torch.float64], ids=str
)
def test_weights_are_constants_of_any_dtype(device: str, weights: torch.dtype) -> None:
    logits, labels = make(12, V, device=device)
    weight = torch.arange(12, device=device).remainder(2).to(weights)
    if weights.is_floating_point:
        weight.requires_grad_()
    x = logits.clone().requires_grad_()
    loss = gated_ce(x, labels, token_weight=weight, reduction="none")
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert weight.grad is None
    assert same_bits(loss[1::2], gated_ce(logits, labels, reduction="none")[1::2])
    assert not loss[::2].any()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"softcap": 0.0}, ValueError, r"softcap must be finite and above 0, or None, got 0\.0"),
        ({"softcap": math.inf}, ValueError, "softcap must be finite .* got inf"),
        ({"softcap": "30"}, TypeError, "softcap must be a number, got '30'"),
        ({"logit_scale": 0}, ValueError, "logit_scale must be finite and above 0, got 0"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite .* got nan"),
        ({"z_loss": -1e-4}, ValueError, r"z_loss must be finite and at least 0, got -0\.0001"),
        ({"softcap": 1e-50}, ValueError, "softcap must be finite and above 0, or None, got 1e-50"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be at most 1, got 1\.5"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be .*at least 0, got -0\.1"),
        ({"z_loss": True}, TypeError, "z_loss must be a number, got True"),
        ({"token_weight": 2.0}, TypeError, "token_weight must be a tensor, got float"),
        ({"token_weight": torch.ones(2)}, ValueError, r"shape of the labels, \(3,\), got \(2,\)"),
        (
            {"token_weight": torch.tensor([1.0, -0.5, 2.0])},
            ValueError,
            r"token_weight must be at least 0, got -0\.5 at position \[1\]",
        ),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    logits, labels = make(3, 9)
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(error, match=sentence):
        gated_ce(logits, labels, **options)
    with pytest.raises(error, match=sentence):
        linear_gated_ce(hidden, weight, labels, **options)


def test_the_module(device: str) -> None:
    logits, labels = make(12, V, device=device)
    options: dict[str, Any] = {"softcap": 5.0, "z_loss": 1e-2}
    criterion = eaft_ext.GatedCrossEntropyLoss(**options)
    weight = _weights(labels)
    assert same_bits(
        criterion(logits, labels, token_weight=weight),
        gated_ce(logits, labels, token_weight=weight, **options),
    )
    for name in ("token_weight", "num_items_in_batch"):
        with pytest.raises(TypeError, match=f"{name} goes to a call"):
            eaft_ext.GatedCrossEntropyLoss(**{name: weight})  # type: ignore[arg-type]
    assert "softcap=5.0" in repr(criterion) and "z_loss=0.01" in repr(criterion)


@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_gradcheck(family: dict[str, Any]) -> None:
    logits, labels = make(5, 30, torch.float64)
    weight = _weights(labels)

    def loss(x: Tensor) -> Tensor:
        return gated_ce(x, labels, 8, gate=NoGate(), token_weight=weight, **family)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_compiled(device: str) -> None:
    logits, labels = make(12, V, device=device)
    weight = _weights(labels)

    def loss(x: Tensor) -> Tensor:
        return gated_ce(x, labels, softcap=5.0, logit_scale=0.5, z_loss=1e-2, token_weight=weight)

    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(found)
    torch.testing.assert_close(compiled, loss(expected))
    compiled.backward()
    loss(expected).backward()
    torch.testing.assert_close(found.grad, expected.grad)
