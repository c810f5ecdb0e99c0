"""Models of transformers that return the gated loss, and no logits."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

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
    close,
    gradients,
    shifted,
    unfused,
)

from eaft_ext.integrations.transformers import use_linear_gated_ce


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
    given = {"chunk_size": 3, "accumulate_in_float32": True, "drop_below": 0.5}
    gated = use_linear_gated_ce(model, **given)
    model(tokens, labels=labels)
    assert {name: seen[name] for name in given} == given
    assert gated.stats is not None and gated.stats.dropped.any()


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
        assert found is None or not found.requires_grad
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
