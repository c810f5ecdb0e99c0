"""Models of transformers that use_linear_gated_ce refuses, at once or in their first forward."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eaft_ext

MISSING = "needs transformers: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)

from transformers_models import SIZES, V, batch, build, own_attributes, tricky, unfused

from eaft_ext.integrations.transformers import use_linear_gated_ce

PREFIX = "use_linear_gated_ce: "


def refused(model: Any, sentence: str, **options: Any) -> None:
    before = own_attributes(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(TypeError) as error:
        use_linear_gated_ce(model, **options)
    assert str(error.value).startswith(PREFIX + sentence)
    assert not before or own_attributes(model) == before


def test_options_that_a_model_does_not_heed() -> None:
    """Its configuration has one, and its forward leaves the logits as they are."""
    model = build("mpt", logit_scale=0.25, d_model=16, n_heads=2, n_layers=1, max_seq_len=64)
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    use_linear_gated_ce(model)
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)


def _negated(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden) * -1.0
    return logits, model.loss_function(logits, labels, V, **given)


def _scaled_by_a_tensor(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden) * torch.tensor(0.5)
    return logits, model.loss_function(logits, labels, V, **given)


def _capped_twice(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = torch.tanh(torch.tanh(model.lm_head(hidden)) * 5.0)
    return logits, model.loss_function(logits, labels, V, **given)


def _shifted_up(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = torch.tanh(model.lm_head(hidden)) + 1.0
    return logits, model.loss_function(logits, labels, V, **given)


def _scaled_in_place(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden).mul_(0.5)
    return logits, model.loss_function(logits, labels, V, **given)


def _sliced(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden)
    of_next = logits[:, :-1].flatten(0, 1)
    return logits, nn.functional.cross_entropy(of_next, labels[:, 1:].flatten())


def _other_labels(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden)
    return logits, model.loss_function(logits, labels.clone(), V, **given)


def _other_shifted_labels(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden)
    return logits, model.loss_function(logits, labels, V, shift_labels=labels, **given)


def _no_head(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = nn.functional.linear(hidden, model.lm_head.weight)
    return logits, model.loss_function(logits, labels, V, **given)


def _own_loss(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden)
    return logits, logits.square().mean()


def _no_loss_function(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    return model.lm_head(hidden), hidden.square().mean()


def _labels_written_to(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden)
    labels[:, :4] = -100
    return logits, model.loss_function(logits, labels, V, **given)


def _other_ignore_index(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden)
    return logits, model.loss_function(logits, labels, V, ignore_index=0, **given)


def _other_num_items(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden)
    return logits, model.loss_function(logits, labels, V, num_items_in_batch=5, **given)


def _two_losses(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits = model.lm_head(hidden)
    loss = model.loss_function(logits, labels, V, **given)
    return logits, loss + model.loss_function(model.lm_head(hidden), labels, V, **given)


def _two_heads(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
    logits, others = model.lm_head(hidden), model.lm_head(hidden.flip(1))
    return others, model.loss_function(logits, labels, V, **given)


@pytest.mark.parametrize(
    ("trick", "sentence"),
    [
        (_negated, "Llama changes its logits, or uses them, outside of its loss function (mul)"),
        (
            _scaled_by_a_tensor,
            "Llama changes its logits, or uses them, outside of its loss function (mul)",
        ),
        (
            _capped_twice,
            "Llama changes its logits, or uses them, outside of its loss function (tanh)",
        ),
        (_shifted_up, "Llama changes its logits, or uses them, outside of its loss function (add)"),
        (
            _scaled_in_place,
            "Llama changes its logits, or uses them, outside of its loss function (mul_)",
        ),
        (_sliced, "Llama changes its logits, or uses them, outside of its loss function (getitem)"),
        (_other_labels, "Llama changes the labels before its loss"),
        (_other_shifted_labels, "Llama changes the labels before its loss"),
        (_labels_written_to, "Llama changes the labels before its loss"),
        (
            _other_ignore_index,
            "Llama gives its loss function ignore_index=0, and its forward was ",
        ),
        (_other_num_items, "Llama gives its loss function num_items_in_batch=5, and its forward w"),
        (_no_head, "Llama does not call its output layer for its logits"),
        (
            _own_loss,
            "Llama changes its logits, or uses them, outside of its loss function (square)",
        ),
        (_two_losses, "Llama changes its logits, or uses them, outside of its loss function (a s"),
        (_two_heads, "Llama changes its logits, or uses them, outside of its loss function (a s"),
        (_no_loss_function, "Llama did not call its loss_function with the logits of its output"),
    ],
)
def test_models_of_another_structure(trick: Any, sentence: str) -> None:
    """What cannot be seen of them before, their first forward with labels tells."""
    model = tricky(trick)
    tokens, labels = batch()
    use_linear_gated_ce(model)
    with pytest.raises(TypeError) as error:
        model(tokens, labels=labels)
    assert str(error.value).startswith(PREFIX + sentence)


def test_a_model_written_in_the_same_way() -> None:
    """That the tricks above, and not what they are played on, are refused."""

    def none(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
        logits = model.lm_head(hidden)
        loss = None if labels is None else model.loss_function(logits, labels, V, **given)
        return logits, loss

    model = tricky(none)
    tokens, labels = batch()
    expected = unfused(model, tokens, labels)
    use_linear_gated_ce(model)
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected)


def test_modules_that_are_no_causal_language_models() -> None:
    refused(3, "model must be a module, got int")
    refused(nn.Linear(3, 4), "nothing in Linear has get_output_embeddings() and loss_function")
    llama = build("llama")
    refused(llama.model, "nothing in LlamaModel has get_output_embeddings() and loss_function")
    config = transformers.AutoConfig.for_model("llama", **SIZES)
    classifier = transformers.LlamaForSequenceClassification(config)
    refused(classifier, "nothing in LlamaForSequenceClassification has get_output_embeddings()")
    both = nn.ModuleList([llama, build("phi")])
    refused(both, "ModuleList has several models with an output layer: LlamaForCausalLM, PhiForCau")
    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=V)
    refused(
        transformers.T5ForConditionalGeneration(t5), "T5ForConditionalGeneration has an encoder"
    )
    bert = transformers.BertForMaskedLM(transformers.AutoConfig.for_model("bert", **SIZES))
    refused(bert, "the loss of BertForMaskedLM is ForMaskedLMLoss and not that of causal")


def test_an_output_layer_that_is_called_once_more() -> None:
    """After the loss it gives logits."""

    def again(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
        logits = model.lm_head(hidden)
        if labels is None:
            return logits, None
        loss = model.loss_function(logits, labels, V, **given)
        return model.lm_head(hidden[:, -1:]), loss

    model = tricky(again)
    tokens, labels = batch()
    expected, logits = unfused(model, tokens, labels), model(tokens).logits
    use_linear_gated_ce(model)
    outputs = model(tokens, labels=labels)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.logits, logits[:, -1:])


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OtherParameter(nn.Parameter):
    pass


def test_output_layers_that_are_no_plain_linear() -> None:
    which = "the output layer of LlamaForCausalLM"
    model = build("llama")
    model.lm_head = OtherLinear(16, V)
    refused(model, f"{which} must be an nn.Linear, got {__name__}.OtherLinear")
    model = build("llama")
    model.lm_head.weight = OtherParameter(model.lm_head.weight.data)
    refused(model, f"{which} must have a weight of floating-point numbers, got OtherParameter of")
    model = build("llama")
    whole = model.lm_head.weight.to(torch.int8)
    model.lm_head.weight = nn.Parameter(whole, requires_grad=False)
    refused(
        model, f"{which} must have a weight of floating-point numbers, got Parameter of torch.i"
    )
    model = build("llama")
    model.lm_head.forward = lambda hidden: hidden
    refused(model, f"{which} has another forward than its class")


def test_options_are_checked_at_once() -> None:
    model = build("llama")
    refused(model, "k must be an int, or None for all, got 2.0", k=2.0)
    refused(model, "alpha and normalizer are shorthand", alpha=2.0, gate=eaft_ext.NoGate())
    refused(model, "ignore_index must be an int, got None", ignore_index=None)
    refused(model, "chunk_size must be an int, got '4'", chunk_size="4")
    refused(model, "accumulate_in_float32 must be True, False", accumulate_in_float32="no")
    refused(model, "drop_below must be a number, got '0'", drop_below="0")
    for options in ({"k": 1}, {"chunk_size": 0}, {"drop_below": 0.1, "z_loss": 0.1}):
        with pytest.raises(ValueError, match=r"^use_linear_gated_ce: "):
            use_linear_gated_ce(model, **options)
