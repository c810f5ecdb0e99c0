"""Tokens that the model is sure of: p - 1 must be taken before anything is rounded."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import make
from parity import outcome
from tolerances import FLOOR_IN_EPSILONS, LOSS_FACTOR, assert_within

import eaft_ext
from eaft_ext import NoGate

FLOAT32_EPSILON = torch.finfo(torch.float32).eps
ROWS = 16
UPSTREAM = 64.0
"""Keeps 1e-6 above the subnormal numbers of float16."""


@pytest.mark.parametrize("vocab_size", [130, 4096, 50257, 151936])
@pytest.mark.parametrize(
    ("trap", "doubt"), [("probability_0.999", 1e-3), ("probability_one_minus_1e-6", 1e-6)]
)
def test_gradient_of_the_label(
    device: str, dtype: torch.dtype, trap: str, doubt: float, vocab_size: int
) -> None:
    """A gradient rounded before the subtraction of 1 would be 0, or a multiple of 2^-9."""
    rows = ROWS if vocab_size < 10_000 else 2
    logits, labels = make(rows, vocab_size, dtype, trap=trap, device=device)
    upstream = torch.full((rows,), UPSTREAM, device=device)
    reference = eaft_ext.reference.gated_ce
    op, truth = (
        outcome(function, x, labels, upstream, reduction="none", gate=NoGate())
        for function, x in ((eaft_ext.gated_ce, logits), (reference, logits.double()))
    )
    rounding = torch.finfo(dtype).eps
    # The sum of exponentials is 1 + doubt, and p is 1 - doubt: what float32 can know of either.
    known = 1e-8 if dtype == torch.float64 else FLOOR_IN_EPSILONS * FLOAT32_EPSILON / doubt
    for name, tolerance in (("nll", known), ("gradient", known + rounding)):
        a, b = (getattr(found, name).double() for found in (op, truth))
        if name == "gradient":
            a, b = (x.gather(1, labels[:, None]).squeeze(1) for x in (a, b))
        relative = ((a - b) / b).abs().max()
        assert relative <= tolerance, f"{name} of the label is off by {relative:.2g} of itself"


@pytest.mark.parametrize("position", [0, 64, 2048, 4095, 100_000, 151935])
def test_long_runs_beside_the_label(device: str, position: int) -> None:
    """The rest is even, each term far below half an ulp of the label's 1, on both sides of it."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(2, 151936, generator=generator, dtype=torch.float64)
    logits[:, position] = -math.inf
    logits[:, position] = logits.logsumexp(1) + math.log(999)
    logits = logits.float().to(device)
    labels = torch.full((2,), position, device=device)
    reference = eaft_ext.reference.gated_ce
    op, ref, gt = (
        function(x, labels, gate=NoGate(), reduction="none")
        for function, x in (
            (eaft_ext.gated_ce, logits),
            (reference, logits),
            (reference, logits.double()),
        )
    )
    assert_within("nll", op, ref, gt, LOSS_FACTOR)


@pytest.mark.parametrize("vocab_size", [5, 4097])
def test_gradient_of_a_row_sums_to_zero(device: str, vocab_size: int) -> None:
    """The label's gradient is minus the sum of all others'."""
    logits, labels = make(9, vocab_size, device=device)
    upstream = torch.ones(9, device=device)
    gradient = outcome(eaft_ext.gated_ce, logits, labels, upstream, reduction="none").gradient
    assert gradient.double().sum(1).abs().max() <= 8 * FLOAT32_EPSILON
