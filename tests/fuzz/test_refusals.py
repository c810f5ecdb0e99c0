"""What is wrong in a drawn call is told in one sentence with the value; nothing is read of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import Call, calls, holds
from hypothesis import strategies as st

import eaft_ext

WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "k": (ValueError, {"k": 129}),
    "k_of_one": (ValueError, {"k": 1}),
    "reduction": (ValueError, {"reduction": "avg"}),
    "softcap": (ValueError, {"softcap": 0.0}),
    "logit_scale": (ValueError, {"logit_scale": float("inf")}),
    "label_smoothing": (ValueError, {"label_smoothing": 1.5}),
    "z_loss": (ValueError, {"z_loss": -1.0}),
    "gate": (TypeError, {"gate": 3}),
    "ignore_index": (TypeError, {"ignore_index": 1.0}),
    "num_items_in_batch": (ValueError, {"num_items_in_batch": -2}),
    "unknown": (TypeError, {"temperature": 1.0}),
}


@holds(call=calls(), name=st.sampled_from([*WRONG]))
def test_a_wrong_option(call: Call, name: str) -> None:
    drawn, how = call
    kind, wrong = WRONG[name]
    logits, labels = drawn.make()
    with pytest.raises(kind) as raised:
        eaft_ext.gated_ce(logits, labels, **how | wrong)
    told = str(raised.value)
    assert "\n" not in told and told.startswith("gated_ce"), told
    assert str(next(iter(wrong))) in told, told


@holds(
    20,
    call=calls(),
    where=st.integers(0, 2**16),
    beyond=st.sampled_from([0, 1, 1000, 2**30]),
    below=st.booleans(),
    fused=st.booleans(),
)
def test_a_label_outside_the_vocabulary(
    call: Call, where: int, beyond: int, below: bool, fused: bool
) -> None:
    """Its position and value are named, however far away it is: it is no offset into memory."""
    drawn, how = call
    logits, labels = drawn.make()
    wrong = -1 - beyond if below else drawn.vocab_size + beyond
    if drawn.num_tokens == 0 or wrong == drawn.ignore_index:
        return
    flat = labels.view(-1)
    position = where % drawn.num_tokens
    flat[position] = wrong
    with pytest.raises(ValueError) as raised:
        eaft_ext.gated_ce(logits.requires_grad_(), labels, gradient_in_forward=fused, **how)
    index = [int(i) for i in torch.unravel_index(torch.tensor(position), labels.shape)]
    assert f"at position {index} is {wrong}, outside [0, {drawn.vocab_size})" in str(raised.value)
