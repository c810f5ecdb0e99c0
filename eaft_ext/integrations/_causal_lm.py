"""Which module of a model is the causal language model, and whether its loss can be replaced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from eaft_ext.integrations import _output_layer
from eaft_ext.integrations._absent_logits import LogitMap

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
"""What configurations call a soft cap of the logits."""


def causal_lm(op: str, model: nn.Module) -> nn.Module:
    """The one module of a model that has an output layer and a loss, as transformers has them."""
    found = list(_with_loss_and_head(model))
    name = type(model).__name__
    if not found:
        raise TypeError(
            f"{op}: nothing in {name} has get_output_embeddings() and loss_function, as the "
            "causal language models of transformers have"
        )
    # Models of several modalities give the head of the language model within as theirs.
    if len({head for _, head in found}) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        raise TypeError(f"{op}: {name} has several models with an output layer: {names}; give one")
    causal = found[0][0]
    _check_loss(op, causal)
    return causal


def _with_loss_and_head(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in model.modules():
        # Of its own: some wrappers pass on the attributes of what they wrap.
        of_class = type(module)
        if not (hasattr(of_class, "loss_function") and hasattr(of_class, "get_output_embeddings")):
            continue
        head = _output_layer.of_model(module)
        # One that has the head in a model within may leave the loss to that.
        is_own = cast("Any", module).get_output_embeddings() is not None
        if head is not None and (is_own or _uses(module, "loss_function")):
            yield module, head


def _uses(module: nn.Module, name: str) -> bool:
    """Whether the forward of its class uses an attribute of that name, as far as can be seen."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is None or name in code.co_names


def _check_loss(op: str, causal: nn.Module) -> None:
    name = type(causal).__name__
    config: Any = getattr(causal, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{op}: {name} has an encoder; labels of its decoder are not shifted")
    loss = cast("Any", causal).loss_function
    of_transformers = getattr(loss, "__module__", "").partition(".")[0] == "transformers"
    if of_transformers and loss.__name__ != "ForCausalLMLoss":
        raise TypeError(
            f"{op}: the loss of {name} is {loss.__name__} and not that of causal language models"
        )
    if "labels" not in inspect.signature(causal.forward).parameters:
        raise TypeError(f"{op}: the forward of {name} takes no labels")


def expected_map(causal: nn.Module) -> LogitMap:
    """What the model will make of its logits, by the options of its configuration that it heeds.

    It may do something else all the same, which shows when it does: ``logits_scaling`` divides the
    logits in Granite, and what the output layer is given in MiniCPM3.
    """
    config: Any = getattr(causal, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()

    def heeded(option: str) -> float | None:
        value = getattr(config, option, None)
        if not isinstance(value, (int, float)) or value <= 0 or not _uses(causal, option):
            return None
        return float(value)

    softcap = next((value for option in SOFTCAPS if (value := heeded(option))), None)
    scale = heeded("logit_scale") or 1 / (heeded("logits_scaling") or 1.0)
    return LogitMap(softcap, scale)
