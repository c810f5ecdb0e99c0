"""linear_gated_ce with the entropy of all logits, as the gate's or as a stat beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from error_model import error_weights
from inputs import TOLD, dtype_name, upstream_of
from linear_cases import linear_inputs
from parity import assert_same_stats
from tolerances import GRADIENT_FACTOR, LOSS_FACTOR, assert_within
from torch import Tensor

from eaft_ext import EntropyGate, FocalGate, TokenStats, gated_ce, linear_gated_ce, reference

pytestmark = pytest.mark.operator("gated_ce_forward_with_grad")

NUM_TOKENS, V = 19, 301
CHUNKS = [1, 7, NUM_TOKENS]


def _own_gate(nll: Tensor, entropy: Tensor) -> Tensor:
    return entropy / (1 + nll)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "gate": EntropyGate(0.5, 3.0)},
    "none": {"reduction": "none"},
    "own_gate": {"gate": _own_gate},
    "own_gate_none": {"gate": _own_gate, "reduction": "none", "z_loss": 1e-2},
    "focal": {"gate": FocalGate(2.0), "num_items_in_batch": 7},
    "family": {"softcap": 5.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2},
    "token_weight": {"token_weight": torch.linspace(0, 2, NUM_TOKENS)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
each_k = pytest.mark.parametrize("k", [None, 20])


def _inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    *inputs, labels = linear_inputs(NUM_TOKENS, V, dtype, hidden_size=32, device=device)
    return inputs, labels


def _to(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}


Results = tuple[Tensor, TokenStats, dict[str, Tensor]]


def _results(function: Any, inputs: list[Tensor], labels: Tensor, **options: Any) -> Results:
    """Loss, stats and the gradients of hidden, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    hidden, weight, bias = leaves
    loss, stats = function(hidden, weight, labels, bias, **({"return_stats": "full"} | options))
    upstream = upstream_of(labels) if loss.dim() else torch.tensor(2.0, device=labels.device)
    gradients = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    names = ("hidden", "weight", "bias")
    return loss.detach(), stats, dict(zip(names, gradients, strict=True))


def _unfused(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, **options: Any) -> Any:
    return gated_ce(torch.nn.functional.linear(hidden, weight, bias), labels, **options)


def _assert_close(found: Results, expected: Results, tolerance: float) -> None:
    (loss, stats, gradients), (its_loss, its_stats, its_gradients) = found, expected
    close: Any = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loss, its_loss, **close)
    for name, a, b in zip(TOLD, stats, its_stats, strict=False):
        torch.testing.assert_close(a, b, msg=name, **close)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, its_gradients[name], msg=name, **close)


@each_k
@each_option
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_is_the_unfused_loss(
    device: str, chunk_size: int, options: dict[str, Any], k: int | None, route: str
) -> None:
    inputs, labels = _inputs(device)
    options = _to(device, options) | {"k": k}
    found = _results(linear_gated_ce, inputs, labels, chunk_size=chunk_size, **options)
    assert found[1].vocab_entropy is not None and found[1].vocab_entropy.any()
    _assert_close(found, _results(_unfused, inputs, labels, **options), 1e-5)


@each_k
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_dtypes(
    device: str, dtype: torch.dtype, chunk_size: int, reduction: str, k: int | None, route: str
) -> None:
    """Held to the truth by the errors of the reference, which makes all logits."""
    inputs, labels = _inputs(device, dtype)
    wide = [tensor.double() for tensor in inputs]
    options: dict[str, Any] = {"k": k, "reduction": reduction, "z_loss": 1e-3}
    op = _results(linear_gated_ce, inputs, labels, chunk_size=chunk_size, **options)
    ref = _results(reference.linear_gated_ce, inputs, labels, **options)
    gt = _results(reference.linear_gated_ce, wide, labels, **options)
    hidden, weight, bias = wide
    logits = torch.nn.functional.linear(hidden, weight, bias)
    known_to = (hidden.abs() @ weight.abs().t()).amax(-1)
    weights = error_weights(gt[1], logits, labels, known_to=known_to, **options)
    largest = 1 + gt[1].nll.amax().item()
    for name in ("nll", "entropy", "gate", "lse", "z_loss", "vocab_entropy"):
        assert_within(
            name, *(getattr(r[1], name) for r in (op, ref, gt)), LOSS_FACTOR, weights[name]
        )
    losses = [r[0] if r[0].dim() else r[0].unsqueeze(0) for r in (op, ref, gt)]
    assert_within("loss", *losses, LOSS_FACTOR, weights["loss"])
    for name in op[2]:
        assert_within(name, *(r[2][name] for r in (op, ref, gt)), GRADIENT_FACTOR, largest)


@each_k
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens(device: str, reduction: str, k: int | None, poisoned_memory: None) -> None:
    """Zeros in every stat, and no more of a chunk than others leave of it."""
    inputs, labels = _inputs(device)
    ignored = labels == -100
    options: dict[str, Any] = {"k": k, "reduction": reduction, "chunk_size": 4, "z_loss": 1e-2}
    expected = _results(linear_gated_ce, inputs, labels, **options)
    inputs[0] = inputs[0].masked_fill(ignored[:, None], math.nan)
    found = _results(linear_gated_ce, inputs, labels, **options)
    assert ignored.any()
    assert not any(stat[ignored].any() for stat in found[1][: len(TOLD)])
    assert not found[2]["hidden"][ignored].any()
    _assert_close(found, expected, 0.0)
    nothing = _results(linear_gated_ce, inputs, torch.full_like(labels, -100), **options)
    assert not any(stat.any() for stat in nothing[1][: len(TOLD)])


@each_k
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 0), ()], ids=str)
def test_shapes_of_tokens(
    device: str, shape: tuple[int, ...], reduction: str, k: int | None, route: str
) -> None:
    """Several dimensions, no token, and one token alone."""
    hidden, weight, bias, labels = linear_inputs(
        max(1, math.prod(shape)), V, device=device, ignored=0
    )
    count = math.prod(shape)
    inputs = [hidden[:count].view(*shape, -1) if count else hidden.new_empty(*shape, 16), weight]
    labels = labels[:count].view(shape)
    options: dict[str, Any] = {"k": k, "reduction": reduction}
    found = _results(linear_gated_ce, [*inputs, bias], labels, chunk_size=4, **options)
    assert all(stat is None or stat.shape == shape for stat in found[1])
    _assert_close(found, _results(_unfused, [*inputs, bias], labels, **options), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize(
    "options",
    [{}, {"gate": _own_gate}, {"reduction": "none"}],
    ids=["nothing", "own_gate", "none"],
)
def test_asking_for_more_changes_nothing(
    device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    inputs, labels = _inputs(device, dtype)
    full = _results(linear_gated_ce, inputs, labels, chunk_size=7, **options)
    plain = _results(linear_gated_ce, inputs, labels, chunk_size=7, **options, return_stats=True)
    assert plain[1].vocab_entropy is None and full[1].vocab_entropy is not None
    if device == "cpu":
        assert_same_stats(full[1]._replace(vocab_entropy=None), plain[1])
    _assert_close((full[0], full[1]._replace(vocab_entropy=None), full[2]), plain, 1e-6)


@each_k
def test_compiled(device: str, k: int | None) -> None:
    inputs, labels = _inputs(device)

    def function(
        hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, **options: Any
    ) -> Any:
        return linear_gated_ce(hidden, weight, labels, bias, k, chunk_size=7, **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _assert_close(_results(compiled, inputs, labels), _results(function, inputs, labels), 1e-6)
