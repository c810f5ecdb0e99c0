"""Small random models of transformers, and their gated loss computed from their logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import eaft_ext
from eaft_ext import reference

V = 61
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = IDS | {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Larger than usual: logits of a size for which the gates of tokens differ.
    "initializer_range": 0.3,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# As they are named here: the type of the configuration, and what it has besides the sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2_without_cap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}),
    "phi": ("phi", {}),
    "mixtral": ("mixtral", EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
    # The output layer is within another module.
    "bert": ("bert", {"is_decoder": True}),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model of the table above, or of a type of configuration."""
    kind, options = MODELS.get(name, (name, {}))
    config = transformers.AutoConfig.for_model(kind, **SIZES | options | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which start as zeros
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(seed: int = 0, rows: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens (rows, length), and their labels, of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, V, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[:, :2] = -100
    labels[-1, -3] = -100
    return tokens, labels


def shifted(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """What is to be predicted at each position; at the last, nothing."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignore_index)], 1)


def unfused(model: Any, tokens: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The loss of a model that is as transformers has it, with all of its logits."""
    outputs = model(tokens)
    loss = eaft_ext.gated_ce(outputs.logits, shifted(labels), **options)
    aux_loss = outputs.get("aux_loss")
    return loss if aux_loss is None else loss + model.config.router_aux_loss_coef * aux_loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """Of all parameters that are trained."""
    model.zero_grad()
    loss.backward()
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    """Gradients, or weights, by their names."""
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-6}
    assert list(found) == list(expected)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, n=name: n + m)


def own_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of all modules."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}


class Llama(transformers.LlamaForCausalLM):
    """A forward written out, in which ``trick`` has the logits before the loss, or replaces it."""

    trick: Callable[[Any, Tensor, Tensor | None, dict[str, Any]], Any]

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> transformers.modeling_outputs.CausalLMOutputWithPast:
        hidden = self.model(input_ids).last_hidden_state
        logits, loss = type(self).trick(self, hidden, labels, kwargs)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def tricky(trick: Callable[[Any, Tensor, Tensor | None, dict[str, Any]], Any]) -> Llama:
    """A model with that forward."""
    torch.manual_seed(0)
    of_trick = type("Llama", (Llama,), {"trick": staticmethod(trick)})
    return of_trick(transformers.LlamaConfig(**SIZES)).eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def in_float64(model: Any, tokens: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The loss of a model without a patch, all of it computed in float64."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double().eval()(tokens).logits
    return reference.gated_ce(logits, shifted(labels), **options).float()
