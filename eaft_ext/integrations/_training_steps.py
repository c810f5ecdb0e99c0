"""A training step that never asked for the loss of a model raises, before it changes a weight.

Trainers may replace a model's forward, or take its logits and compute a loss of their own; training
then goes on as if nothing had been replaced. What they all do is ``optimizer.step()``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

# Whose frames lie between the forward of a model and who has called the model.
_BETWEEN = frozenset(
    ["eaft_ext", "torch", "peft", "accelerate", "deepspeed", "contextlib", "functools"]
)
_ENGINE = "deepspeed.runtime.engine"


class TrainingSteps:
    """Watches the steps of optimizers that have parameters of a model."""

    def __init__(self, model: nn.Module, refuse: Callable[[], None]) -> None:
        """``refuse`` is a method that raises, for a step in which the loss was not asked for."""
        self.latest: Any = None
        self.caller_without_labels: str | None = None
        # Whoever is watched by all optimizers must not live as long as they do.
        self._model = weakref.ref(model)
        self._refuse = weakref.WeakMethod(refuse)
        # One of the model's parameters for each optimizer, and for that the last call it was
        # stepped for: a second optimizer of the same parameters is not new.
        self._parameters: weakref.WeakKeyDictionary[
            Optimizer, tuple[int, Callable[[], Tensor | None] | None]
        ] = weakref.WeakKeyDictionary()
        self._seen = WeakTensorKeyDictionary()
        _watches.add(self)
        _hook_all_optimizers()

    def asked(self) -> None:
        """Say that the loss was asked for."""
        # A new object tells each call from the one before; under torch.compile, too, where a number
        # that grows would be compiled anew.
        if torch.is_grad_enabled():
            self.latest = []
            self.caller_without_labels = None

    def stop(self) -> None:
        """Watch no more."""
        _watches.discard(self)

    def look_at(self, optimizer: Optimizer) -> None:
        """Raise if this step trains the model on another loss."""
        model, refuse = self._model(), self._refuse()
        if model is None or refuse is None:
            return
        parameter = self._parameter_of(optimizer, model)
        if parameter is None:
            return
        if self.latest is not None and self._seen.get(parameter) is not self.latest:
            self._seen[parameter] = self.latest
        elif _trains(optimizer, model):
            refuse()

    def _parameter_of(self, optimizer: Optimizer, model: nn.Module) -> Tensor | None:
        """The first that both have; looked for again where there are more or fewer of them."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known_count, known = self._parameters.get(optimizer, (-1, None))
        if count != known_count:
            found = next(_common(optimizer.param_groups, model), None)
            if found is not None:
                known = weakref.ref(found)
            else:
                is_copy = _is_in_step_of_deepspeed(model)
                known = partial(_first_of, weakref.ref(optimizer)) if is_copy else None
            self._parameters[optimizer] = (count, known)
        return None if known is None else known()


_watches: weakref.WeakSet[TrainingSteps] = weakref.WeakSet()
# A step may be within one of the same optimizer: torch hooks a class's, and that of its base.
_in_step: weakref.WeakSet[Optimizer] = weakref.WeakSet()


@cache
def _hook_all_optimizers() -> None:
    """Once, and for good: a hook that goes while a step calls its hooks would break the step."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # A compiled step is one graph, with no place to look in.
    if torch.compiler.is_compiling() or optimizer in _in_step:
        return
    _in_step.add(optimizer)
    if not _has_closure(args, kwargs):
        _look_at(optimizer)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or optimizer not in _in_step:
        return
    _in_step.discard(optimizer)
    if _has_closure(args, kwargs):  # the forward is in it
        _look_at(optimizer)


def _look_at(optimizer: Optimizer) -> None:
    try:
        for watch in list(_watches):
            watch.look_at(optimizer)
    except RuntimeError:
        _in_step.discard(optimizer)
        raise


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    _, *others = args  # the optimizer
    return any(callable(argument) for argument in (*others, *kwargs.values()))


def _common(groups: list[dict[str, Any]], model: nn.Module) -> Iterator[nn.Parameter]:
    """What an optimizer trains of the model, less what may be that of another model, too.

    Those that share an output layer or an embedding are then told apart, unless it is all.
    """
    in_optimizer = {id(p) for group in groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    shared: set[int] = set()
    for of_words in ("get_output_embeddings", "get_input_embeddings"):
        layer = getattr(model, of_words)()
        shared |= set() if layer is None else {id(p) for p in layer.parameters()}
    own = [p for p in trained if id(p) not in shared] or trained
    return (p for p in own if id(p) in in_optimizer)


def _is_in_step_of_deepspeed(model: nn.Module) -> bool:
    """Whether an engine of DeepSpeed that has the model is what makes this step.

    Its optimizers have vectors of copies of the parameters, which nothing leads back to a model.
    """
    frame = sys._getframe(1) if _ENGINE in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == _ENGINE:
            engine = frame.f_locals.get("self")
            if isinstance(engine, nn.Module) and any(part is model for part in engine.modules()):
                return True
        frame = frame.f_back
    return False


def _first_of(optimizer: weakref.ref[Optimizer]) -> Tensor | None:
    """What it trains now: ZeRO-3 makes a step for each of several vectors, one after another."""
    stepped = optimizer()
    groups = [] if stepped is None else stepped.param_groups
    return next((parameter for group in groups for parameter in group["params"]), None)


def _trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether the step changes the model, for an optimizer that has something of it.

    Checkpoints of optimizers are made and loaded with steps of zero gradients and a rate of zero.
    """
    groups = [group for group in optimizer.param_groups if group.get("lr", 1)]
    parameters: Iterator[Tensor] = _common(groups, model)
    if next(_common(optimizer.param_groups, model), None) is None:  # it has copies
        parameters = (parameter for group in groups for parameter in group["params"])
    gradients = (p.grad for p in parameters if p.grad is not None)
    local = (grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients)
    return any(bool(grad.any()) for grad in local)


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
    function = getattr(function, "func", function)  # of functools.partial
    function = getattr(function, "__func__", function)
    module = getattr(function, "__globals__", {}).get("__name__", "")
    if module.partition(".")[0] in _BETWEEN and hasattr(function, "__wrapped__"):
        return defined_as(function.__wrapped__)
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__qualname__}"
    return f"{module}.{getattr(code, 'co_qualname', code.co_name)}"
