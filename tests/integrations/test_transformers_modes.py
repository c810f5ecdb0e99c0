"""Models of transformers without logits, in all modes; calls within calls, threads, errors."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

MISSING = "needs transformers: pip install '.[test]'"
pytest.importorskip("transformers", reason=MISSING)

from transformers_models import V, assert_same, batch, build, close, gradients, shifted, unfused

from eaft_ext.integrations.transformers import use_linear_gated_ce


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


@pytest.mark.slow
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
