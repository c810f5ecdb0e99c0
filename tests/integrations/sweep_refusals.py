"""What a model does with its logits, and whether a refusal of use_linear_gated_ce says so."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

# What leaves logits as they are, or asks for their shape alone.
_NO_USE = ("size", "dim", "numel", "float", "contiguous", "to", "__get__")


class _Watch(TorchFunctionMode):
    """Notes what takes the logits of an output layer outside of the loss function."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []
        self.uses: list[str] = []
        self.is_in_loss = False

    def is_logits(self, value: Any) -> bool:
        return any(value is one for one in self.logits)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        arguments = _pytree.tree_leaves((args, kwargs))
        if self.is_in_loss or not any(self.is_logits(argument) for argument in arguments):
            return result
        name = getattr(function, "__name__", str(function))
        if name not in _NO_USE:
            self.uses.append(name.strip("_"))
        elif name in ("float", "contiguous", "to"):
            self.logits.append(result)
        return result


@dataclass
class Trace:
    """A forward with labels of a model that is as transformers has it."""

    model: Any
    labels: Tensor
    head_outputs: list[Tensor] = field(default_factory=list)
    uses: list[str] = field(default_factory=list)
    losses: list[tuple[bool, bool]] = field(default_factory=list)
    """For each call of the loss function: whether it was given these logits, and these labels."""

    outputs: Any = None
    error: Exception | None = None


_OF_CAUSAL_LMS = ("loss_function", "get_output_embeddings")


def causal_of(model: Any) -> Any:
    """The module whose loss and output layer are looked at."""
    return next(_with_loss_and_head(model), model)


def _with_loss_and_head(model: Any) -> Iterator[Any]:
    for module in model.modules():
        if not all(hasattr(type(module), name) for name in _OF_CAUSAL_LMS):
            continue
        # The logits of some are those of a model within, of which they compute a loss themselves.
        names = inspect.unwrap(type(module).forward).__code__.co_names
        asks = "loss_function" in names and "language_model" in names
        if asks or module.get_output_embeddings() is not None:
            yield module


def forward(model: Any, given: dict[str, Tensor], **others: Any) -> Any:
    """With the random numbers of every other call."""
    torch.manual_seed(0)
    return model(**given, **others)


def trace(model: Any, given: dict[str, Tensor], labels: Tensor) -> Trace:
    """Run a model's own forward, and note what its logits come to."""
    found = Trace(model, labels)
    causal = causal_of(model)
    watch = _Watch()
    own = getattr(causal, "loss_function", None)

    def loss_function(*args: Any, **kwargs: Any) -> Any:
        logits = kwargs["logits"] if "logits" in kwargs else args[0]
        of_call = kwargs["labels"] if "labels" in kwargs else (*args, None)[1]
        found.losses.append((watch.is_logits(logits), of_call is labels))
        watch.is_in_loss = True
        try:
            return own(*args, **kwargs)
        finally:
            watch.is_in_loss = False

    def hook(module: Any, args: Any, output: Any) -> None:
        watch.logits.append(output)
        found.head_outputs.append(output)

    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    handle = None if head is None else head.register_forward_hook(hook)
    if own is not None:
        causal.loss_function = loss_function
    try:
        with watch:
            found.outputs = forward(model, given, labels=labels)
    except Exception as error:
        found.error = error
    finally:
        if handle is not None:
            handle.remove()
        vars(causal).pop("_loss_function", None)
    found.uses = watch.uses
    return found


# Whether a refusal is true


def _has_encoder(found: Trace, name: str) -> bool:
    if found.error is None:  # then its loss tells
        logits, labels = found.outputs.logits.flatten(0, 1), found.labels.flatten()
        not_shifted = nn.functional.cross_entropy(logits.float(), labels)
        torch.testing.assert_close(found.outputs.loss, not_shifted, check_dtype=False)
    return bool(found.model.config.is_encoder_decoder)


def _has_other_loss(found: Trace, name: str, loss: str) -> bool:
    return causal_of(found.model).loss_function.__name__ == loss != "ForCausalLMLoss"


_SAME = {"truediv": {"div", "rtruediv", "true_divide"}, "mul": {"rmul", "multiply"}}


def _uses_logits(found: Trace, name: str, use: str) -> bool:
    if use == "a second call of its output layer":
        return len(found.head_outputs) > 1
    if use == "a second call of its loss function":
        return len(found.losses) > 1
    return not {use, *_SAME.get(use, ())}.isdisjoint(found.uses)


def _does_not_call_head(found: Trace, name: str) -> bool:
    return not found.head_outputs or not any(of_head for of_head, _ in found.losses)


def _does_not_call_loss(found: Trace, name: str) -> bool:
    return not found.losses


def _changes_labels(found: Trace, name: str) -> bool:
    return any(not same for _, same in found.losses)


def _has_other_positions(found: Trace, name: str, of_labels: str, of_head: str) -> bool:
    shape = found.head_outputs[0].shape[:-1]
    return (str(tuple(found.labels.shape)), str(tuple(shape))) == (of_labels, of_head)


def _has_other_head(found: Trace, name: str, of_class: str) -> bool:
    head = causal_of(found.model).get_output_embeddings()
    return type(head) is not nn.Linear and of_class.endswith(type(head).__qualname__)


def _has_no_head(found: Trace, name: str) -> bool:
    return not any(_with_loss_and_head(found.model))


def _has_several_heads(found: Trace, name: str, names: str) -> bool:
    modules = list(_with_loss_and_head(found.model))
    of_names = [module for module in modules if type(module).__name__ in names.split(", ")]
    return len({module.get_output_embeddings() for module in of_names}) > 1


def _takes_no_labels(found: Trace, name: str) -> bool:
    return "labels" not in inspect.signature(type(causal_of(found.model)).forward).parameters


NAME = r"(\w+)"
# What a sentence says, and whether it is so, to be seen before the first forward or in it.
AT_ONCE: dict[str, Callable[..., bool]] = {
    rf"{NAME} has an encoder; labels of its decoder are not shifted": _has_encoder,
    rf"the loss of {NAME} is {NAME} and not that of causal language models": _has_other_loss,
    rf"the output layer of {NAME} must be an nn\.Linear, got (\S+)": _has_other_head,
    rf"nothing in {NAME} has get_output_embeddings\(\) and loss_function": _has_no_head,
    rf"{NAME} has several models with an output layer: (.*); give one": _has_several_heads,
    rf"the forward of {NAME} takes no labels": _takes_no_labels,
}
IN_FORWARD: dict[str, Callable[..., bool]] = {
    rf"{NAME} changes its logits, or uses them, outside of its loss function \((.*?)\)": (
        _uses_logits
    ),
    rf"{NAME} does not call its output layer for its logits": _does_not_call_head,
    rf"{NAME} did not call its loss_function": _does_not_call_loss,
    rf"{NAME} changes the labels before its loss": _changes_labels,
    r"labels must be one for each position, got (\(.*?\)) where the output layer has (\(.*?\))": (
        lambda found, *shapes: _has_other_positions(found, "", *shapes)
    ),
}


def check_refusal(found: Trace, sentence: str) -> None:
    """Raise unless it is true, of what is known to be told from the others."""
    for pattern, is_true in (AT_ONCE | IN_FORWARD).items():
        match = re.match(pattern, sentence)
        if match is None:
            continue
        if pattern in IN_FORWARD and found.error is not None:
            raise found.error
        assert is_true(found, *match.groups()), f"{sentence}: not true, of {found.uses}"
        return
    raise AssertionError(f"a sentence without a check that it is true: {sentence}")
