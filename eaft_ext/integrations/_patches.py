"""Methods of single modules, replaced and given back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, cast

from torch import nn


class Patch:
    """Stands in for a method of an instance, as ``slot`` of the module's own attributes.

    What is put there is a function bound to the module, as a class would give it: deep copies bind
    it to the copied module, and ``torch.compile`` and accelerate look for the function.
    """

    def __init__(self, owner: Any, module: nn.Module, slot: str) -> None:
        # An instance has none as a rule; then the method of its class is what remains.
        self.replaced = vars(module).get(slot)
        is_bound = getattr(self.replaced, "__self__", None) is module
        self.unbound = cast("MethodType", self.replaced).__func__ if is_bound else None
        self.owner = owner

        def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.call(module, *args, **kwargs)

        self.function: Any = self.named(module, slot, function)
        self.function.patch = self
        setattr(module, slot, MethodType(self.function, module))

    def named(self, module: nn.Module, slot: str, function: Any) -> Any:
        """The function with the name and the signature of what it stands in for."""
        original = getattr(module, slot)
        update_wrapper(function, getattr(original, "__func__", original))
        signature = inspect.signature(original)
        self.names = list(signature.parameters)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        function.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
        return function

    def original(self, module: nn.Module) -> Callable[..., Any]:
        """The forward that would be called without this."""
        if self.replaced is None:
            return partial(type(module).forward, module)
        if self.unbound is not None:
            return partial(self.unbound, module)
        return cast("Callable[..., Any]", self.replaced)

    def uninstall(self, module: nn.Module, slot: str) -> None:
        """Leave the module, of which this is the ``slot``, as it was found."""
        delattr(module, slot)
        if self.replaced is not None:
            found = self.replaced if self.unbound is None else MethodType(self.unbound, module)
            setattr(module, slot, found)
        elif slot == "_old_forward":  # accelerate's forward, which came later, calls it
            setattr(module, slot, MethodType(type(module).forward, module))

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def forward_slot(module: nn.Module) -> str:
    """The attribute to replace: below the hooks of accelerate, which move a module's arguments."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


def patch_of(module: nn.Module, slot: str) -> Patch | None:
    """The patch that is called at that slot."""
    function = getattr(vars(module).get(slot), "__func__", None)
    patch = getattr(function, "patch", None)
    # functools.wraps copies attributes: one who has wrapped our function seems to have a patch.
    return patch if isinstance(patch, Patch) and patch.function is function else None


def restore(module: nn.Module, slots: tuple[str, ...], owner: Any = None) -> None:
    """Leave a module as it was found, or where a patch is of another owner, as it is."""
    for slot in slots:
        patch = patch_of(module, slot)
        if patch is not None and owner in (None, patch.owner):
            patch.uninstall(module, slot)
