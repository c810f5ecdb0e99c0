"""Bad input gets the right exception, and one sentence with the offending values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import REFUSAL
from torch import Tensor

from eaft_ext import gated_ce, topk

ops = torch.ops.eaft_ext

V = 9


def _logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, V, dtype=dtype)


def _labels(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def _call(**changed: Any) -> Any:
    arguments = {"logits": _logits(2, 3), "labels": _labels(2, 3)} | changed
    return gated_ce(**arguments)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits must be a tensor, got list"),
        ({"logits": _logits(2, 3, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"logits": _logits(2, 3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"V of at least 1, got \(\)"),
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"V of at least 1, got \(2, 3, 0\)"),
        ({"labels": [0, 1]}, TypeError, "labels must be a tensor, got list"),
        ({"labels": _labels(2, 3, dtype=torch.float32)}, TypeError, "got torch.float32"),
        ({"labels": _labels(2, 3, dtype=torch.int16)}, TypeError, "got torch.int16"),
        ({"labels": _labels(2, 3, dtype=torch.bool)}, TypeError, "got torch.bool"),
        ({"labels": _labels(6)}, ValueError, r"got \(6,\) for logits \(2, 3, 9\)"),
        ({"labels": _labels(3, 2)}, ValueError, r"got \(3, 2\) for logits \(2, 3, 9\)"),
        ({"labels": _labels(1, 3)}, ValueError, r"got \(1, 3\) for logits \(2, 3, 9\)"),
        ({"labels": _labels(2, 3, 9)}, ValueError, r"got \(2, 3, 9\) for logits \(2, 3, 9\)"),
        ({"labels": _labels(2, 3).to("meta")}, ValueError, "labels are on meta and logits on cpu"),
        ({"k": 1}, ValueError, "k must be from 2 to 128, or None for all, got 1"),
        ({"k": 129}, ValueError, "k must be from 2 to 128, or None for all, got 129"),
        ({"k": 0}, ValueError, "got 0"),
        ({"k": -3}, ValueError, "got -3"),
        ({"k": 20.0}, TypeError, r"k must be an int, or None for all, got 20\.0"),
        ({"k": True}, TypeError, "k must be an int, or None for all, got True"),
        ({"k": "20"}, TypeError, "k must be an int, or None for all, got '20'"),
        ({"reduction": "avg"}, ValueError, "'mean', 'sum' or 'none', got 'avg'"),
        ({"reduction": None}, ValueError, "'mean', 'sum' or 'none', got None"),
        ({"reduction": []}, ValueError, r"'mean', 'sum' or 'none', got \[\]"),
        ({"num_items_in_batch": -1}, ValueError, "at least 0, got -1"),
        ({"num_items_in_batch": float("nan")}, ValueError, "at least 0, got nan"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, r"a tensor of shape \(2,\)"),
        ({"num_items_in_batch": torch.ones(0)}, ValueError, r"a tensor of shape \(0,\)"),
        ({"num_items_in_batch": "7"}, TypeError, "'7'"),
        ({"num_items_in_batch": 7, "reduction": "sum"}, ValueError, "reduction='sum'"),
        ({"num_items_in_batch": 7, "reduction": "none"}, ValueError, "reduction='none'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gated_ce(changed: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as raised:
        _call(**changed)
    message = str(raised.value)
    assert message.startswith("gated_ce: ") and "\n" not in message


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(
    ("logits", "k", "error", "sentence"),
    [
        ("logits", 1, TypeError, "logits must be a tensor, got str"),
        (_logits(2, dtype=torch.int32), 1, TypeError, "got torch.int32"),
        (torch.tensor(1.0), 1, ValueError, r"got \(\)"),
        (torch.zeros(3, 0), 1, ValueError, r"got \(3, 0\)"),
        (_logits(2), 0, ValueError, "k must be from 1 to 9, got 0"),
        (_logits(2), -1, ValueError, "k must be from 1 to 9, got -1"),
        (_logits(2), 10, ValueError, "k must be from 1 to 9, got 10"),
        (torch.zeros(2, 500), 129, ValueError, "k must be from 1 to 128, got 129"),
        (_logits(2), 3.0, TypeError, r"k must be an int, got 3\.0"),
        (_logits(2), False, TypeError, "k must be an int, got False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_topk(logits: Any, k: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as raised:
        topk(logits, k)
    message = str(raised.value)
    assert message.startswith("topk: ") and "\n" not in message


def _forward(**changed: Any) -> Any:
    arguments = {
        "logits": _logits(3),
        "labels": _labels(3),
        "k": 4,
        "gate": "entropy",
        "gate_parameters": [1.0],
        "ignore_index": -100,
    } | changed
    return ops.gated_ce_forward(**arguments)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"gate": "unknown"}, "got unknown"),
        ({"gate_parameters": []}, "gate entropy takes from 1 to 2 .*got 0"),
        ({"gate_parameters": [1.0, 2.0, 3.0]}, "got 3"),
        ({"gate": "none"}, "gate none takes .* got 1"),
        ({"gate": "sigmoid"}, "gate sigmoid takes .* got 1"),
        ({"gate": "hard", "gate_parameters": []}, "gate hard takes .* got 0"),
        ({"gate": "focal", "gate_parameters": []}, "gate focal takes .* got 0"),
        ({"gate": "probability"}, "gate probability takes .* got 1"),
        ({"k": 1}, "k must be from 2 to 128, or 0 for all logits, got 1"),
        ({"k": 129}, "k must be from 2 to 128, or 0 for all logits, got 129"),
        ({"k": -1}, "k must be from 2 to 128, or 0 for all logits, got -1"),
        ({"num_extra": -1}, "num_extra must be from 0 to 3, got -1"),
        ({"num_extra": 4}, "num_extra must be from 0 to 3, got 4"),
        ({"labels": _labels(4)}, r"got \[4\] for logits \[3, 9\]"),
        ({"labels": torch.zeros(3)}, "int64 or int32, got Float"),
        ({"logits": torch.zeros(3, 0)}, r"got \[3, 0\]"),
        ({"logits": torch.tensor(0.0)}, r"got \[\]"),
        ({"logits": _logits(3).long()}, "got Long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_operators_check_for_themselves(changed: dict[str, Any], sentence: str) -> None:
    """They are public too, as torch.ops.eaft_ext, and must not read past a tensor's end.

    A stable ABI has no TypeError: that is for the public functions, which check before.
    """
    with pytest.raises(REFUSAL, match=sentence):
        _forward(**changed)


@pytest.mark.parametrize("wrong", ["weight", "row_max", "log_sum", "labels"])
@pytest.mark.parametrize("op", ["gated_ce_backward", "gated_ce_backward_"])
def test_backward_checks_its_shapes(op: str, wrong: str) -> None:
    arguments: dict[str, Any] = dict.fromkeys(("weight", "row_max", "log_sum"), torch.ones(3))
    arguments |= {"logits": _logits(3), "labels": _labels(3), "ignore_index": -100}
    arguments[wrong] = arguments[wrong][:2]
    with pytest.raises(REFUSAL, match=rf"{wrong} must have .* got \[2\] for logits \[3, 9\]"):
        getattr(ops, op)(**arguments)
    assert not arguments["logits"].any()


@pytest.mark.parametrize("op", ["gated_ce_forward_with_grad", "gated_ce_forward_with_grad_"])
def test_forward_with_grad_checks_its_shapes(op: str) -> None:
    logits = _logits(3)
    with pytest.raises(REFUSAL, match=r"upstream must have .* got \[2\] for logits \[3, 9\]"):
        getattr(ops, op)(torch.ones(2), logits, _labels(3), 4, "none", [], -100)
    assert not logits.any()


@pytest.mark.parametrize("op", ["gated_ce_backward", "gated_ce_backward_"])
def test_backward_of_a_number_is_refused_in_a_sentence(op: str) -> None:
    per_row = torch.tensor(1.0)
    with pytest.raises(REFUSAL, match=r"logits must be \(\.\.\., V\) .*got \[\]"):
        getattr(ops, op)(per_row, torch.tensor(0.5), torch.tensor(0), per_row, per_row, -100)


def test_a_vocabulary_far_before_its_shard_leaves_no_words() -> None:
    """A difference that an integer cannot hold must not count padding as words."""
    logits = torch.full((1, 4), torch.nan)
    partial = ops.gated_ce_partial(logits, _labels(1), 2, 3, -(2**63), -100)
    assert partial.isnan().sum() == partial.size(-1) - 2


def test_the_gradient_to_be_scaled_is_of_floats() -> None:
    with pytest.raises(REFUSAL, match=r"scale_gradient_: logits must be float32.* got Int"):
        ops.scale_gradient_(torch.ones(3, 4, dtype=torch.int32), torch.tensor(2.0))
