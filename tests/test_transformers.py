"""Models of transformers that return the gated loss, and no logits."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import copy
import inspect
import io
import threading
from functools import wraps
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

import eaft_ext

MISSING = "needs transformers: pip install '.[test]'"
pytest.importorskip("transformers", reason=MISSING)

from transformers_models import (
    MODELS,
    V,
    assert_same,
    batch,
    build,
    gradients,
    own_attributes,
    shifted,
    unfused,
)

from eaft_ext.integrations.transformers import use_linear_gated_ce


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# The loss


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_logits(name: str) -> None:
    model = build(name)
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    its_gradients = gradients(model, expected)
    use_linear_gated_ce(model, chunk_size=5)
    outputs = model(tokens, labels=labels)
    close(outputs.loss, expected)
    assert outputs.loss.dtype == torch.float32
    assert outputs.logits is None and "logits" not in outputs
    assert outputs.past_key_values is not None or name == "bert"
    assert_same(gradients(model, outputs.loss), its_gradients)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 5},
        {"alpha": 2.0, "normalizer": 3.0},
        {"gate": eaft_ext.FocalGate(2.0)},
        {"gate": lambda nll, entropy: entropy / (1 + nll)},
        {"accumulate_in_float32": True, "chunk_size": 3},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    model = build("llama")
    tokens, labels = batch()
    of_the_loss = {k: v for k, v in options.items() if k in ("k", "alpha", "normalizer", "gate")}
    expected = unfused(model, tokens, labels, **of_the_loss)
    its_gradients = gradients(model, expected)
    assert not torch.isclose(expected, unfused(model, tokens, labels)) or not of_the_loss
    use_linear_gated_ce(model, **options)
    loss = model(tokens, labels=labels).loss
    close(loss, expected)
    assert_same(gradients(model, loss), its_gradients)


def test_options_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no result that could be looked at."""
    seen: dict[str, Any] = {}
    linear_gated_ce = eaft_ext.linear_gated_ce

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return linear_gated_ce(*args, **kwargs)

    monkeypatch.setattr(eaft_ext, "linear_gated_ce", spy)
    model = build("llama")
    tokens, labels = batch()
    use_linear_gated_ce(model, chunk_size=3, accumulate_in_float32=True)
    model(tokens, labels=labels)
    assert (seen["chunk_size"], seen["accumulate_in_float32"]) == (3, True)


def test_num_items_in_batch() -> None:
    model = build("llama")
    tokens, labels = batch()
    expected = unfused(model, tokens, labels, num_items_in_batch=40)
    use_linear_gated_ce(model)
    for num_items in (40, torch.tensor(40), torch.tensor([40])):
        close(model(tokens, labels=labels, num_items_in_batch=num_items).loss, expected)


def test_shifted_labels() -> None:
    """They go before labels, and are not shifted."""
    model = build("llama")
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    use_linear_gated_ce(model)
    for of_shape in (shifted(labels), shifted(labels).flatten()):
        close(model(tokens, labels=tokens, shift_labels=of_shape).loss, expected)
    with pytest.raises(ValueError, match=r"labels must be one for each position, got \(2, 8\)"):
        model(tokens, labels=labels, shift_labels=labels[:, 1:])


def test_ignored_labels() -> None:
    """By the index of the call for the model, or of the forward; what is shifted in is ignored."""
    model = build("llama")
    tokens, labels = batch()
    others = labels.masked_fill(labels == -100, 7)
    logits = model(tokens).logits
    expected = eaft_ext.gated_ce(logits, shifted(others, 7), ignore_index=7)
    with use_linear_gated_ce(model, ignore_index=7):
        close(model(tokens, labels=others).loss, expected)
    use_linear_gated_ce(model)
    close(model(tokens, labels=others, ignore_index=7).loss, expected)
    nothing = model(tokens, labels=torch.full_like(labels, -100)).loss
    assert nothing.item() == 0 and nothing.requires_grad


def test_how_labels_are_given() -> None:
    model = build("llama")
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    use_linear_gated_ce(model)
    outputs = model(tokens, None, None, None, None, labels)
    close(outputs.loss, expected)
    assert outputs.logits is None
    close(model(input_ids=tokens, labels=labels.int()).loss, expected)
    embeddings = model.get_input_embeddings()(tokens)
    close(model(inputs_embeds=embeddings, labels=labels).loss, expected)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_tuples(name: str) -> None:
    model = build(name)
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    before = model(tokens, labels=labels, return_dict=False)
    use_linear_gated_ce(model)
    outputs = model(tokens, labels=labels, return_dict=False)
    close(outputs[0], expected)
    shapes = [part.shape for part in before if isinstance(part, Tensor)]
    shapes.remove((2, 9, V))
    assert [part.shape for part in outputs if isinstance(part, Tensor)] == shapes
    assert len(outputs) == len(before) - 1


def test_hidden_states_are_returned() -> None:
    model = build("llama")
    tokens, labels = batch()
    before = model(tokens, labels=labels, output_hidden_states=True, use_cache=False)
    use_linear_gated_ce(model)
    outputs = model(tokens, labels=labels, output_hidden_states=True, use_cache=False)
    assert list(outputs) == ["loss", "hidden_states"] and type(outputs) is type(before)
    for found, expected in zip(outputs.hidden_states, before.hidden_states, strict=True):
        assert torch.equal(found, expected)


def test_logits_to_keep() -> None:
    """With labels of so many positions, which only shifted ones can be."""
    model = build("llama")
    tokens, labels = batch()
    expected = eaft_ext.gated_ce(model(tokens).logits[:, -4:], shifted(labels)[:, -4:])
    use_linear_gated_ce(model)
    kept = {"labels": labels, "logits_to_keep": 4}
    close(model(tokens, **kept, shift_labels=shifted(labels)[:, -4:]).loss, expected)
    with pytest.raises(ValueError, match=r"got \(2, 9\) where the output layer has \(2, 4\); logi"):
        model(tokens, **kept)
    assert model(tokens, logits_to_keep=4).logits.shape == (2, 4, V)


def test_stats() -> None:
    model = build("llama")
    tokens, labels = batch()
    logits = model(tokens).logits
    _, expected = eaft_ext.gated_ce(logits, shifted(labels), return_stats=True)
    gated = use_linear_gated_ce(model)
    assert gated.stats is None
    model(tokens)
    assert gated.stats is None
    model(tokens, labels=labels)
    assert gated.stats is not None
    for found, value in zip(gated.stats, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
        assert not found.requires_grad
    gated.remove()
    assert gated.stats is None


def test_the_loss_function_takes_logits_from_others() -> None:
    model = build("llama")
    tokens, labels = batch()
    logits = model(tokens).logits
    expected = eaft_ext.gated_ce(logits, shifted(labels), k=5, num_items_in_batch=40)
    with use_linear_gated_ce(model, k=5, chunk_size=2) as gated:
        close(model.loss_function(logits, labels, V, num_items_in_batch=40), expected)
        assert gated.stats is not None


# Modes


def test_without_gradients() -> None:
    model = build("llama")
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    use_linear_gated_ce(model)
    with torch.no_grad():
        loss = model(tokens, labels=labels).loss
    close(loss, expected)
    assert not loss.requires_grad
    with torch.inference_mode():
        close(model(tokens, labels=labels).loss, expected)


def test_frozen_parameters() -> None:
    model = build("llama")
    tokens, labels = batch()
    for parameter in (model.lm_head.weight, model.model.norm.weight):
        parameter.requires_grad_(False)
    its_gradients = gradients(model, unfused(model, tokens, labels))
    use_linear_gated_ce(model)
    assert_same(gradients(model, model(tokens, labels=labels).loss), its_gradients)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = build("smollm2").train()
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    its_gradients = gradients(model, expected)
    use_linear_gated_ce(model)
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss = model(tokens, labels=labels, use_cache=False).loss
    close(loss, expected)
    assert_same(gradients(model, loss), its_gradients)
    assert len(calls) == 2


def test_gradient_accumulation() -> None:
    """Gradients of micro-batches, each divided by the tokens of all, are those of the batch."""
    model = build("llama")
    tokens, labels = batch(rows=4)
    its_gradients = gradients(model, unfused(model, tokens, labels))
    use_linear_gated_ce(model)
    num_items = (shifted(labels) != -100).sum()
    losses = [
        model(tokens[rows], labels=labels[rows], num_items_in_batch=num_items).loss
        for rows in (slice(0, 3), slice(3, 4))
    ]
    assert_same(gradients(model, losses[0] + losses[1]), its_gradients)


def test_autocast() -> None:
    """Operands of the output layer are rounded as without this; its logits need not be."""
    model = build("llama")
    tokens, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = unfused(model, tokens, labels)
    its_gradients = gradients(model, expected)
    use_linear_gated_ce(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=labels).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    for name, found in gradients(model, loss).items():
        assert found is not None and found.dtype == torch.float32
        error = torch.linalg.vector_norm(found - its_gradients[name])
        assert error <= 0.01 * torch.linalg.vector_norm(its_gradients[name]), name


def test_bfloat16() -> None:
    model = build("llama").bfloat16()
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    use_linear_gated_ce(model)
    loss = model(tokens, labels=labels).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def test_mixed_dtypes_are_for_autocast() -> None:
    model = build("llama")
    model.lm_head.bfloat16()
    use_linear_gated_ce(model)
    tokens, labels = batch()
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16 and hidden torch.float32"):
        model(tokens, labels=labels)


@pytest.mark.parametrize("when", ["patched first", "run first"])
def test_compiled(when: str) -> None:
    torch._dynamo.reset()
    model = build("llama", num_hidden_layers=1)
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    its_gradients = gradients(model, expected)
    if when == "patched first":
        gated = use_linear_gated_ce(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert compiled(tokens, labels=labels, use_cache=False).logits is not None
        gated = use_linear_gated_ce(compiled)
    outputs = compiled(tokens, labels=labels, use_cache=False)
    close(outputs.loss, expected)
    assert outputs.logits is None
    assert gated.stats is not None and gated.stats.nll.shape == (2, 9)
    assert_same(gradients(model, outputs.loss), its_gradients)
    assert compiled(tokens, use_cache=False).logits.shape == (2, 9, V)
    gated.remove()
    assert compiled(tokens, labels=labels, use_cache=False).logits is not None


# All else stays as it is


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
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
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


# Calls within calls, threads, errors


def test_a_call_within_a_call() -> None:
    """A model may be asked for logits while it computes a loss."""
    model = build("llama")
    tokens, labels = batch()
    expected, logits = unfused(model, tokens, labels), model(tokens).logits
    use_linear_gated_ce(model)
    other = build("smollm2")
    of_other = unfused(other, tokens, labels, k=5)
    use_linear_gated_ce(other, k=5)
    within: list[Any] = []

    def hook(*_: Any) -> None:
        if not within:
            within.append(None)
            within.extend([model(tokens), other(tokens, labels=labels), other(tokens)])
            hidden = other.model(tokens).last_hidden_state
            within.append(other.loss_function(other.lm_head(hidden), labels, V))

    model.model.register_forward_hook(hook)
    close(model(tokens, labels=labels).loss, expected)
    _, own, losses, of_another, of_its_parts = within
    close(of_its_parts, of_other)
    assert torch.equal(own.logits, logits)
    close(losses.loss, of_other)
    assert of_another.logits.shape == (2, 9, V)


def test_threads() -> None:
    """A forward without labels begins and does not end while one with labels goes on."""
    model = build("llama")
    tokens, labels = batch()
    expected, logits = unfused(model, tokens, labels), model(tokens).logits
    use_linear_gated_ce(model)
    first = threading.current_thread()
    has_begun, may_end = threading.Event(), threading.Event()
    results: list[Any] = []
    other = threading.Thread(target=lambda: results.append(model(tokens)))

    def hook(*_: Any) -> None:
        if threading.current_thread() is first:
            other.start()
            assert has_begun.wait(timeout=60)
        else:
            has_begun.set()
            assert may_end.wait(timeout=60)

    model.model.register_forward_hook(hook)
    close(model(tokens, labels=labels).loss, expected)
    may_end.set()
    other.join(timeout=60)
    assert torch.equal(results[0].logits, logits)


def test_after_errors() -> None:
    model = build("llama")
    tokens, labels = batch()
    expected, logits = unfused(model, tokens, labels), model(tokens).logits
    use_linear_gated_ce(model)
    outside = labels.clone()
    outside[1, 4] = V
    with pytest.raises(ValueError, match=rf"the label at position \[1, 3\] is {V}, outside"):
        model(tokens, labels=outside)
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens, labels=labels)
    hook.remove()
    assert torch.equal(model.lm_head(model.model(tokens).last_hidden_state), logits)
    close(model(tokens, labels=labels).loss, expected)
