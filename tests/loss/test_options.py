"""The keywords that the public functions share: one home, shown everywhere, checked once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

import eaft_ext
from eaft_ext import reference
from eaft_ext._options import Keywords, LossKeywords, Reduce, TokenLoss, token_loss
from eaft_ext.integrations import megatron, transformers
from eaft_ext.parallel._group import Words
from eaft_ext.parallel._shard import VocabShard

LOSSES: list[Callable[..., Any]] = [
    eaft_ext.gated_ce,
    eaft_ext.linear_gated_ce,
    eaft_ext.vocab_parallel_gated_ce,
    eaft_ext.vocab_parallel_linear_gated_ce,
]
OF_A_TOKEN: list[Callable[..., Any]] = [
    eaft_ext.GatedCrossEntropyLoss,
    megatron.use_gated_ce,
    megatron.vocab_parallel_cross_entropy,
    transformers.use_linear_gated_ce,
]


@pytest.mark.parametrize("function", LOSSES + OF_A_TOKEN, ids=lambda function: function.__name__)
def test_help_shows_every_keyword(function: Callable[..., Any]) -> None:
    """With its default and its type, which the reference, by itself, has too."""
    expected = inspect.signature(reference.gated_ce).parameters
    shown = inspect.signature(function).parameters
    for name in (Keywords if function in LOSSES else LossKeywords).__annotations__:
        is_megatrons = (function, name) == (
            megatron.vocab_parallel_cross_entropy,
            "label_smoothing",
        )
        assert is_megatrons or shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[name].default == expected[name].default, name
        if name != "gate":  # of which the reference knows no class
            assert shown[name].annotation == expected[name].annotation, name
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())


def test_unknown_keywords() -> None:
    logits, labels = torch.randn(2, 5), torch.tensor([1, 2])
    with pytest.raises(TypeError, match=r"^gated_ce\(\) got an unexpected keyword argument 'alhpa"):
        eaft_ext.gated_ce(logits, labels, alhpa=2.0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"^GatedCrossEntropyLoss\(\) got an unexpected .* 'redct'"):
        eaft_ext.GatedCrossEntropyLoss(redct="sum")  # type: ignore[call-arg]


def test_processes_compare_every_field() -> None:
    of_token = token_loss("op", 20)
    note = Words(VocabShard(0, None, 9), None).note(9, of_token, Reduce("mean", None))
    assert {field.name for field in fields(TokenLoss) if field.compare} < set(note)
    assert note["k"] == 20 and note["gate"] == "EntropyGate(alpha=1.0, normalizer=None)"


def test_options_do_not_change() -> None:
    with pytest.raises(AttributeError):
        token_loss("op", 20).k = 3  # type: ignore[misc]
