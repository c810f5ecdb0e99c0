"""What stays as it is in a model of transformers whose loss is replaced, and comes back after."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import copy
import inspect
import io
from functools import wraps
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

MISSING = "needs transformers: pip install '.[test]'"
pytest.importorskip("transformers", reason=MISSING)

from transformers_models import batch, build, close, own_attributes, unfused

from eaft_ext.integrations.transformers import use_linear_gated_ce


def generated(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    tokens, _ = batch()
    given = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(tokens, **given, output_logits=True, **options)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("name", ["llama", "phi", "mixtral"])
def test_generation(name: str) -> None:
    # Mixtral's router losses do not go with a cache in all releases.
    model = build(name, **{"output_router_logits": False} if name == "mixtral" else {})
    tokens, labels = batch()
    before = generated(model)
    assert len(before[0][0, 9:].unique()) > 1
    with use_linear_gated_ce(model):
        within = generated(model)
        model(tokens, labels=labels)
        sampled = generated(model, num_beams=2)
    after = generated(model)
    for found in (within, after):
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    assert torch.equal(sampled[0], generated(model, num_beams=2)[0])


def test_calls_without_labels() -> None:
    model = build("mixtral")
    tokens, labels = batch()
    before = model(tokens)
    use_linear_gated_ce(model)
    model(tokens, labels=labels)
    after = model(tokens)
    assert list(after) == list(before) and "logits" in after
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(model(input_ids=tokens, labels=None).logits, before.logits)
    assert torch.equal(model.lm_head(model.model(tokens).last_hidden_state), before.logits)


def test_what_the_model_shows_of_itself() -> None:
    model = build("llama")
    signature = inspect.signature(model.forward)
    keys, named = list(model.state_dict()), [name for name, _ in model.named_modules()]
    with use_linear_gated_ce(model):
        assert inspect.signature(model.forward) == signature
        assert model.forward.__name__ == "forward" and model.forward.__doc__
        assert list(model.state_dict()) == keys
        assert [name for name, _ in model.named_modules()] == named


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_removal(name: str) -> None:
    model = build(name)
    tokens, labels = batch()
    assert model.loss_function is not None  # a class may settle on one when it is first asked
    before, expected = own_attributes(model), model(tokens, labels=labels).loss
    with use_linear_gated_ce(model) as gated:
        assert own_attributes(model) != before
        assert model(tokens, labels=labels).logits is None
    assert own_attributes(model) == before
    assert torch.equal(model(tokens, labels=labels).loss, expected)
    gated.remove()
    assert own_attributes(model) == before


def test_a_loss_of_ones_own_comes_back() -> None:
    model = build("llama")
    tokens, labels = batch()

    def own(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return logits.sum()

    model.loss_function = own
    model.forward = MethodType(type(model).forward, model)
    before = own_attributes(model)
    with use_linear_gated_ce(model):
        assert model(tokens, labels=labels).logits is None
    assert own_attributes(model) == before
    assert model.loss_function is own


def test_of_several_calls_the_last_counts() -> None:
    model = build("llama")
    tokens, labels = batch()
    before = own_attributes(model)
    expected = unfused(model, tokens, labels, k=5)
    first = use_linear_gated_ce(model)
    second = use_linear_gated_ce(model, k=5)
    close(model(tokens, labels=labels).loss, expected)
    assert first.stats is None and second.stats is not None
    first.remove()
    close(model(tokens, labels=labels).loss, expected)
    second.remove()
    assert own_attributes(model) == before
    third = use_linear_gated_ce(model)
    model.loss_function = lambda logits, labels, *_, **__: logits.sum()
    fourth = use_linear_gated_ce(model, k=5)
    third.remove()
    close(model(tokens, labels=labels).loss, expected)
    fourth.remove()
    assert model(tokens, labels=labels).logits is not None


def wrapped_forward(model: Any) -> list[Any]:
    """As accelerate does it for mixed precision; gives one entry for each call."""
    function, calls = model.forward.__func__, list[Any]()

    @wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    model.forward = MethodType(forward, model)
    return calls


def test_under_a_wrapper_of_the_forward() -> None:
    model = build("llama")
    tokens, labels = batch()
    expected = model(tokens, labels=labels)
    first = use_linear_gated_ce(model, k=5)
    calls = wrapped_forward(model)
    gated = unfused_of_copy(tokens, labels, k=5)
    close(model(tokens, labels=labels).loss, gated)
    with use_linear_gated_ce(model, k=6):
        close(model(tokens, labels=labels).loss, unfused_of_copy(tokens, labels, k=6))
    first.remove()
    outputs = model(tokens, labels=labels)
    assert torch.equal(outputs.loss, expected.loss) and outputs.logits is not None
    assert len(calls) == 3
    with use_linear_gated_ce(model, k=5):
        close(model(tokens, labels=labels).loss, gated)
    assert len(calls) == 4


def test_over_a_forward_that_is_no_method() -> None:
    model = build("llama")
    tokens, labels = batch()
    own = model.forward

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.forward = forward
    signature = inspect.signature(model.forward)
    with use_linear_gated_ce(model):
        assert inspect.signature(model.forward) == signature
        outputs = model(tokens, None, None, None, None, labels)
        close(outputs.loss, unfused_of_copy(tokens, labels))
        assert outputs.logits is None
    assert model.forward is forward


def unfused_of_copy(tokens: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return unfused(build("llama"), tokens, labels, **options)


def test_hooks_of_accelerate() -> None:
    """Which have a module's arguments moved to where it is."""
    hooks = pytest.importorskip(
        "accelerate.hooks", reason="needs accelerate: pip install accelerate"
    )
    tokens, labels = batch()
    expected = unfused_of_copy(tokens, labels)
    model = build("llama")
    for module in (model, model.lm_head):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    seen: list[Any] = []
    of_head = model.lm_head._hf_hook
    pre_forward = of_head.pre_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(None)
        return pre_forward(*args, **kwargs)

    of_head.pre_forward = counted
    before = own_attributes(model)
    with use_linear_gated_ce(model):
        outputs = model(tokens, labels=labels)
        close(outputs.loss, expected)
        assert outputs.logits is None and len(seen) == 1
    assert own_attributes(model) == before
    with use_linear_gated_ce(model):
        for module in (model, model.lm_head):
            hooks.remove_hook_from_module(module)
        close(model(tokens, labels=labels).loss, expected)
    assert model(tokens, labels=labels).logits is not None


def test_hooks_of_accelerate_that_come_later() -> None:
    hooks = pytest.importorskip(
        "accelerate.hooks", reason="needs accelerate: pip install accelerate"
    )
    tokens, labels = batch()
    model = build("llama")
    gated = use_linear_gated_ce(model)
    for module in (model, model.lm_head):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    close(model(tokens, labels=labels).loss, unfused_of_copy(tokens, labels))
    other = use_linear_gated_ce(model, k=5)
    close(model(tokens, labels=labels).loss, unfused_of_copy(tokens, labels, k=5))
    gated.remove()
    other.remove()
    expected = build("llama")(tokens, labels=labels)
    outputs = model(tokens, labels=labels)
    assert torch.equal(outputs.loss, expected.loss) and torch.equal(outputs.logits, expected.logits)


@pytest.mark.parametrize("has_forward", [False, True])
def test_deep_copies(has_forward: bool) -> None:
    """A copy has the loss, with its own weights."""
    model = build("llama")
    if has_forward:
        model.forward = MethodType(type(model).forward, model)
    tokens, labels = batch()
    own = model(tokens, labels=labels).loss
    gated = use_linear_gated_ce(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    outputs = twin(tokens, labels=labels)
    close(outputs.loss, unfused_of_copy(tokens, labels))
    assert outputs.logits is None and gated.stats is not None
    assert all(p.grad is None for p in model.parameters())
    # A call for the copy leaves the original its own.
    other = use_linear_gated_ce(twin, k=5)
    close(twin(tokens, labels=labels).loss, unfused_of_copy(tokens, labels, k=5))
    assert model(tokens, labels=labels).logits is None
    other.remove()
    assert twin(tokens, labels=labels).logits is not None
    assert model(tokens, labels=labels).logits is None
    assert twin.forward.__self__ is twin
    model.load_state_dict(twin.state_dict())
    third = copy.deepcopy(model)
    gated.remove()
    for one in (model, third):
        outputs = one(tokens, labels=labels)
        assert torch.equal(outputs.loss, own) and outputs.logits is not None


def test_a_pickled_model_has_its_own_loss() -> None:
    model = build("llama")
    tokens, labels = batch()
    expected = model(tokens, labels=labels)
    use_linear_gated_ce(model, gate=lambda nll, entropy: nll)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)(tokens, labels=labels)
    close(found.loss, expected.loss)
    close(found.logits, expected.logits)
