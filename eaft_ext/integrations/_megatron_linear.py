"""Megatron-Core's output layer and loss in one: where the logits would be is what makes them.

A GPT model calls its output layer and gives what comes of it, with the labels, to
``compute_language_model_loss``, for the next token and for those of multi-token prediction alike.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from eaft_ext.integrations._absent_logits import Absent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "use_linear_gated_ce"


class NoLogits(Absent):
    """What the output layer was called with, which its loss alone looks into.

    Hidden [s, b, H], under sequence parallelism this process's part of the sequence; the weight
    [V/tp, H], the layer's own or the embedding's.
    """

    def __init__(self, layer: Any, hidden: Tensor, weight: Tensor) -> None:
        self.layer, self.hidden, self.weight = layer, hidden, weight

    def refuse(self, name: str) -> NoReturn:
        """Raise: it is taken for logits."""
        raise TypeError(
            f"{OP}: the model uses its logits ({name}) before its loss; take use_gated_ce"
        )

    def __reduce__(self) -> NoReturn:
        self.refuse("pickle")

    def whole_sequence(self, group: ProcessGroup) -> tuple[Tensor, bool]:
        """Hidden of all tokens, and whether the loss has to add up its gradient over the group.

        Of a sequence in parts, the gather's own backward adds up, and scatters.
        """
        if not self.layer.sequence_parallel:
            return self.hidden, not self.layer.disable_grad_reduce
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        gathered: Tensor = gather_from_sequence_parallel_region(
            self.hidden, tensor_parallel_output_grad=True, group=group
        )
        return gathered, False


class OutputLayer:
    """Stands in for a model's output layer while the model is called with labels."""

    def __init__(self, model: Any) -> None:
        layer = model.output_layer
        self._model, self._layer = model, layer
        self.has_labels: bool | None = None
        """Of the call of the model that is going on."""
        self._was_called = False
        self._arguments = _arguments(model)
        self._replaced = [vars(module).get("forward") for module in self._modules()]
        self._forward_of_model, self._forward_of_layer = (m.forward for m in self._modules())
        self._own = (self._call_model, self._call_layer)
        for module, forward in zip(self._modules(), self._own, strict=True):
            module.forward = forward
        # It would mark main_grad as complete, and what this loss adds to it would be passed over.
        self._fusion = layer.gradient_accumulation_fusion
        layer.gradient_accumulation_fusion = False
        self._is_installed = True

    def uninstall(self) -> None:
        """Leave both modules as they were found, where these methods are still in place.

        Where somebody has wrapped them, they do nothing from now on.
        """
        if not self._is_installed:
            return
        self._is_installed = False
        self._layer.gradient_accumulation_fusion = self._fusion
        for module, own, replaced in zip(self._modules(), self._own, self._replaced, strict=True):
            if vars(module).get("forward") is not own:
                continue
            del module.forward
            if replaced is not None:
                module.forward = replaced

    def _modules(self) -> tuple[Any, Any]:
        return self._model, self._layer

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_installed:
            return self._forward_of_model(*args, **kwargs)
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        before, self.has_labels = self.has_labels, given.get("labels") is not None
        self._was_called = False
        try:
            output = self._forward_of_model(*args, **kwargs)
            if self.has_labels and not self._was_called:
                raise TypeError(
                    f"{OP}: {type(self._model).__name__} was called with labels, and did not call "
                    "its output layer: what it returned is another loss"
                )
            return output
        finally:
            self.has_labels = before

    def _call_layer(
        self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.has_labels:
            return self._forward_of_layer(input_, weight, *args, **kwargs)
        _check_layer(self._model, self._layer)  # It may have changed.
        self._was_called = True
        return NoLogits(self._layer, input_, self._layer.weight if weight is None else weight), None


def check_model(model: nn.Module) -> None:
    """Raise unless output layer and loss of a model can be one, or it has neither."""
    layer: Any = getattr(model, "output_layer", None)
    if layer is None:  # A pipeline stage that computes no loss.
        return
    if "labels" not in _arguments(model):
        raise TypeError(
            f"{OP}: the forward of {type(model).__name__} has no argument of the name labels; take "
            "use_gated_ce"
        )
    _check_layer(model, layer)
    replaced = vars(layer).get("forward")
    if replaced is not None and not isinstance(getattr(replaced, "__self__", None), OutputLayer):
        raise TypeError(
            f"{_name(model)} has another forward than its class, so that its logits may be others; "
            "take use_gated_ce"
        )


def _check_layer(model: nn.Module, layer: Any) -> None:
    """Raise unless the logits are ``hidden @ weight.T + bias``, of a weight that stays."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from torch.distributed.fsdp import FSDPModule

    name, kind = _name(model), f"{type(layer).__module__}.{type(layer).__qualname__}"
    if not isinstance(layer, ColumnParallelLinear):
        raise TypeError(f"{name} must be a ColumnParallelLinear of Megatron-Core, got {kind}")
    if isinstance(layer, FSDPModule):
        raise TypeError(
            f"{name} is sharded by FSDP2, which takes the weight away before the loss; take "
            "use_gated_ce"
        )
    for method in ("forward", "_forward_impl"):  # A class may cap its logits, or quantise.
        if getattr(type(layer), method, None) is not getattr(ColumnParallelLinear, method, None):
            raise TypeError(
                f"{name} has another {method} than ColumnParallelLinear, so that its logits may be "
                f"others, got {kind}; take use_gated_ce"
            )
    if layer.config.defer_embedding_wgrad_compute:
        raise ValueError(
            f"{name} has defer_embedding_wgrad_compute, which needs the logits' gradient; turn it "
            "off, or take use_gated_ce"
        )
    if layer.skip_bias_add and layer.bias is not None:
        raise ValueError(f"{name} leaves its bias to others (skip_bias_add); take use_gated_ce")


def _name(model: nn.Module) -> str:
    return f"{OP}: the output layer of {type(model).__name__}"


def _arguments(model: nn.Module) -> list[str]:
    """Of its forward, also where somebody has replaced it."""
    return list(inspect.signature(type(model).forward).parameters)[1:]
