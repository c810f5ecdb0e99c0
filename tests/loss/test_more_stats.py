"""``correct``, ``lse``, ``z_loss`` and ``vocab_entropy``: what stats tell of a token besides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gate_cases import FAMILY, GATES
from inputs import TOLD, TRAPS, agree, make, same_bits
from parity import assert_same_stats
from tolerances import ATOL, FLOOR_IN_EPSILONS
from torch import Tensor

import eaft_ext
from eaft_ext import NoGate, TokenStats, gated_ce, linear_gated_ce

V = 4300
"""Two blocks of the CPU kernels, and a last group that is not full."""

# With fewer than 4 rows for each of the 2 threads they share the blocks of a row.
each_number_of_rows = pytest.mark.parametrize("num_rows", [3, 12], ids=["few_rows", "many_rows"])


def _mapped(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """What the loss is of, in float64."""
    x = logits.double() * options.get("logit_scale", 1.0)
    softcap = options.get("softcap")
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def _stats(logits: Tensor, labels: Tensor, **options: Any) -> TokenStats:
    return gated_ce(logits, labels, **({"return_stats": "full"} | options))[1]


def _assert_by_hand(
    stats: TokenStats,
    logits: Tensor,
    labels: Tensor,
    *,
    is_top: Tensor | None = None,
    **options: Any,
) -> None:
    """Hold all four to plain formulas. ``is_top``: of the label, if float64 would not know it."""
    x = _mapped(logits, options)
    valid = labels != -100
    at_label = x.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if is_top is None:
        is_top = at_label == x.amax(-1)
    lse = x.logsumexp(-1)
    ln_p = x.log_softmax(-1)
    entropy = -torch.where(ln_p.exp() == 0, 0.0, ln_p.exp() * ln_p).sum(-1)
    assert stats.correct is not None and stats.lse is not None and stats.vocab_entropy is not None
    assert stats.correct.dtype == torch.bool and torch.equal(stats.correct, valid & is_top)
    expected = {"lse": lse, "vocab_entropy": entropy}
    if options.get("z_loss"):
        expected["z_loss"] = options["z_loss"] * lse**2
    else:
        assert stats.z_loss is None
    dtype = stats.nll.dtype
    for name, truth in expected.items():
        found = getattr(stats, name)
        assert found.dtype == dtype and found.shape == labels.shape, name
        assert not found.requires_grad
        # Relative to the largest number that it is made from.
        rounding = FLOOR_IN_EPSILONS * torch.finfo(dtype).eps
        torch.testing.assert_close(
            found.double(),
            torch.where(valid, truth, 0.0),
            rtol=2 * rounding,
            atol=ATOL[dtype],
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.usefixtures("route", "poisoned_memory")
@each_number_of_rows
@pytest.mark.parametrize("k", [20, None])
@pytest.mark.parametrize("family", [{}, *FAMILY], ids=str)
def test_by_hand(
    device: str, dtype: torch.dtype, family: dict[str, Any], k: int | None, num_rows: int
) -> None:
    logits, labels = make(num_rows, V, dtype, device=device, ignored=0.2)
    # Every other label is of the largest logit, the others of the smallest: a cap makes ties.
    is_top = torch.arange(num_rows, device=device) % 2 == 0
    chosen = torch.where(is_top, logits.argmax(-1), logits.argmin(-1))
    labels = torch.where(labels == -100, -100, chosen)
    stats = _stats(logits, labels, k=k, **family)
    _assert_by_hand(stats, logits, labels, is_top=is_top, **family)
    assert torch.equal(stats.valid, labels != -100)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(device: str, dtype: torch.dtype, trap: str) -> None:
    logits, labels = make(9, V, dtype, trap=trap, device=device)
    _assert_by_hand(_stats(logits, labels, z_loss=1e-4), logits, labels, z_loss=1e-4)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 129])
def test_vocab_sizes(device: str, dtype: torch.dtype, vocab_size: int) -> None:
    logits, labels = make(40, vocab_size, dtype, device=device, ignored=0.2)
    stats = _stats(logits, labels)
    _assert_by_hand(stats, logits, labels)
    if vocab_size <= 20:  # of as many as there are
        assert stats.vocab_entropy is not None
        torch.testing.assert_close(stats.vocab_entropy, stats.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("route")
def test_ties_are_correct(device: str, dtype: torch.dtype) -> None:
    """Wherever they are, of zeros of both signs, and of -inf alone not: there is no loss."""
    logits, _ = make(6, V, dtype, device=device)
    labels = torch.tensor([0, 4096, V - 1, 7, 9, 5], device=device)
    for row, others in enumerate([(V - 1,), (3, 4097), (0,), (8,), (2,)]):
        logits[row, [labels[row].item(), *others]] = 20.0
    logits[3, 8] = 20.25
    logits[4] = -logits[4].abs() - 1
    logits[4, 9], logits[4, 2] = -0.0, 0.0
    logits[5] = -math.inf
    stats = _stats(logits, labels)
    assert stats.correct is not None
    assert stats.correct[:5].tolist() == [True, True, True, False, True]
    assert stats.nll[5].isnan()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("softcap", [0.5, 5.0])
def test_ties_under_a_cap(device: str, dtype: torch.dtype, softcap: float) -> None:
    """Where it saturates all that is there is as large."""
    logits = torch.full((9, 300), -1.0, dtype=dtype, device=device)
    logits[:, 17], logits[:, 250] = 9e3, 1e4
    for label, correct in ((17, True), (250, True), (3, False)):
        labels = torch.full((9,), label, device=device)
        stats = _stats(logits, labels, softcap=softcap)
        assert stats.correct is not None and stats.correct.tolist() == [correct] * 9
        _assert_by_hand(stats, logits, labels, softcap=softcap)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("k", [20, None])
def test_ignored_tokens(device: str, dtype: torch.dtype, k: int | None) -> None:
    logits, labels = make(12, V, dtype, device=device)
    expected = _stats(logits, labels, k=k, z_loss=1e-3)
    labels[::3] = -100
    ignored = labels == -100
    stats = _stats(logits.masked_fill(ignored[:, None], math.nan), labels, k=k, z_loss=1e-3)
    for name, a, b in zip(TOLD, stats, expected, strict=False):
        assert not a[ignored].any(), name
        assert same_bits(a[~ignored], b[~ignored]), name


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("k", [20, None])
def test_a_nan_is_never_correct(device: str, k: int | None) -> None:
    """And spoils what is told of its own row."""
    logits, labels = make(12, V, device=device)
    expected = _stats(logits, labels, k=k)
    logits[2, 100] = math.nan
    others = torch.arange(12) != 2
    for label in (100, 7, logits[2].nan_to_num(nan=-1e9).argmax().item()):
        labels[2] = label
        stats = _stats(logits, labels, k=k)
        told = (stats.lse, stats.vocab_entropy, stats.entropy, stats.nll)
        assert all(stat is not None and stat[2].isnan() for stat in told)
        assert stats.correct is not None and not stats.correct[2]
        assert_same_stats(stats.map(lambda x: x[others]), expected.map(lambda x: x[others]))


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("wrong", [-1, V, 2**40])
@pytest.mark.parametrize("k", [20, None])
def test_labels_out_of_range(wrong: int, k: int | None) -> None:
    """Where nothing raises, they are not correct, and NaN is all that is told of their nll."""
    logits, labels = make(12, V)
    labels[:] = logits.argmax(1)
    expected = _stats(logits, labels, k=k)
    labels[2] = wrong
    stats = _stats(logits, labels, k=k)
    others = torch.arange(12) != 2
    assert_same_stats(stats.map(lambda x: x[others]), expected.map(lambda x: x[others]))
    assert stats.correct is not None and stats.correct.tolist() == others.tolist()
    assert stats.vocab_entropy is not None
    assert stats.nll[2].isnan() and stats.vocab_entropy[2].isnan()
    by_reference = eaft_ext.reference.gated_ce(logits, labels, k, return_stats="full")[1]
    assert_same_stats(by_reference, stats)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gradient_in_forward", [False, True], ids=["backward", "in_forward"])
@pytest.mark.parametrize("gate", [*GATES, NoGate()], ids=lambda gate: getattr(gate, "name", "own"))
def test_asking_for_more_changes_nothing(
    device: str, dtype: torch.dtype, gate: Any, gradient_in_forward: bool
) -> None:
    """No bit of the loss, its gradient, or of the stats that were there."""
    logits, labels = make(12, V, dtype, device=device, ignored=0.2)
    found = []
    for asked in (False, True, "full"):
        x = logits.clone().requires_grad_()
        result = gated_ce(
            x,
            labels,
            gate=gate,
            return_stats=asked,
            gradient_in_forward=gradient_in_forward,
            z_loss=1e-3,
        )
        loss, stats = result if isinstance(result, tuple) else (result, None)
        loss.backward()
        found.append((loss.detach(), x.grad, stats))
    (loss, gradient, _), (_, _, stats), (_, _, full) = found
    assert all(agree(a, loss) and agree(b, gradient) for a, b, _ in found)
    assert stats is not None and stats.vocab_entropy is None
    assert full is not None and full.vocab_entropy is not None
    assert same_bits(full.entropy, stats.entropy)
    for name, a, b in zip(TOLD[:-1], full, stats, strict=False):
        assert (agree if a.is_floating_point() else torch.equal)(a, b), name
    assert not same_bits(full.vocab_entropy, full.entropy)
    assert not any(stat.requires_grad for stat in full[: len(TOLD)])


@pytest.mark.parametrize("wrong", ["all", "True", None, 1, 0, 2.0, [True]], ids=repr)
def test_what_is_refused(wrong: Any) -> None:
    logits, labels = make(3, 9)
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    for op, call in (
        ("gated_ce", lambda: gated_ce(logits, labels, return_stats=wrong)),
        ("linear_gated_ce", lambda: linear_gated_ce(hidden, weight, labels, return_stats=wrong)),
    ):
        with pytest.raises(ValueError, match="return_stats") as raised:
            call()
        sentence = f"{op}: return_stats must be True, False or 'full', got {wrong!r}"
        assert str(raised.value) == sentence


def test_map() -> None:
    logits, labels = make(3, 9)
    stats = _stats(logits, labels, return_stats=True)
    moved = stats.map(lambda stat: stat[None])
    assert moved.vocab_entropy is None and moved.z_loss is None
    assert moved.nll.shape == (1, 3) and same_bits(moved.nll[0], stats.nll)
    assert TokenStats(*stats[:4]).map(torch.clone).lse is None


@pytest.mark.parametrize("k", [20, None])
def test_the_module(device: str, k: int | None) -> None:
    logits, labels = make(12, V, device=device, ignored=0.2)
    criterion = eaft_ext.GatedCrossEntropyLoss(k, z_loss=1e-3)
    assert f"k={k}" in repr(criterion) and "return_stats" not in repr(criterion)
    assert same_bits(criterion(logits, labels), gated_ce(logits, labels, k, z_loss=1e-3))
    for wrong in (0, 1):
        with pytest.raises(ValueError, match="k must be from 2 to 128, or None for all"):
            eaft_ext.GatedCrossEntropyLoss(wrong)


@pytest.mark.parametrize("k", [20, None])
def test_compiled(device: str, k: int | None) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return gated_ce(x, y, k, z_loss=1e-3, return_stats="full")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows, vocab_size in ((12, 300), (31, 4100)):
            logits, labels = make(num_rows, vocab_size, device=device, ignored=0.2)
            found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            loss, stats = compiled(found, labels)
            its_loss, its_stats = function(expected, labels)
            torch.testing.assert_close(loss, its_loss)
            assert type(stats) is TokenStats
            for name, a, b in zip(TOLD, stats, its_stats, strict=False):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
            loss.backward()
            its_loss.backward()
            torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("k", [20, None])
def test_meta_tensors(k: int | None) -> None:
    logits = torch.empty(2, 3, V, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(2, 3, dtype=torch.int64, device="meta")
    stats = _stats(logits, labels, k=k, z_loss=1e-3)
    for name, value in zip(TOLD, stats, strict=False):
        dtype = torch.bool if name in ("valid", "correct") else torch.float32
        assert value.is_meta and value.shape == (2, 3) and value.dtype == dtype, name
