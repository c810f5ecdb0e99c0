"""Infinities and NaN: masked logits, masked labels, and accidents that must stay in their row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gate_cases import GATES
from inputs import make, same_bits, upstream_of
from parity import Outcome, assert_parity, outcome
from torch import Tensor

import eaft_ext
from eaft_ext import EntropyGate, HardGate, NoGate, ProbabilityGate, SigmoidGate

ops = torch.ops.eaft_ext

VOCAB_SIZE = 4300
"""Two blocks of the CPU kernels, and a last group that is not full."""

POSITIONS = [0, 200, 4095, 4096, VOCAB_SIZE - 1]


def _run(logits: Tensor, labels: Tensor, **options: Any) -> Outcome:
    upstream = upstream_of(labels)
    upstream.view(-1)[1] = 0.5
    return outcome(eaft_ext.gated_ce, logits, labels, upstream, reduction="none", **options)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: getattr(gate, "__name__", str(gate)))
@pytest.mark.parametrize("num_rows", [4, 12], ids=["few_rows", "many_rows"])
def test_nan_stays_in_its_row(device: str, gate: Any, num_rows: int) -> None:
    clean, labels = make(num_rows, VOCAB_SIZE, torch.bfloat16, device=device)
    expected = _run(clean, labels, gate=gate)
    others = torch.arange(num_rows) != 2
    for position in (*POSITIONS, labels[2].item()):
        logits = clean.clone()
        logits[2, position] = math.nan
        found = _run(logits, labels, gate=gate)
        assert found.loss[2].isnan() and found.nll[2].isnan() and found.entropy[2].isnan()
        assert found.gradient[2].isnan().all()
        for name, a, b in zip(Outcome._fields, found, expected, strict=True):
            assert same_bits(a[others], b[others]), f"{name} of another row (NaN at {position})"


def test_nan_of_every_sign_and_payload(device: str) -> None:
    logits, labels = make(4, VOCAB_SIZE, device=device)
    patterns = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    logits[torch.arange(4), torch.tensor(POSITIONS[:4])] = patterns.view(torch.float32).to(device)
    found = _run(logits, labels)
    assert logits.isnan().sum() == 4
    assert all(values.isnan().all() for values in found)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ignored_rows_are_not_read(device: str, dtype: torch.dtype, value: float) -> None:
    logits, labels = make(12, VOCAB_SIZE, dtype, device=device)
    labels[::3] = -100
    expected = _run(logits, labels)
    found = _run(logits.masked_fill((labels == -100)[:, None], value), labels)
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert not a[::3].any(), f"{name} of an ignored row"
        assert same_bits(a[1::3], b[1::3]) and same_bits(a[2::3], b[2::3])


@pytest.mark.parametrize("gate", [EntropyGate(), NoGate(), HardGate(0.5)], ids=str)
@pytest.mark.parametrize("position", [0, 4096, VOCAB_SIZE - 1])
def test_positive_infinity_as_in_the_reference(
    device: str, dtype: torch.dtype, position: int, gate: Any
) -> None:
    logits, labels = make(9, VOCAB_SIZE, dtype, device=device)
    logits[4, position] = math.inf
    labels[4] = 17
    assert_parity(logits, labels, gate=gate)
    assert _run(logits, labels, gate=gate).loss[4].isnan()


@pytest.mark.usefixtures("route")
def test_row_without_a_finite_logit(device: str, dtype: torch.dtype) -> None:
    """As in torch.nn.functional.cross_entropy, it has no loss: NaN, for its own row."""
    logits, labels = make(9, VOCAB_SIZE, dtype, device=device)
    expected = _run(logits, labels)
    logits[3] = -math.inf
    found = _run(logits, labels)
    assert found.loss[3].isnan() and found.gradient[3].isnan().all()
    others = torch.arange(9) != 3
    assert same_bits(found.loss[others], expected.loss[others])
    assert same_bits(found.gradient[others], expected.gradient[others])


@pytest.mark.parametrize("gate", [NoGate(), EntropyGate(), SigmoidGate()], ids=str)
def test_masked_label_has_an_infinite_loss(device: str, dtype: torch.dtype, gate: Any) -> None:
    logits, labels = make(9, VOCAB_SIZE, dtype, device=device)
    logits[torch.arange(9), labels] = -math.inf
    found = _run(logits, labels, gate=gate)
    assert (found.nll == math.inf).all() and (found.loss == math.inf).all()
    # p = 0: the gradient is the softmax, and -1 at the label.
    weight = upstream_of(labels).index_fill(0, torch.tensor([1], device=device), 0.5) * found.gate
    at_label = found.gradient.gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(at_label, -weight.to(dtype), rtol=1e-2, atol=0)
    assert found.gradient.isfinite().all()
    assert_parity(logits, labels, gate=gate)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "gate",
    [ProbabilityGate(), HardGate(2.0), EntropyGate(), lambda nll, entropy: nll.exp().reciprocal()],
    ids=["probability", "hard", "entropy", "callable"],
)
def test_gate_of_zero_mutes_an_infinite_nll(device: str, gate: Any, reduction: str) -> None:
    """0 times infinity is 0 here: a muted token adds nothing, and its gradient is 0."""
    logits = torch.full((9, 300), -math.inf, device=device)
    logits[:, 7] = 3.0
    labels = torch.full((9,), 5, device=device)
    logits.requires_grad_()
    loss, stats = eaft_ext.gated_ce(
        logits, labels, gate=gate, reduction=reduction, return_stats=True
    )
    assert (stats.nll == math.inf).all() and not stats.gate.any() and not loss.any()
    loss.sum().backward()
    assert logits.grad is not None and not logits.grad.any()
