"""Megatron-Core's output layer and loss in one: where the logits would be is what makes them.

A GPT model calls its output layer and gives what comes of it, with the labels, to
``compute_language_model_loss``, for the next token and for those of multi-token prediction alike.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "use_linear_gated_ce"


class NoLogits(NamedTuple):
    """Hidden [s, b, H], which may be a part of a sequence, and the shard of the weight."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def __getattr__(self, name: str) -> NoReturn:
        raise TypeError(f"{OP}: the model uses its logits ({name}) before its loss")


class OutputLayer:
    """Stands in for a model's output layer while the model is called with labels."""

    def __init__(self, model: Any) -> None:
        layer = model.output_layer
        self._model, self._layer = model, layer
        self._has_labels = False
        self._arguments = list(inspect.signature(model.forward).parameters)
        self._replaced = [vars(module).get("forward") for module in self._modules()]
        self._forward_of_model, self._forward_of_layer = (m.forward for m in self._modules())
        self._own = (self._call_model, self._call_layer)
        for module, forward in zip(self._modules(), self._own, strict=True):
            module.forward = forward
        # It would mark main_grad as complete, and what this loss adds to it would be passed over.
        self._fusion = layer.gradient_accumulation_fusion
        layer.gradient_accumulation_fusion = False

    def uninstall(self) -> None:
        """Leave both modules as they were found, where these methods are still in place."""
        for module, own, replaced in zip(self._modules(), self._own, self._replaced, strict=True):
            if vars(module).get("forward") is not own:
                continue
            del module.forward
            if replaced is not None:
                module.forward = replaced
            if module is self._layer:
                module.gradient_accumulation_fusion = self._fusion

    def _modules(self) -> tuple[Any, Any]:
        return self._model, self._layer

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        before, self._has_labels = self._has_labels, given.get("labels") is not None
        try:
            return self._forward_of_model(*args, **kwargs)
        finally:
            self._has_labels = before

    def _call_layer(
        self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not self._has_labels:
            return self._forward_of_layer(input_, weight, *args, **kwargs)
        weight = self._layer.weight if weight is None else weight
        return NoLogits(input_, weight, self._layer.bias), None


def check_output_layer(model: nn.Module) -> None:
    """Raise unless the product is the plain one of a shard of the vocabulary, or none."""
    layer: Any = getattr(model, "output_layer", None)
    if layer is None:  # A pipeline stage that computes no loss.
        return
    from megatron.core.tensor_parallel import ColumnParallelLinear

    name = f"{OP}: the output layer of {type(model).__name__}"
    if not isinstance(layer, ColumnParallelLinear):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise TypeError(f"{name} must be a ColumnParallelLinear of Megatron-Core, got {kind}")
    if layer.config.defer_embedding_wgrad_compute:
        raise ValueError(
            f"{name} has defer_embedding_wgrad_compute, which needs the logits' gradient; turn it "
            "off, or take use_gated_ce"
        )
    if layer.skip_bias_add and layer.bias is not None:
        raise ValueError(f"{name} leaves its bias to others (skip_bias_add); take use_gated_ce")


def whole_sequence(layer: Any, hidden: Tensor, group: ProcessGroup) -> tuple[Tensor, bool]:
    """Hidden of all tokens, and whether the loss has to add up its gradient over the group.

    Of a sequence in parts, the gather's own backward adds up, and scatters.
    """
    if not layer.sequence_parallel:
        return hidden, True
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    gathered: Tensor = gather_from_sequence_parallel_region(
        hidden, tensor_parallel_output_grad=True, group=group
    )
    return gathered, False
