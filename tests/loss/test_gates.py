"""Gates as objects: your own, their values, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from gate_cases import BUILT_IN
from inputs import make, same_bits, upstream_of
from parity import Outcome, outcome
from torch import Tensor

import eaft_ext
from eaft_ext import (
    ConflictGate,
    EntropyGate,
    FocalGate,
    Gate,
    HardGate,
    NoGate,
    PowerGate,
    SigmoidGate,
    ThresholdGate,
    gated_ce,
)

V = 700


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", BUILT_IN, ids=str)
def test_a_callable_does_what_the_built_in_gate_does(
    device: str, dtype: torch.dtype, gate: Gate
) -> None:
    logits, labels = make(12, V, dtype, device=device, ignored=0.2)
    upstream = upstream_of(labels)
    inside, outside = (
        outcome(gated_ce, logits, labels, upstream, gate=one, reduction="none")
        for one in (gate, gate.for_k(20))
    )
    for name, a, b in zip(Outcome._fields, inside, outside, strict=True):
        rounding = 8 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * 1e-2, msg=name)


@pytest.mark.usefixtures("route")
def test_what_a_callable_is_given(device: str) -> None:
    """Detached float32, shaped like the labels, the stats themselves; and ignored tokens as 0."""
    logits, labels = make(12, V, torch.bfloat16, device=device, ignored=0.3)
    logits[labels == -100] = math.nan
    logits = logits.view(3, 4, V).requires_grad_()
    labels = labels.view(3, 4)
    given: list[Tensor] = []

    def gate(nll: Tensor, entropy: Tensor) -> Tensor:
        given.extend([nll, entropy])
        return entropy / entropy.sum() + nll * 0.01

    loss, stats = gated_ce(logits, labels, gate=gate, reduction="none", return_stats=True)
    nll, entropy = given
    for tensor, stat in ((nll, stats.nll), (entropy, stats.entropy)):
        assert tensor.shape == (3, 4) and tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert same_bits(tensor, stat)
    assert stats.gate.isfinite().all() and not stats.gate[~stats.valid].any()
    torch.testing.assert_close(loss, stats.gate * stats.nll)
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.usefixtures("route")
def test_a_callable_is_detached(device: str) -> None:
    """Also where it brings a graph of its own."""
    logits, labels = make(12, V, device=device)
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    logits.requires_grad_()
    loss, stats = gated_ce(logits, labels, gate=lambda nll, _: nll * scale, return_stats=True)
    loss.backward()
    assert scale.grad is None and not stats.gate.requires_grad


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("weights", [torch.float64, torch.bfloat16, torch.bool], ids=str)
def test_weights_of_another_dtype_leave_the_loss_in_float32(
    device: str, weights: torch.dtype
) -> None:
    logits, labels = make(12, V, torch.bfloat16, device=device)
    loss, stats = gated_ce(
        logits.requires_grad_(),
        labels,
        gate=lambda nll, entropy: (entropy > 1).to(weights),
        reduction="none",
        return_stats=True,
    )
    assert loss.dtype == torch.float32 and stats.gate.dtype == torch.float32
    torch.testing.assert_close(loss, stats.nll * (stats.entropy > 1))
    loss.sum().backward()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(
    ("gate", "named"),
    [
        (lambda nll, entropy: entropy[:, None], r"\(12, 1\)"),
        (lambda nll, entropy: entropy[:3], r"\(3,\)"),
        (lambda nll, entropy: None, "None"),
    ],
    ids=["column", "too_few", "none"],
)
def test_weights_of_another_shape_or_kind(device: str, gate: Any, named: str) -> None:
    """They must not be broadcast: (12, 1) would silently make 144 losses of 12."""
    logits, labels = make(12, V, device=device)
    with pytest.raises((TypeError, ValueError), match=named):
        gated_ce(logits, labels, gate=gate)


@pytest.mark.usefixtures("route")
def test_one_weight_for_all(device: str) -> None:
    """A number in a tensor stands for every token that counts."""
    logits, labels = make(12, V, device=device, ignored=0.3)
    loss, stats = gated_ce(
        logits.requires_grad_(),
        labels,
        gate=lambda nll, entropy: entropy.new_tensor(0.5),
        reduction="none",
        return_stats=True,
    )
    assert torch.equal(stats.gate, 0.5 * (labels != -100))
    torch.testing.assert_close(loss, 0.5 * stats.nll)
    loss.sum().backward()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("trap", ["probability_0.999", "probability_one_minus_1e-6"])
def test_focal_gate_near_certainty(device: str, trap: str) -> None:
    """1 - p is as exact as the nll is: it must not be taken from a rounded p."""
    logits, labels = make(9, 130, trap=trap, device=device)
    _, stats = gated_ce(logits, labels, gate=FocalGate(1.0), return_stats=True)
    torch.testing.assert_close(
        stats.gate.double(), -torch.expm1(-stats.nll.double()), rtol=1e-6, atol=0
    )


@pytest.mark.usefixtures("route")
def test_power_gate_where_the_probability_is_no_number_any_more(device: str) -> None:
    """p(y) is 0 below e^-745, in float32 below e^-104; p(y)^q is not, and p(y)^0 is 1."""
    logits = torch.zeros(3, V, device=device)
    logits[0, 1], logits[1, 1], logits[2, 0] = 200.0, 2000.0, -math.inf
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    stats = gated_ce(logits, labels, gate=PowerGate(0.01), return_stats=True)[1]
    torch.testing.assert_close(stats.gate, torch.exp(-0.01 * stats.nll), rtol=1e-5, atol=0)
    assert stats.gate[0] > 0.1 and stats.gate[1] > 1e-9 and stats.gate[2] == 0
    assert gated_ce(logits, labels, gate=PowerGate(0.0), return_stats=True)[1].gate.eq(1).all()


class DerivedEntropyGate(EntropyGate):
    """Another function than the one that the kernels know by its parent's name."""

    def for_k(self, k: int) -> Any:
        return lambda nll, entropy: 2 * entropy


@pytest.mark.usefixtures("route")
def test_what_derives_from_a_built_in_gate(device: str) -> None:
    logits, labels = make(12, V, device=device)
    _, stats = gated_ce(logits, labels, gate=DerivedEntropyGate(), return_stats=True)
    torch.testing.assert_close(stats.gate, 2 * stats.entropy)


class OwnGate(Gate):
    """Derived from the base class, as its for_k invites to."""

    def for_k(self, k: int) -> Any:
        return lambda nll, entropy: entropy / k


class KnowsK:
    """Not derived from it, and callable for itself."""

    def for_k(self, k: int) -> Any:
        return lambda nll, entropy: entropy / k

    def __call__(self, nll: Tensor, entropy: Tensor) -> Tensor:
        return entropy / 20


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [OwnGate(), KnowsK()], ids=["derived", "not_derived"])
def test_a_class_of_your_own(device: str, gate: Any) -> None:
    logits, labels = make(12, V, device=device)
    _, stats = gated_ce(logits, labels, gate=gate, return_stats=True)
    torch.testing.assert_close(stats.gate, stats.entropy / 20)


@pytest.mark.usefixtures("route")
def test_k_of_a_gate_is_at_most_the_vocabulary(device: str) -> None:
    logits, labels = make(12, 6, device=device)
    _, stats = gated_ce(logits, labels, 20, gate=OwnGate(), return_stats=True)
    torch.testing.assert_close(stats.gate, stats.entropy / 6)


@pytest.mark.parametrize(
    "shorthand", [{"alpha": 2.0}, {"normalizer": 3.0}, {"alpha": 2.0, "normalizer": 3.0}], ids=str
)
@pytest.mark.parametrize(
    "gate",
    [EntropyGate(), NoGate(), lambda nll, entropy: nll],
    ids=["entropy", "none", "callable"],
)
def test_shorthand_together_with_a_gate(gate: Any, shorthand: dict[str, float]) -> None:
    logits, labels = make(3, 9)
    with pytest.raises(TypeError, match=r"alpha and normalizer.*cannot go with gate="):
        gated_ce(logits, labels, gate=gate, **shorthand)


def test_shorthand_is_the_gate(device: str) -> None:
    logits, labels = make(12, V, device=device)
    for shorthand in ({"alpha": 2.0}, {"normalizer": 3.0}, {"alpha": 0.5, "normalizer": 1.5}):
        assert same_bits(
            gated_ce(logits, labels, **shorthand),
            gated_ce(logits, labels, gate=EntropyGate(**shorthand)),
        )


@pytest.mark.parametrize("gate", [EntropyGate, "entropy", 1.0, [NoGate()]], ids=str)
def test_what_is_not_a_gate(gate: Any) -> None:
    logits, labels = make(3, 9)
    with pytest.raises(TypeError, match=r"gate must be a gate such as EntropyGate\(\)"):
        gated_ce(logits, labels, gate=gate)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: EntropyGate(-1.0), r"alpha must be at least 0, got -1\.0"),
        (lambda: EntropyGate(math.nan), "alpha must be finite, got nan"),
        (lambda: EntropyGate(math.inf), "alpha must be finite, got inf"),
        (lambda: EntropyGate(1.0, 0.0), r"normalizer must be above 0.*got 0\.0"),
        (lambda: EntropyGate(1.0, -3.0), r"normalizer must be above 0.*got -3\.0"),
        (lambda: EntropyGate(1.0, math.inf), "normalizer must be finite, got inf"),
        (lambda: SigmoidGate(math.nan), "beta must be finite, got nan"),
        (lambda: SigmoidGate(0.1, math.inf), "slope must be finite, got inf"),
        (lambda: HardGate(math.nan), "threshold must be finite, got nan"),
        (lambda: ConflictGate(math.nan, 0.1), "entropy must be finite, got nan"),
        (lambda: ConflictGate(0.1, math.inf), "probability must be finite, got inf"),
        (lambda: PowerGate(-1.0), r"q must be at least 0, got -1\.0"),
        (lambda: PowerGate(math.nan), "q must be finite, got nan"),
        (lambda: ThresholdGate(math.nan), "threshold must be finite, got nan"),
        (lambda: FocalGate(-0.5), r"gamma must be at least 0, got -0\.5"),
        (lambda: FocalGate(math.nan), "gamma must be finite, got nan"),
        (lambda: gated_ce(*make(3, 9), alpha=-2.0), r"alpha must be at least 0, got -2\.0"),
        (lambda: gated_ce(*make(3, 9), normalizer=0.0), r"normalizer must be above 0.*got 0\.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameters_outside_their_range(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize("gate", BUILT_IN, ids=str)
def test_gates_are_values(gate: Gate) -> None:
    for twin in (pickle.loads(pickle.dumps(gate)), copy.deepcopy(gate)):
        assert twin == gate and hash(twin) == hash(gate) and repr(twin) == repr(gate)
    assert isinstance(gate, Gate)
    assert eval(repr(gate), vars(eaft_ext)) == gate
    with pytest.raises(AttributeError):
        gate.alpha = 5.0  # type: ignore[attr-defined]
