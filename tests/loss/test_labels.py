"""Labels: ignored ones, wrong ones, none at all, and their dtypes and shapes."""

from __future__ import annotations

import pytest
import torch
from inputs import REFUSAL, make, same_bits, upstream_of
from parity import Outcome, assert_parity, outcome
from torch import Tensor

import eaft_ext
from eaft_ext import NoGate

ops = torch.ops.eaft_ext

REDUCTIONS = ["mean", "sum", "none"]
V = 300


def _run(logits: Tensor, labels: Tensor, **options: object) -> Outcome:
    options = {"reduction": "none"} | options
    return outcome(eaft_ext.gated_ce, logits, labels, upstream_of(labels), **options)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("num_rows", [4, 12], ids=["few_rows", "many_rows"])
def test_int32(device: str, num_rows: int) -> None:
    logits, labels = make(num_rows, V, device=device, ignored=0.3)
    for a, b in zip(_run(logits, labels.int()), _run(logits, labels), strict=True):
        assert same_bits(a, b)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("dtype_of_labels", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_labels_that_are_not_contiguous(device: str, dtype_of_labels: torch.dtype) -> None:
    logits, labels = make(12, V, device=device, ignored=0.3)
    spread = torch.full((12, 2), 7, dtype=dtype_of_labels, device=device)
    spread[:, 1] = labels
    for a, b in zip(_run(logits, spread[:, 1]), _run(logits, labels), strict=True):
        assert same_bits(a, b)
    assert_parity(logits, spread[:1, 0].expand(12))


@pytest.mark.usefixtures("poisoned_memory", "route")
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 17, V, 2**40])
@pytest.mark.parametrize("num_rows", [4, 12], ids=["few_rows", "many_rows"])
def test_ignore_index(device: str, dtype: torch.dtype, ignore_index: int, num_rows: int) -> None:
    """Also one inside the vocabulary: that token is then never learned."""
    logits, labels = make(num_rows, V, dtype, device=device)
    labels[labels == ignore_index] = 1
    kept = _run(logits, labels)
    labels[1::3] = ignore_index
    found = _run(logits, labels, ignore_index=ignore_index)
    ignored = labels == ignore_index
    for field, a, b in zip(Outcome._fields, found, kept, strict=True):
        assert not a[ignored].any(), field
        assert same_bits(a[~ignored], b[~ignored]), field
    mean = eaft_ext.gated_ce(logits, labels, ignore_index=ignore_index)
    torch.testing.assert_close(mean, found.loss.sum() / (~ignored).sum())


@pytest.mark.usefixtures("poisoned_memory", "route")
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "shape", [(), (3,), (12,), (2, 5), (0,), (0, 4), (2, 0), (2, 3, 0)], ids=str
)
def test_nothing_to_learn_from(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    reduction: str,
    inplace_backward: bool,
) -> None:
    """Exactly 0.0, connected to the graph, with zero gradients; and it may be scaled in place."""
    logits = torch.randn(*shape, V, device=device).to(dtype).requires_grad_()
    labels = torch.full(shape, -100, device=device)
    loss, stats = eaft_ext.gated_ce(
        logits * 1,
        labels,
        reduction=reduction,
        inplace_backward=inplace_backward,
        return_stats=True,
    )
    assert loss.shape == (shape if reduction == "none" else ())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.requires_grad and not loss.any() and not loss.isnan().any()
    told = [value for value in stats if value is not None]
    assert all(value.shape == shape and not value.any() for value in told)
    loss.mul_(3)
    loss /= 2
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape and not logits.grad.any()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_token(device: str, dtype: torch.dtype, reduction: str) -> None:
    """Logits (V) with a label (): the same as (1, V) with (1)."""
    logits, labels = make(1, V, dtype, device=device)
    row = logits[0].requires_grad_()
    loss = eaft_ext.gated_ce(row, labels[0], reduction=reduction)
    assert loss.shape == ()
    loss.backward()
    expected = outcome(
        eaft_ext.gated_ce, logits, labels, torch.ones(1, device=device), reduction="none"
    )
    assert same_bits(loss, expected.loss[0])
    assert row.grad is not None and same_bits(row.grad, expected.gradient[0])


@pytest.mark.parametrize("wrong", [-1, V, V + 1, -101, 2**31, 2**32 + 3, -(2**63)])
@pytest.mark.parametrize("num_rows", [4, 12], ids=["few_rows", "many_rows"])
def test_out_of_range_on_cpu(wrong: int, num_rows: int) -> None:
    logits, labels = make(num_rows, V)
    labels[2] = wrong
    with pytest.raises(ValueError, match=rf"position \[2\] is {wrong}, outside \[0, {V}\)"):
        eaft_ext.gated_ce(logits, labels)


def test_out_of_range_names_the_first_position() -> None:
    logits = torch.randn(2, 3, 4, V)
    labels = torch.zeros(2, 3, 4, dtype=torch.int32)
    labels[1, 0, 2] = labels[1, 2, 3] = 1000
    message = r"position \[1, 0, 2\] is 1000, outside \[0, 300\) and not ignore_index -7"
    with pytest.raises(ValueError, match=message):
        eaft_ext.gated_ce(logits, labels, ignore_index=-7)
    with pytest.raises(ValueError, match=r"position \[\] is 300"):
        eaft_ext.gated_ce(logits[0, 0, 0], torch.tensor(V))


@pytest.mark.parametrize("num_rows", [4, 12], ids=["few_rows", "many_rows"])
def test_out_of_range_writes_nothing(num_rows: int) -> None:
    logits, labels = make(num_rows, V)
    before = logits.clone()
    stats = torch.ones(num_rows)
    labels[num_rows - 1] = V
    with pytest.raises(REFUSAL, match=r"is 300"):
        ops.gated_ce_forward_with_grad_(stats, logits, labels, 20, "none", [], -100)
    with pytest.raises(REFUSAL, match=r"is 300"):
        ops.gated_ce_backward_(stats, logits, labels, stats, stats, -100)
    assert same_bits(logits, before) and logits._version == 0


@pytest.mark.parametrize("wrong", [-1, V, 2**32 + 3])
def test_out_of_range_without_a_check(
    device: str, wrong: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a check would cost a synchronisation: NaN for that token, and never a wrong read."""
    if device == "cpu":
        request.getfixturevalue("without_kernels")
    logits, labels = make(12, V, device=device)
    expected = _run(logits, labels, gate=NoGate())
    labels[2] = wrong
    found = _run(logits, labels, gate=NoGate())
    others = torch.arange(12) != 2
    assert found.loss[2].isnan() and found.nll[2].isnan()
    assert found.gradient[2].isnan().all()
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a[others], b[others])
    monkeypatch.setenv("EAFT_EXT_CHECKS", "1")
    with pytest.raises(ValueError, match=rf"position \[2\] is {wrong}, outside \[0, {V}\)"):
        eaft_ext.gated_ce(logits, labels)
    # An ignored label is not a wrong one, wherever it lies.
    eaft_ext.gated_ce(logits, labels, ignore_index=wrong)


@pytest.mark.usefixtures("without_kernels")
def test_checks_on_request_name_the_first_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAFT_EXT_CHECKS=1 adds the check where there is none, and says what the CPU kernels say."""
    monkeypatch.setenv("EAFT_EXT_CHECKS", "1")
    logits = torch.randn(2, 3, 4, V)
    labels = torch.zeros(2, 3, 4, dtype=torch.int32)
    labels[1, 0, 2] = labels[1, 2, 3] = 1000
    message = r"position \[1, 0, 2\] is 1000, outside \[0, 300\) and not ignore_index -7"
    with pytest.raises(ValueError, match=message):
        eaft_ext.gated_ce(logits, labels, ignore_index=-7)
    with pytest.raises(ValueError, match=r"position \[\] is 300"):
        eaft_ext.gated_ce(logits[0, 0, 0], torch.tensor(V))
