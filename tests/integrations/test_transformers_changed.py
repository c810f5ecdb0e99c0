"""Models of transformers that change after their loss was replaced, or share what they have."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

MISSING = "needs transformers: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)

from transformers_models import (
    SIZES,
    V,
    assert_same,
    batch,
    build,
    close,
    gradients,
    in_float64,
    own_attributes,
    unfused,
)

from eaft_ext.integrations.transformers import use_linear_gated_ce

PREFIX = "use_linear_gated_ce: "


def assert_followed(model: Any, gated: Any) -> None:
    """The loss and the gradients of the model as it is now, and nothing left behind after that."""
    tokens, labels = batch()
    outputs = model(input_ids=tokens, labels=labels)
    assert outputs.logits is None
    found = gradients(model, outputs.loss)
    gated.remove()
    close(outputs.loss, in_float64(model, tokens, labels))
    assert_same(found, gradients(model, unfused(model, tokens, labels)))
    assert not any("forward" in own for own in own_attributes(model).values())


def test_resized_embeddings() -> None:
    model = build("llama")
    head = model.lm_head
    gated = use_linear_gated_ce(model)
    model.resize_token_embeddings(V + 9)
    assert model.lm_head is not head
    assert_followed(model, gated)
    assert "forward" not in vars(head)


@pytest.mark.parametrize("bias", [False, True])
def test_a_replaced_output_layer(bias: bool) -> None:
    model = build("llama")
    gated = use_linear_gated_ce(model)
    model.lm_head = nn.Linear(16, V, bias=bias)
    assert_followed(model, gated)


def test_weights_tied_afterwards() -> None:
    model = build("llama")
    gated = use_linear_gated_ce(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert_followed(model, gated)


def peft_model(model: Any, name: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return adapted.eval()


FOLLOWED: dict[str, dict[str, Any]] = {
    "on the attention": {"target_modules": ["q_proj"]},
    "a trained copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens of the embedding": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_adapters(name: str) -> None:
    """peft #2863: patched before get_peft_model, as after it."""
    model = build("llama")
    gated = use_linear_gated_ce(model)
    adapted = peft_model(model, "LoraConfig", r=2, **FOLLOWED[name])
    tokens, labels = batch()
    outputs = adapted(input_ids=tokens, labels=labels)
    assert outputs.logits is None
    found = gradients(adapted, outputs.loss)
    gated.remove()
    close(outputs.loss, in_float64(adapted, tokens, labels))
    assert_same(found, gradients(adapted, unfused(adapted, tokens, labels)))


def test_merged_adapters() -> None:
    model = build("llama")
    adapted = peft_model(
        model, "LoraConfig", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    gated = use_linear_gated_ce(adapted)
    assert_followed(adapted.merge_and_unload(), gated)


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 2, "target_modules": ["q_proj", "lm_head"]}),
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True, "target_modules": ["lm_head"]}),
    "IA3": ("IA3Config", {"target_modules": ["lm_head"], "feedforward_modules": []}),
    "VeRA": ("VeraConfig", {"target_modules": ["lm_head"]}),
    "LoHa": ("LoHaConfig", {"r": 2, "target_modules": ["lm_head"]}),
    "tokens of a tied embedding": (
        "LoraConfig",
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_the_output_layer(name: str) -> None:
    """TRL #4612, unsloth #9331, peft #2863: the same sentence in either order."""
    kind, options = ADAPTERS[name]
    of_model = "smollm2" if "tied" in name else "llama"
    tokens, labels = batch()
    patched = build(of_model)
    use_linear_gated_ce(patched)
    first = peft_model(patched, kind, **options)
    with pytest.raises(TypeError) as in_forward:
        first(input_ids=tokens, labels=labels)
    with pytest.raises(TypeError) as at_once:
        use_linear_gated_ce(peft_model(build(of_model), kind, **options))
    assert str(in_forward.value) == str(at_once.value)
    sentence = "the output layer of LlamaForCausalLM "
    sentence += "must be an nn.Linear, got peft." if "tied" in name else "has an adapter, peft."
    assert str(at_once.value).startswith(PREFIX + sentence)
    assert first(input_ids=tokens).logits.shape == (2, 9, V)


class Quantised(nn.Parameter):
    pass


def test_a_weight_that_is_quantised_afterwards() -> None:
    """torchao's quantize_ gives the layer a weight of another class."""
    model = build("llama")
    use_linear_gated_ce(model)
    model.lm_head.weight = Quantised(model.lm_head.weight.data)
    tokens, labels = batch()
    with pytest.raises(TypeError, match=r"must have a weight of floating-point .* got Quantised"):
        model(tokens, labels=labels)


def test_a_loss_function_that_is_replaced_afterwards() -> None:
    def own(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return logits.sum()

    model = build("llama")
    use_linear_gated_ce(model)
    model.loss_function = own
    tokens, labels = batch()
    with pytest.raises(TypeError) as error:
        model(tokens, labels=labels)
    assert "; its loss function is " in str(error.value) and ".own; give" in str(error.value)


def test_a_forward_below_that_asks_for_no_loss() -> None:
    def own(self: Any, input_ids: Tensor, labels: Any = None, **_: Any) -> Any:
        return {"loss": self.model(input_ids).last_hidden_state.sum()}

    model = build("llama")
    model.forward = own.__get__(model)
    use_linear_gated_ce(model)
    tokens, labels = batch()
    with pytest.raises(TypeError, match=r"did not call its loss_function .* its forward is .*own$"):
        model(tokens, labels=labels)


def test_options_that_change_logits_set_afterwards() -> None:
    model = build("gemma2_without_cap")
    use_linear_gated_ce(model)
    model.config.final_logit_softcapping = 30.0
    tokens, labels = batch()
    close(model(tokens, labels=labels).loss, in_float64(model, tokens, labels))


def test_models_that_share_an_output_layer() -> None:
    """Each has its own loss, whichever came first and whichever is removed first."""
    tokens, labels = batch()
    for first_removed in (0, 1):
        models = [build("llama"), build("llama", seed=1)]
        models[1].lm_head = models[0].lm_head
        expected = [
            in_float64(model, tokens, labels, k=k) for model, k in zip(models, (20, 5), strict=True)
        ]
        handles = [use_linear_gated_ce(models[0]), use_linear_gated_ce(models[1], k=5)]
        for model, loss in zip(models, expected, strict=True):
            outputs = model(tokens, labels=labels)
            close(outputs.loss, loss)
            assert outputs.logits is None
        handles[first_removed].remove()
        assert models[first_removed](tokens, labels=labels).logits is not None
        other = 1 - first_removed
        outputs = models[other](tokens, labels=labels)
        close(outputs.loss, expected[other])
        assert outputs.logits is None
        handles[other].remove()
        assert "forward" not in vars(models[0].lm_head)


class Outer(transformers.PreTrainedModel):
    """Computes the loss of the logits that a model within it gives."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model = build("llama")
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.language_model(input_ids).logits
        loss = None if labels is None else self.loss_function(logits, labels, V, **kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_model_whose_logits_are_those_of_one_within() -> None:
    model = Outer(transformers.LlamaConfig(**SIZES)).eval()
    tokens, labels = batch()
    expected = in_float64(model, tokens, labels)
    its_gradients = gradients(model, unfused(model, tokens, labels))
    with use_linear_gated_ce(model):
        outputs = model(tokens, labels=labels)
        close(outputs.loss, expected)
        assert outputs.logits is None
        assert_same(gradients(model, outputs.loss), its_gradients)
        with torch.no_grad():
            outputs = model(tokens, labels=labels)
        close(outputs.loss, expected)
        close(outputs.logits, model(tokens).logits)
    assert model(tokens, labels=labels).logits is not None


def test_data_parallel_replicas() -> None:
    """They would compute with the original's weights."""
    model = build("llama")
    with use_linear_gated_ce(model):
        for module in (model, nn.ModuleList([model])[0]):
            with pytest.raises(TypeError) as error:
                module._replicate_for_data_parallel()
        sentence = "nn.DataParallel is not supported: its replicas of LlamaForCausalLM"
        assert str(error.value).startswith(PREFIX + sentence)
        # With one device there are no replicas.
        tokens, labels = batch()
        close(nn.DataParallel(model)(tokens, labels=labels).loss, in_float64_of_copy())
    assert type(model._replicate_for_data_parallel()) is type(model)


def in_float64_of_copy() -> Tensor:
    return in_float64(build("llama"), *batch())
