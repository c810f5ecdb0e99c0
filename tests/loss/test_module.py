"""The loss inside training code: a module, under autocast and checkpointing, copied and saved."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from inputs import make, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eaft_ext import EntropyGate, FocalGate, GatedCrossEntropyLoss, NoGate, SigmoidGate, gated_ce

V = 300

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "k": {"k": 8},
    "shorthand": {"alpha": 2.0, "normalizer": 3.0},
    "gate": {"gate": FocalGate(2.0), "reduction": "sum"},
    "labels": {"ignore_index": 0, "reduction": "none"},
    "in_place": {"inplace_backward": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_module_is_the_function(device: str, options: dict[str, Any]) -> None:
    logits, labels = make(12, V, device=device)
    labels[::4] = options.get("ignore_index", -100)
    found = []
    for loss in (GatedCrossEntropyLoss(**options), lambda x, y: gated_ce(x, y, **options)):
        x = logits.clone().requires_grad_()
        value = loss(x * 1, labels)
        value.sum().backward()
        assert x.grad is not None
        found.append((value, x.grad))
    assert same_bits(found[0][0], found[1][0]) and same_bits(found[0][1], found[1][1])


def test_module_takes_the_count_of_items(device: str) -> None:
    logits, labels = make(12, V, device=device)
    loss = GatedCrossEntropyLoss()(logits, labels, num_items_in_batch=50)
    assert same_bits(loss, gated_ce(logits, labels, num_items_in_batch=50))


def test_module_options_are_those_of_the_function() -> None:
    """All but what belongs to a call."""
    keywords = set(gated_ce.__kwdefaults__) | {"k"}
    assert set(GatedCrossEntropyLoss.__init__.__kwdefaults__) | {"k"} == keywords - {
        "num_items_in_batch",
        "token_weight",
        "return_stats",
    }
    for name, default in GatedCrossEntropyLoss.__init__.__kwdefaults__.items():
        assert gated_ce.__kwdefaults__[name] == default, name


@pytest.mark.parametrize("gate", [None, EntropyGate(2.0), SigmoidGate(), NoGate()], ids=str)
def test_module_is_copied_and_saved(gate: Any) -> None:
    logits, labels = make(12, V)
    loss = GatedCrossEntropyLoss(k=8, gate=gate, reduction="sum", ignore_index=3)
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in twins:
        assert same_bits(twin(logits, labels), loss(logits, labels))
        assert repr(twin) == repr(loss)
    assert not loss.state_dict() and not list(loss.parameters())


def test_module_says_what_it_is() -> None:
    text = repr(GatedCrossEntropyLoss(k=8, gate=FocalGate(2.0), reduction="sum"))
    assert "k=8" in text and "FocalGate(gamma=2.0)" in text and "sum" in text
    assert "alpha=2.0" in repr(GatedCrossEntropyLoss(alpha=2.0))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"k": 1}, ValueError),
        ({"alpha": -1.0}, ValueError),
        ({"gate": "focal"}, TypeError),
        ({"gate": NoGate(), "normalizer": 3.0}, TypeError),
        ({"reduction": "avg"}, ValueError),
    ],
    ids=str,
)
def test_module_refuses_options_when_it_is_made(
    options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        GatedCrossEntropyLoss(**options)


@pytest.mark.parametrize("half_type", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device: str, half_type: torch.dtype) -> None:
    """The linear layer gives 16-bit logits, the loss stays in float32."""
    layer = nn.Linear(16, V, device=device)
    hidden = torch.randn(12, 16, device=device)
    _, labels = make(12, V, device=device, ignored=0.2)
    with torch.autocast(device, dtype=half_type):
        logits = layer(hidden)
        loss, stats = gated_ce(logits, labels, return_stats=True)
        losses = gated_ce(logits, labels, reduction="none")
    assert logits.dtype == half_type
    assert loss.dtype == losses.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in stats[:3])
    torch.testing.assert_close(loss, gated_ce(logits.float(), labels))
    loss.backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.any()


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_checkpointing(device: str, reentrant: bool, inplace: bool) -> None:
    """The logits are thrown away and computed again in the backward."""
    weight = torch.randn(V, 16, device=device)
    _, labels = make(12, V, device=device, ignored=0.2)

    def head(hidden: Tensor) -> Tensor:
        return gated_ce(hidden @ weight.T, labels, inplace_backward=inplace)

    kept = torch.randn(12, 16, device=device, requires_grad=True)
    thrown = kept.detach().clone().requires_grad_()
    expected = head(kept)
    expected.backward()
    loss = checkpoint(head, thrown, use_reentrant=reentrant)
    loss.backward()
    assert kept.grad is not None and thrown.grad is not None
    assert same_bits(loss, expected) and same_bits(thrown.grad, kept.grad)


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])
def test_training_lowers_the_loss(device: str, inplace: bool) -> None:
    """A whole loop: module, optimiser, accumulation over two parts."""
    layer = nn.Linear(16, V, device=device)
    criterion = GatedCrossEntropyLoss(inplace_backward=inplace)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    hidden = torch.randn(24, 16, device=device)
    _, labels = make(24, V, device=device, ignored=0.2)
    count = (labels != -100).sum()
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        total = 0.0
        for part in (slice(0, 12), slice(12, 24)):
            loss = criterion(layer(hidden[part]), labels[part], num_items_in_batch=count)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    assert losses[-1] < 0.5 * losses[0]
