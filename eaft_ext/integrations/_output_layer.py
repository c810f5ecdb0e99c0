"""A model's output layer, looked up at every call, and its forward while a loss is computed."""

from __future__ import annotations

import threading
import weakref
from functools import update_wrapper
from types import MethodType
from typing import Any, Protocol, cast

from torch import Tensor, nn

from eaft_ext.integrations._patches import forward_slot


class Call(Protocol):
    """A forward that computes its loss in its output layer."""

    def is_for(self, layer: nn.Module) -> bool:
        """Whether what this layer gives are the logits of the loss."""

    def absent_logits(self, layer: nn.Linear, input: Tensor) -> Any:
        """Compute the loss; give what stands in for the logits."""


class _Active(threading.local):
    """The innermost forward with labels of this thread; None within one without labels."""

    # In every thread's own dict, where Dynamo looks, which finds no attributes of the class there.
    def __init__(self) -> None:
        self.call: Call | None = None


active = _Active()


def _forward(self: nn.Linear, *args: Any, **kwargs: Any) -> Any:
    """The forward of an output layer, whichever models and losses it is shared by.

    The loss is computed here, and not in the model's forward, for the hooks of the layer's own
    call: FSDP2 gathers the weight before it, and for the backward when the gradient of its output
    arrives.
    """
    call = active.call
    if call is None or not call.is_for(self):
        return type(self).forward(self, *args, **kwargs)
    return call.absent_logits(self, *args, **kwargs)


# With its name, by which pickle takes a method, a pickled layer comes back with that of its class.
_forward = update_wrapper(_forward, nn.Linear.forward)

# Who needs the forward above: a layer may be shared by models, each with a loss of its own.
_users: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def of_model(model: nn.Module) -> nn.Module | None:
    """The output layer of a model, or of the one within it that has one."""
    layer: nn.Module | None = cast("Any", model).get_output_embeddings()
    if layer is not None:
        return layer
    within = (m for m in model.modules() if hasattr(type(m), "get_output_embeddings"))
    layers = (cast("Any", module).get_output_embeddings() for module in within)
    return next((layer for layer in layers if layer is not None), None)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The output layer; several, where PEFT trains copies of it and one is called at a time."""
    layer = of_model(model)
    assert layer is not None, "a model without one is none to be patched"
    if type(layer).__name__ == "FullyShardedDataParallel":
        layer = cast("nn.Module", layer.module)
    if type(layer).__name__ == "ModulesToSaveWrapper":
        copies = cast("nn.ModuleDict", layer.modules_to_save)
        return [cast("nn.Module", layer.original_module), *copies.values()]
    return [layer]


def check(op: str, layer: nn.Module, name: str) -> None:
    """Raise unless its logits are ``hidden @ weight.T + bias``; ``name`` is the model's."""
    which = f"{op}: the output layer of {name}"
    of_class = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if hasattr(layer, "base_layer"):
        raise TypeError(
            f"{which} has an adapter, {of_class}; give eaft_ext.linear_gated_ce the effective "
            "weight, or leave the layer without one"
        )
    # Subclasses are welcome that only add to it, as FSDP2's are.
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(f"{which} must be an nn.Linear, got {of_class}")
    if not _has_plain_weight(layer):
        weight = layer.weight
        raise TypeError(
            f"{which} must have a weight of floating-point numbers, got {type(weight).__name__} "
            f"of {weight.dtype}"
        )
    replaced = vars(layer).get(forward_slot(layer))
    function = getattr(replaced, "__func__", replaced)
    if function not in (None, _forward, nn.Linear.forward) or hasattr(layer, "_hf_tp_plan"):
        raise TypeError(
            f"{which} has another forward than its class, as tensor parallelism gives it; give "
            "eaft_ext.gated_ce the logits"
        )


def _has_plain_weight(layer: nn.Linear) -> bool:
    weight = layer.weight
    # Quantised weights are of classes of their own, and some of those say that they are bfloat16.
    is_plain = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "device_mesh")
    return is_plain and weight.is_floating_point()


def _has_forward(layer: nn.Module, slot: str) -> bool:
    return getattr(vars(layer).get(slot), "__func__", None) is _forward


def is_ready(layer: nn.Module) -> bool:
    """Whether it was checked, and has not changed since."""
    is_patched = _has_forward(layer, forward_slot(layer))
    return is_patched and _has_plain_weight(cast("nn.Linear", layer))


def install(layer: nn.Module, user: Any) -> None:
    """Put the forward of this module in place, for ``user``."""
    _users.setdefault(layer, weakref.WeakSet()).add(user)
    slot = forward_slot(layer)
    if not _has_forward(layer, slot):
        setattr(layer, slot, MethodType(_forward, layer))


def uninstall(user: Any) -> None:
    """Leave all layers as they were found that nobody but ``user`` needs."""
    for layer, users in list(_users.items()):
        users.discard(user)
        if users:
            continue
        del _users[layer]
        for slot in ("forward", "_old_forward"):  # accelerate may have moved it
            if not _has_forward(layer, slot):
                continue
            delattr(layer, slot)
            if slot == "_old_forward":  # accelerate's forward calls it
                setattr(layer, slot, MethodType(type(layer).forward, layer))
