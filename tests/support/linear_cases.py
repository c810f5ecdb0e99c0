"""Inputs of the linear loss, and its parity with the reference."""

from __future__ import annotations

from typing import Any

import torch
from error_model import error_weights, token_factors
from inputs import IGNORED, upstream_of
from tolerances import GRADIENT_FACTOR, LOSS_FACTOR, assert_within, of_long_sum
from torch import Tensor

import eaft_ext
from eaft_ext import reference

HIDDEN, V = 16, 50
"""Features, and words that neither 3 nor 4 processes can share evenly."""

NAMES = ("hidden", "weight", "bias")
REDUCTION = ("reduction", "num_items_in_batch", "token_weight", "ignore_index")


def linear_inputs(
    num_tokens: int = 13,
    vocab_size: int = V,
    dtype: torch.dtype = torch.float32,
    *,
    hidden_size: int = HIDDEN,
    ignored: float = 0.2,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden (num_tokens, H), weight (V, H), bias (V) and labels (num_tokens), some ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    drop = torch.rand(num_tokens, generator=generator) < ignored
    # Logits with a standard deviation of 1.5: each is a sum in float32, and known to some epsilons
    # of its largest term.
    weight *= 1.5 / hidden_size**0.5
    hidden, weight, bias = (tensor.to(dtype).to(device) for tensor in (hidden, weight, bias))
    return hidden, weight, bias, labels.masked_fill(drop, -100).to(device)


def linear_gradients(
    function: Any, inputs: list[Tensor | None], labels: Tensor, upstream: Tensor, **options: Any
) -> tuple[Tensor, eaft_ext.TokenStats, dict[str, Tensor]]:
    """Loss, stats, and the gradients of what is given of hidden, weight and bias."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    hidden, weight, bias = leaves
    loss, stats = function(hidden, weight, labels, bias, return_stats=True, **options)
    present = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None}
    found = torch.autograd.grad(loss, list(present.values()), upstream.to(loss.dtype))
    return loss.detach(), stats, dict(zip(present, found, strict=True))


def _chunked_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    chunk_size: int | None = None,
    **options: Any,
) -> Any:
    """The reference, its products taken of as many tokens at a time as those of ours."""
    kept = (labels != IGNORED).nonzero().squeeze(1)
    logits = hidden.new_zeros(len(labels), weight.size(0))
    for chunk in kept.split(chunk_size or max(1, len(kept))):
        part = torch.nn.functional.linear(hidden[chunk], weight, bias)
        logits = logits.index_put((chunk,), part)
    return reference.gated_ce(logits, labels, **options)


def _terms(inputs: list[Tensor | None], labels: Tensor, of_token: Tensor) -> dict[str, Tensor]:
    """Of each gradient, the sums of its terms' absolute values, for tolerances.py.

    The logits' gradients are a token's weight times p, or times p - 1 for the label, where p is the
    exponential of a number that is known to an epsilon of itself.
    """
    hidden, weight, bias = inputs
    log_p = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    is_label = labels.unsqueeze(1) == torch.arange(weight.size(0), device=labels.device)
    of_logits = of_token.unsqueeze(1) * (log_p.exp() * (1 - log_p) + is_label)
    return {
        "hidden": of_logits @ weight.abs(),
        "weight": of_logits.t() @ hidden.abs(),
        "bias": of_logits.sum(0),
    }


def assert_linear_parity(inputs: list[Tensor | None], labels: Tensor, **options: Any) -> None:
    """Hold ``linear_gated_ce`` to the reference in the same dtype and in float64.

    In float32 it is the sums of the products that differ, so the reference goes by chunks too. In
    16 bits it does not: what is rounded after each chunk shall be no worse than rounded once. A
    gradient that is scaled by another number than a power of 2 is rounded once more. The terms of
    the products are rounded one by one, and their sum may be small beside them.
    """
    dtype = inputs[0].dtype
    upstream = torch.tensor(-2.0 if dtype.itemsize == 2 else -1.75, device=labels.device)
    if options.get("reduction") == "none":
        upstream = upstream_of(labels)
    of_chunks = {"chunk_size": options.pop("chunk_size", None)}
    exact = {"accumulate_in_float32": options.pop("accumulate_in_float32", None)}
    whole = reference.linear_gated_ce
    wide = [None if t is None else t.double() for t in inputs]
    op = linear_gradients(
        eaft_ext.linear_gated_ce, inputs, labels, upstream, **of_chunks, **exact, **options
    )
    if dtype.itemsize == 2:
        ref = linear_gradients(whole, inputs, labels, upstream, **options)
    else:
        ref = linear_gradients(_chunked_reference, inputs, labels, upstream, **of_chunks, **options)
    gt = linear_gradients(whole, wide, labels, upstream.double(), **options)
    logits = torch.nn.functional.linear(*wide)
    # Of a product, each is known to an epsilon of its terms.
    known_to = (wide[0].abs() @ wide[1].abs().t()).amax(-1)
    weights = error_weights(gt[1], logits.to(dtype), labels, upstream, known_to=known_to, **options)
    stats = zip(eaft_ext.TokenStats._fields[:3], op[1], ref[1], gt[1], strict=False)
    for name, *values in [("loss", op[0], ref[0], gt[0]), *stats]:
        vectors = [value if value.dim() else value.unsqueeze(0) for value in values]
        assert_within(name, *vectors, LOSS_FACTOR, weights[name])
    of_rows = _terms(wide, labels, weights["gradient"])
    reduction = {name: options[name] for name in REDUCTION if name in options}
    of_tokens = (upstream * token_factors(labels, **reduction) * gt[1].gate).abs()
    terms = _terms(wide, labels, of_tokens) if dtype.itemsize == 2 else {}
    for name in op[2]:
        values = (op[2][name], ref[2][name], gt[2][name])
        weight = of_rows[name] * of_long_sum(logits.size(1 if name == "hidden" else 0))
        assert_within(name, *values, GRADIENT_FACTOR, weight, terms=terms.get(name))
    assert torch.equal(op[1].valid, labels != IGNORED)
    assert not any(stat.requires_grad for stat in op[1] if stat is not None)
