"""A training step that never asked for the loss of a model raises, before it changes a weight.

Trainers may replace a model's forward, or take its logits and compute a loss of their own; training
then goes on as if nothing had been replaced. What they all do is ``optimizer.step()``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# Whose frames lie between the forward of a model and who has called the model.
_BETWEEN = frozenset(["eaft_ext", "torch", "peft", "accelerate", "contextlib", "functools"])


class TrainingSteps:
    """Watches the steps of optimizers that have parameters of a model."""

    def __init__(self, model: nn.Module, refuse: Callable[[], None]) -> None:
        """``refuse`` raises, for a step of the model in which its loss was not asked for."""
        self.latest: Any = None
        # Whoever is watched by all optimizers must not live as long as they do.
        self._model = weakref.ref(model)
        self._refuse = weakref.WeakMethod(refuse)
        self._seen: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
        _watches.add(self)
        _hook_all_optimizers()

    def asked(self) -> None:
        """Say that the loss was asked for."""
        # A new object tells each call from the one before; under torch.compile, too, where a number
        # that grows would be compiled anew.
        if torch.is_grad_enabled():
            self.latest = []

    def stop(self) -> None:
        """Watch no more."""
        _watches.discard(self)

    def look_at(self, optimizer: Optimizer) -> None:
        """Raise if this step trains the model on another loss."""
        if self.latest is not None and self._seen.get(optimizer) is not self.latest:
            self._seen[optimizer] = self.latest
            return
        model, refuse = self._model(), self._refuse()
        if model is not None and refuse is not None and _trains(optimizer, model):
            refuse()


_watches: weakref.WeakSet[TrainingSteps] = weakref.WeakSet()


@cache
def _hook_all_optimizers() -> None:
    """Once, and for good: a hook that goes while a step calls its hooks would break the step."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # A compiled step is one graph, with no place to look in.
    if not (torch.compiler.is_compiling() or _has_closure(args, kwargs)):
        for watch in list(_watches):
            watch.look_at(optimizer)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # The forward is in the closure.
    if not torch.compiler.is_compiling() and _has_closure(args, kwargs):
        for watch in list(_watches):
            watch.look_at(optimizer)


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    _, *others = args  # the optimizer
    return any(callable(argument) for argument in (*others, *kwargs.values()))


def _trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether the step is one of the model: whether what only it can have has a gradient."""
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    shared: set[int] = set()  # with other models, maybe, which are then those that are trained
    for of_words in ("get_output_embeddings", "get_input_embeddings"):
        layer = getattr(model, of_words)()
        shared |= set() if layer is None else {id(p) for p in layer.parameters()}
    own = [p for p in trained if id(p) not in shared] or trained
    return any(p.grad is not None and id(p) in in_optimizer for p in own)


def calling_function() -> str:
    """Who has called the model whose forward calls this."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in _BETWEEN:
            return f"{module}.{getattr(frame.f_code, 'co_qualname', frame.f_code.co_name)}"
    return "what called it"


def defined_as(function: Any) -> str:
    """Where a function comes from, whatever functools.wraps has made it look like."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    module = function.__globals__.get("__name__", "")
    return f"{module}.{getattr(code, 'co_qualname', code.co_name)}"
