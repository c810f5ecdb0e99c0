"""``k=None``: the gate's entropy is of all logits, and no largest ones are selected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gate_cases import FAMILY, FIXED_GATES, GATES
from inputs import TRAPS, agree, make, same_bits, threads, upstream_of
from parity import Outcome, assert_parity, assert_same_stats, outcome
from tolerances import ATOL, FLOOR_IN_EPSILONS
from torch import Tensor

from eaft_ext import Gate, gated_ce
from eaft_ext.gates import GateFunction

pytestmark = pytest.mark.usefixtures("poisoned_memory")

V = 4300
"""Two blocks of the CPU kernels, and a last group that is not full."""

# With fewer than 4 rows for each of the 2 threads they share the blocks of a row.
each_number_of_rows = pytest.mark.parametrize("num_rows", [1, 3, 9])


class _OfK(Gate):
    """A gate of one's own that depends on k, of which there are as many as words."""

    def for_k(self, k: int) -> GateFunction:
        return lambda nll, entropy: entropy / k


def _weights(labels: Tensor) -> Tensor:
    return torch.linspace(0, 2, labels.numel(), device=labels.device).view(labels.shape)


def _run(logits: Tensor, labels: Tensor, **options: Any) -> Outcome:
    upstream = upstream_of(labels)
    upstream.view(-1)[1:2] = 0.5
    return outcome(gated_ce, logits, labels, upstream, reduction="none", k=None, **options)


@each_number_of_rows
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 1000, 50257])
def test_vocab_sizes(device: str, dtype: torch.dtype, vocab_size: int, num_rows: int) -> None:
    assert_parity(*make(num_rows, vocab_size, dtype, device=device, ignored=0.2), k=None)


@pytest.mark.parametrize("vocab_size", [5, 8200])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(device: str, dtype: torch.dtype, trap: str, vocab_size: int) -> None:
    assert_parity(*make(9, vocab_size, dtype, trap=trap, device=device), k=None)


@pytest.mark.parametrize("gate", [*GATES, _OfK()], ids=lambda gate: getattr(gate, "name", "own"))
def test_gates(device: str, dtype: torch.dtype, gate: Any) -> None:
    assert_parity(*make(12, 300, dtype, device=device, ignored=0.2), gate=gate, k=None)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("vocab_size", [1, 300])
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_family(
    device: str, dtype: torch.dtype, vocab_size: int, family: dict[str, Any], weighted: bool
) -> None:
    logits, labels = make(12, vocab_size, dtype, device=device, ignored=0.2)
    options = family | ({"token_weight": _weights(labels)} if weighted else {})
    assert_parity(logits, labels, k=None, **options)


@pytest.mark.parametrize(
    "options", [{"reduction": "mean"}, {"reduction": "sum"}, {"num_items_in_batch": 7}], ids=str
)
def test_reductions(device: str, options: dict[str, Any]) -> None:
    logits, labels = make(12, 300, device=device, ignored=0.2)
    assert_parity(logits, labels, k=None, **({"reduction": "mean"} | options))


@pytest.mark.usefixtures("route")
def test_by_hand(device: str, dtype: torch.dtype) -> None:
    """The formula, -sum p ln p, and the default normaliser, ln V."""
    logits, labels = make(12, 700, dtype, device=device)
    loss, stats = gated_ce(logits, labels, k=None, reduction="none", return_stats=True)
    ln_p = logits.double().log_softmax(-1)
    entropy = -(ln_p.exp() * ln_p).sum(-1)
    nll = -ln_p.gather(1, labels[:, None]).squeeze(1)
    of = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {"rtol": 0, "atol": ATOL[of]}
    torch.testing.assert_close(stats.entropy.double(), entropy, **tolerance)
    torch.testing.assert_close(stats.gate.double(), entropy / math.log(700), **tolerance)
    torch.testing.assert_close(loss.double(), entropy / math.log(700) * nll, **tolerance)
    given = gated_ce(logits, labels, k=None, normalizer=3.0, alpha=2.0, return_stats=True)[1]
    assert same_bits(given.entropy, stats.entropy)
    torch.testing.assert_close(given.gate.double(), (entropy / 3) ** 2, **tolerance)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("vocab_size", [2, 3, 20, 127, 128])
def test_as_the_largest_of_as_many(device: str, dtype: torch.dtype, vocab_size: int) -> None:
    """k = V selects all of them."""
    logits, labels = make(12, vocab_size, dtype, device=device, ignored=0.2)
    upstream = upstream_of(labels)
    expected = outcome(gated_ce, logits, labels, upstream, reduction="none", k=vocab_size)
    found = outcome(gated_ce, logits, labels, upstream, reduction="none", k=None)
    assert agree(found.nll, expected.nll)
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        rounding = FLOOR_IN_EPSILONS * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=rounding, atol=4 * rounding, msg=name)


@pytest.mark.usefixtures("route")
def test_a_vocabulary_of_one(device: str, dtype: torch.dtype) -> None:
    """There is nothing to choose, and ln V is 0."""
    logits = torch.tensor([[2.0], [-3e4]], dtype=dtype, device=device)
    found = _run(logits, torch.zeros(2, dtype=torch.int64, device=device))
    for name, value in found._asdict().items():
        assert not value.any(), name


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("vocab_size", [31, 1000, 50257])
@pytest.mark.parametrize("trap", ["probability_0.999", "probability_one_minus_1e-6"])
def test_confident_tokens(device: str, dtype: torch.dtype, trap: str, vocab_size: int) -> None:
    """Their entropy is small, and right to digits of its own."""
    logits, labels = make(16, vocab_size, dtype, trap=trap, device=device)
    found = gated_ce(logits, labels, k=None, return_stats=True)[1].entropy.double()
    # In float64, each term by itself, and of the label's 1 - p what the others have.
    ln_p = logits.double().log_softmax(-1)
    others = ln_p.scatter(1, labels[:, None], -math.inf).exp()
    doubt = others.sum(-1)
    expected = -torch.where(others == 0, 0.0, others * ln_p).sum(-1)
    expected -= (1 - doubt) * torch.log1p(-doubt)
    assert (expected < 0.02).all()
    assert ((found - expected) / expected).abs().max() <= 1e-4


def _with(logits: Tensor, row: int, column: int, value: float) -> Tensor:
    changed = logits.clone()
    changed[row, column] = value
    return changed


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [None, _OfK()], ids=["entropy", "own"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("num_rows", [4, 12], ids=["few_rows", "many_rows"])
def test_an_accident_stays_in_its_row(device: str, gate: Any, value: float, num_rows: int) -> None:
    clean, labels = make(num_rows, V, torch.bfloat16, device=device)
    expected = _run(clean, labels, gate=gate)
    others = torch.arange(num_rows) != 2
    for column in (0, 4095, V - 1):
        found = _run(_with(clean, 2, column, value), labels, gate=gate)
        assert all(part[2].isnan().all() for part in found)
        for name, a, b in zip(Outcome._fields, found, expected, strict=True):
            assert same_bits(a[others], b[others]), f"{name} of another row"


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_ignored_rows_are_not_read(device: str, dtype: torch.dtype, filler: float) -> None:
    logits, labels = make(12, V, dtype, device=device)
    labels[::3] = -100
    ignored = labels == -100
    expected = _run(logits, labels)
    found = _run(logits.masked_fill(ignored[:, None], filler), labels)
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert not a[ignored].any(), f"{name} of an ignored row"
        assert same_bits(a[~ignored], b[~ignored]), name


@pytest.mark.usefixtures("route")
def test_masked_words_take_no_part(device: str, dtype: torch.dtype) -> None:
    """Of -inf, as if they were not there, but in the normaliser."""
    logits, labels = make(12, V, dtype, device=device)
    labels %= 40
    logits[:, 40:] = -math.inf
    found = gated_ce(logits, labels, k=None, return_stats=True)[1]
    alone = gated_ce(logits[:, :40], labels, k=None, normalizer=math.log(V), return_stats=True)[1]
    for name in ("nll", "entropy", "gate"):
        a, b = getattr(found, name), getattr(alone, name)
        rounding = FLOOR_IN_EPSILONS * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding, msg=name)


@pytest.mark.parametrize("vocab_size", [33, V, 50257])
def test_few_rows_are_a_part_of_many(device: str, dtype: torch.dtype, vocab_size: int) -> None:
    """A thread's own, or divided among threads by blocks, of which the sums are the same."""
    logits, labels = make(12, vocab_size, dtype, device=device)
    many = gated_ce(logits, labels, k=None, reduction="none", return_stats="full")
    for rows in (slice(0, 1), slice(4, 7), slice(11, 12)):
        for count in (1, 2, 3):
            with threads(count):
                few = gated_ce(
                    logits[rows], labels[rows], k=None, reduction="none", return_stats="full"
                )
            assert agree(few[0], many[0][rows])
            whole = many[1].map(lambda stat, rows=rows: stat[rows])
            for name, a, b in zip(whole._fields, few[1], whole, strict=True):
                if b is not None:
                    assert (agree if b.is_floating_point() else torch.equal)(a, b), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_inplace_backward(device: str, dtype: torch.dtype, reduction: str) -> None:
    logits, labels = make(12, V, dtype, device=device, ignored=0.2)
    plain, own = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options: dict[str, Any] = {"k": None, "reduction": reduction, "return_stats": True}
    loss, stats = gated_ce(plain, labels, **options)
    in_place = own * 1
    found: list[int] = []
    # The address alone: who holds the gradient itself makes autograd copy it.
    in_place.register_hook(lambda gradient: found.append(gradient.data_ptr()))
    its_loss, its_stats = gated_ce(in_place, labels, inplace_backward=True, **options)
    assert same_bits(its_loss, loss)
    assert_same_stats(its_stats, stats)
    loss.sum().backward()
    its_loss.sum().backward()
    assert plain.grad is not None and own.grad is not None
    assert same_bits(own.grad, plain.grad) and found == [in_place.data_ptr()]


@pytest.mark.operator("gated_ce_forward_with_grad")
@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])
@pytest.mark.parametrize("family", [{}, FAMILY[-1]], ids=str)
def test_gradient_in_forward(
    device: str, dtype: torch.dtype, family: dict[str, Any], inplace: bool
) -> None:
    logits, labels = make(12, V, dtype, device=device, ignored=0.2)
    plain, own = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options: dict[str, Any] = {"k": None, "return_stats": "full", **family}
    loss, stats = gated_ce(plain, labels, **options)
    its_loss, its_stats = gated_ce(
        own, labels, gradient_in_forward=True, inplace_backward=inplace, **options
    )
    torch.testing.assert_close(its_loss, loss)
    for name, a, b in zip(stats._fields, its_stats, stats, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    loss.backward()
    its_loss.backward()
    torch.testing.assert_close(own.grad, plain.grad)


@pytest.mark.parametrize("family", [{}, *FAMILY], ids=str)
@pytest.mark.parametrize("gate", FIXED_GATES.values(), ids=FIXED_GATES.keys())
def test_gradcheck(gate: Any, family: dict[str, Any]) -> None:
    logits, labels = make(3, 10, torch.float64)

    def loss(x: Tensor) -> Tensor:
        return gated_ce(x, labels, k=None, gate=gate, **family)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_no_largest_are_selected() -> None:
    """By the kernels k is 0, and no wrong k of the caller's becomes that."""
    logits, labels = make(3, 300)
    arguments = (logits, labels, 0, "entropy", [1.0], -100)
    loss, _, entropy, *_, extra = torch.ops.eaft_ext.gated_ce_forward(*arguments, num_extra=3)
    expected = gated_ce(logits, labels, k=None, reduction="none", return_stats="full")
    assert same_bits(loss, expected[0]) and same_bits(entropy, expected[1].entropy)
    assert expected[1].vocab_entropy is not None
    assert same_bits(extra[2], entropy) and same_bits(expected[1].vocab_entropy, entropy)
    for wrong in (0, -1, False):
        with pytest.raises((TypeError, ValueError), match=f"or None for all, got {wrong}"):
            gated_ce(logits, labels, k=wrong)
