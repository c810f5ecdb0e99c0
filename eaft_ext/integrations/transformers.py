"""Hugging Face transformers: the gated loss of causal language models, without their logits.

gated = use_linear_gated_ce(model)
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

import eaft_ext
from eaft_ext._checks import check_chunks, check_labels, check_options
from eaft_ext.gates import Gate, GateFunction
from eaft_ext.reference import TokenStats

__all__ = ["LinearGatedLoss", "use_linear_gated_ce"]

_OP = "use_linear_gated_ce"
_LOSS = "_loss_function"  # where the setter of transformers' loss_function puts one
LOGIT_OPTIONS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale")
"""What a configuration calls changes of the logits, and nothing else.

Others show in a forward: logits_scaling is for the logits in Granite, and for what the output layer
is given in MiniCPM3.
"""


def use_linear_gated_ce(
    model: nn.Module,
    k: int = 20,
    *,
    alpha: float = 1.0,
    normalizer: float | None = None,
    gate: Gate | GateFunction | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    accumulate_in_float32: bool | None = None,
) -> LinearGatedLoss:
    r"""Make a causal language model of transformers return the gated loss, and no logits.

    ``model(input_ids, labels=labels)`` then computes its output layer and its loss with
    :func:`eaft_ext.linear_gated_ce`; ``logits`` of what it returns is None, or is missing in a
    tuple. Calls without labels, generation among them, are as before::

        h_t  = what the output layer is given at position t
        loss = sum_t g_t * -ln softmax(W h_t + b)_{y_(t+1)}  /  number of tokens not ignored

    The arguments of the forward that transformers' own loss takes hold here, too: with
    ``num_items_in_batch``, which ``Trainer`` gives, the sum is divided by that; ``shift_labels``
    are used instead of ``labels`` and are not shifted; ``ignore_index`` goes before the one given
    here. What the model adds to its loss, such as a router's, it adds still. A trainer has to take
    the loss from the model: ``Trainer`` does, unless it has a ``label_smoothing_factor`` or a
    ``compute_loss_func``; TRL's ``SFTTrainer`` computes its own.

    Args:
        model: one causal language model, or a wrapper of one (PEFT, DDP, FSDP2, ``torch.compile``).
            Its output layer is an ``nn.Linear``, tied to the embedding or not, and nothing but its
            loss takes the logits.
        ignore_index: of labels, which are (..., tokens), int64 or int32.

    Other arguments are those of :func:`eaft_ext.linear_gated_ce`. Of several calls for a model the
    last counts. A deep copy of the model has the gated loss too, and the same handle: its
    ``stats`` are those of the last call of either, and ``remove`` ends both. A model that was
    pickled comes back with its own loss.

    Returns:
        The :class:`LinearGatedLoss` that undoes it and has the statistics of the last call.

    Raises:
        TypeError, ValueError: for options that :func:`eaft_ext.linear_gated_ce` refuses; a model
            without or with several output layers, with one that is quantised, has an adapter
            (:func:`eaft_ext.linear_gated_ce` takes the effective weight) or is divided by tensor
            parallelism, with an encoder, with another loss than that of causal language models, or
            which changes its logits; in the forward, for models that turn out to be such, and for
            labels that are not one for each position, as with ``logits_to_keep``.

    ``nn.DataParallel`` is not supported: what it runs are copies with the methods of the model.
    ``torch.compile`` traces through it, before or after this call.
    """
    check_options(_OP, k, alpha, normalizer, gate, "mean")
    check_chunks(_OP, chunk_size, accumulate_in_float32)
    # A tensor for the labels is all that this looks at, besides the index.
    check_labels(_OP, torch.empty(0, dtype=torch.int64), ignore_index)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a module, got {type(model).__name__}")
    causal = _causal_lm(model)
    heads = _linears_of(causal)
    return LinearGatedLoss(
        causal,
        heads,
        k=k,
        alpha=alpha,
        normalizer=normalizer,
        gate=gate,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        accumulate_in_float32=accumulate_in_float32,
    )


class LinearGatedLoss:
    """What :func:`use_linear_gated_ce` did to a model. As a context manager it ends with the block.

    It keeps the model alive until :meth:`remove`.
    """

    stats: TokenStats | None
    """nll, entropy, gate and valid of the last call with labels; None before the first.

    Each is [b, s], for the position whose next token is predicted.
    """

    def __init__(self, causal: nn.Module, heads: list[nn.Linear], **options: Any) -> None:
        self.stats = None
        self.options = options
        self.is_removed = False
        self._modules: list[nn.Module] = [causal, *heads]
        earlier = _patch_of(causal, _LOSS)
        if earlier is not None and causal in earlier.owner._modules:
            earlier.owner.remove()
        for module in self._modules:  # of a copy, whose original keeps what it has
            _restore(module)
        _Loss(self, causal, _LOSS)
        _Forward(self, causal, _forward_of(causal))
        for head in heads:
            _Head(self, head, _forward_of(head))

    def remove(self) -> None:
        """Give the model its own loss again, unless a later call has taken the place of this."""
        for module in self._modules:
            _restore(module, self)
        self._modules.clear()
        # Where others have wrapped our methods, or have copied them, these stay and do nothing.
        self.is_removed = True
        self.stats = None

    def __enter__(self) -> LinearGatedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _of_logits(self, logits: Tensor, labels: Tensor | None, given: dict[str, Any]) -> Tensor:
        """Where there are logits: the model's loss function called by others than its forward."""
        options, labels = _Call(self, "", labels, given).options_and_labels(logits)
        del options["chunk_size"], options["accumulate_in_float32"]
        loss, self.stats = eaft_ext.gated_ce(logits, labels, return_stats=True, **options)
        return loss


class _Active(threading.local):
    """The innermost forward with labels of this thread; None within one without labels."""

    call: _Call | None = None


_active = _Active()


class _Call:
    """A forward with labels: its loss takes the place of the logits, from the head to the loss."""

    def __init__(
        self, owner: LinearGatedLoss, name: str, labels: Any, given: dict[str, Any]
    ) -> None:
        self.owner = owner
        self.name = name
        self.labels = labels
        self.given = given
        self.loss: Tensor | None = None
        self.version = 0
        self.is_taken = False

    def options_and_labels(self, like: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What the losses take, for a hidden state or logits: labels (...) for (..., H or V)."""
        options = dict(self.owner.options)
        if self.given.get("ignore_index") is not None:
            options["ignore_index"] = self.given["ignore_index"]
        num_items = self.given.get("num_items_in_batch")
        if isinstance(num_items, Tensor) and num_items.device.type != "cpu":
            num_items = num_items.to(like.device)
        options["num_items_in_batch"] = num_items
        labels = self.given.get("shift_labels")
        if labels is None:
            # Not the hidden state: it would have to be copied to lose a position.
            labels = nn.functional.pad(self.labels, (0, 1), value=options["ignore_index"])[..., 1:]
        if labels.numel() != like.shape[:-1].numel():
            raise ValueError(
                f"{_OP}: labels must be one for each position, got {tuple(labels.shape)} where the "
                f"output layer has {tuple(like.shape[:-1])}; logits_to_keep does not go with labels"
            )
        return options, labels.to(like.device).reshape(like.shape[:-1])

    def compute(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """The loss, for what the head was given."""
        if hasattr(head.weight, "device_mesh"):
            raise TypeError(
                f"{_OP}: the output layer of {self.name} is divided by tensor parallelism; give "
                "eaft_ext.gated_ce the logits, which it takes divided as they are"
            )
        options, labels = self.options_and_labels(hidden)
        self.loss, self.owner.stats = eaft_ext.linear_gated_ce(
            hidden, head.weight, labels, head.bias, return_stats=True, **options
        )
        self.version = _version_of(self.loss)
        return self.loss

    def take(self, logits: Tensor, labels: Tensor | None, given: dict[str, Any]) -> Tensor:
        """The loss, for what the model gives its loss function."""
        self.is_taken = True
        if self.loss is None:
            raise TypeError(f"{_OP}: {self.name} does not call its output layer for its logits")
        # The same tensor, not one like it: a scaled or capped loss is a number as well.
        if logits is not self.loss or _version_of(logits) != self.version:
            raise self.changed_logits()
        is_moved = isinstance(labels, Tensor) and labels.device != self.labels.device
        is_shifted = given.get("shift_labels") is self.given.get("shift_labels")
        if not is_shifted or not (labels is self.labels or is_moved):
            raise TypeError(f"{_OP}: {self.name} changes the labels before its loss")
        return self.loss

    def changed_logits(self) -> TypeError:
        return TypeError(
            f"{_OP}: {self.name} changes its logits, or uses them, between its output layer and "
            "its loss function; give eaft_ext.gated_ce the logits that it returns without labels"
        )

    def without_logits(self, outputs: Any) -> Any:
        """What the forward gives, a dict with attributes or a tuple, less what were the logits."""
        if not self.is_taken:
            raise TypeError(
                f"{_OP}: {self.name} did not call its loss_function with the logits of its output "
                "layer, as models of transformers do"
            )
        if isinstance(outputs, tuple):
            return (outputs[0], *(output for output in outputs[1:] if output is not self.loss))
        # A new one: to set an entry to None would leave what it was under its name.
        return type(outputs)(
            **{
                name: output
                for name, output in outputs.items()
                if name == "loss" or output is not self.loss
            }
        )


def _version_of(tensor: Tensor) -> int:
    """How often it was written to, where this is counted."""
    is_counted = not torch.compiler.is_compiling() and not tensor.is_inference()
    return tensor._version if is_counted else 0


class _Patch:
    """Stands in for a method of an instance, as ``slot`` of the module's own attributes.

    What is put there is a function bound to the module, as a class would give it: deep copies bind
    it to the copied module, and ``torch.compile`` and accelerate look for the function.
    """

    def __init__(self, owner: LinearGatedLoss, module: nn.Module, slot: str) -> None:
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
        """What would be called without this."""
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

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Forward(_Patch):
    """The model's forward."""

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = self.original(module)
        earlier = _active.call
        labels = self._argument("labels", args, kwargs)
        if self.owner.is_removed or (labels is None and earlier is None):
            return original(*args, **kwargs)
        call = None
        if labels is not None:
            names = ("shift_labels", "num_items_in_batch", "ignore_index")
            given = {name: self._argument(name, args, kwargs) for name in names}
            call = _Call(self.owner, type(module).__name__, labels, given)
        _active.call = call
        try:
            outputs = original(*args, **kwargs)
        except Exception as error:
            if call is None or call.loss is None or call.is_taken:
                raise
            # Such as a slice of the logits, which are a number now.
            raise call.changed_logits() from error
        finally:
            _active.call = earlier
        return outputs if call is None else call.without_logits(outputs)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self.names.index(name) if name in self.names else len(args)
        return args[position] if position < len(args) else None


class _Head(_Patch):
    """The forward of the output layer.

    The loss is computed here, and not in the model's forward, for the hooks of the layer's own
    call: FSDP2 gathers the weight before it, and for the backward when the gradient of its output
    arrives.
    """

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = _active.call
        if call is None or call.owner is not self.owner or call.is_taken:
            return self.original(module)(*args, **kwargs)
        return call.compute(cast("nn.Linear", module), *args, **kwargs)


class _Loss(_Patch):
    """The model's ``loss_function``."""

    def __init__(self, owner: LinearGatedLoss, module: nn.Module, slot: str) -> None:
        self.own: Callable[..., Tensor] = cast("Any", module).loss_function
        super().__init__(owner, module, slot)

    def named(self, module: nn.Module, slot: str, function: Any) -> Any:
        # Pickle takes a method by its name; the property of this name has the model's own loss.
        function.__name__ = "loss_function"
        return function

    def call(
        self,
        module: nn.Module,
        logits: Tensor,
        labels: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.owner.is_removed:
            return self.own(logits, labels, *args, **kwargs)
        call = _active.call
        if call is None or call.owner is not self.owner:
            return self.owner._of_logits(logits, labels, kwargs)
        return call.take(logits, labels, kwargs)


def _forward_of(module: nn.Module) -> str:
    """The attribute to replace: below the hooks of accelerate, which move a module's arguments."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


def _patch_of(module: nn.Module, slot: str) -> _Patch | None:
    function = getattr(vars(module).get(slot), "__func__", None)
    patch = getattr(function, "patch", None)
    # functools.wraps copies attributes: one who has wrapped our function seems to have a patch.
    return patch if isinstance(patch, _Patch) and patch.function is function else None


def _restore(module: nn.Module, owner: LinearGatedLoss | None = None) -> None:
    """Leave a module as it was found, or where a patch is of another owner, as it is."""
    # accelerate moves what is in _old_forward to forward when it takes its hooks off.
    for slot in ("forward", "_old_forward", _LOSS):
        patch = _patch_of(module, slot)
        if patch is not None and owner in (None, patch.owner):
            patch.uninstall(module, slot)


def _causal_lm(model: nn.Module) -> nn.Module:
    """The one module of a model that has an output layer and a loss, as transformers has them."""
    found = list(_with_loss_and_head(model))
    name = type(model).__name__
    if not found:
        raise TypeError(
            f"{_OP}: nothing in {name} has get_output_embeddings() and loss_function, as the "
            "causal language models of transformers have"
        )
    # Models of several modalities give the head of the language model within as theirs.
    if len({head for _, head in found}) > 1:
        names = ", ".join(type(module).__name__ for module, _ in found)
        raise TypeError(f"{_OP}: {name} has several models with an output layer: {names}; give one")
    causal = found[0][0]
    _check_loss(causal)
    return causal


def _with_loss_and_head(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in model.modules():
        # Of its own: some wrappers pass on the attributes of what they wrap.
        of_class = type(module)
        if hasattr(of_class, "loss_function") and hasattr(of_class, "get_output_embeddings"):
            head = cast("Any", module).get_output_embeddings()
            if head is not None:
                yield module, head


def _check_loss(causal: nn.Module) -> None:
    name = type(causal).__name__
    config: Any = getattr(causal, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{_OP}: {name} has an encoder; labels of its decoder are not shifted")
    loss = cast("Any", causal).loss_function
    of_transformers = getattr(loss, "__module__", "").partition(".")[0] == "transformers"
    if of_transformers and loss.__name__ != "ForCausalLMLoss":
        raise TypeError(
            f"{_OP}: the loss of {name} is {loss.__name__} and not that of causal language models"
        )
    if "labels" not in inspect.signature(causal.forward).parameters:
        raise TypeError(f"{_OP}: the forward of {name} takes no labels")
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for option in LOGIT_OPTIONS:
        value = getattr(config, option, None)
        if value is not None:
            raise TypeError(
                f"{_OP}: {name} changes its logits before its loss ({option}={value}); give "
                "eaft_ext.gated_ce the logits that it returns without labels"
            )


def _linears_of(causal: nn.Module) -> list[nn.Linear]:
    """The output layer; several, where PEFT trains copies of it and one is called at a time."""
    head: nn.Module = cast("Any", causal).get_output_embeddings()
    heads = [head]
    if type(head).__name__ == "ModulesToSaveWrapper":
        copies = cast("nn.ModuleDict", head.modules_to_save)
        heads = [cast("nn.Module", head.original_module), *copies.values()]
    for one in heads:
        _check_head(one, type(causal).__name__)
    return cast("list[nn.Linear]", heads)


def _check_head(head: nn.Module, name: str) -> None:
    which = f"{_OP}: the output layer of {name}"
    if hasattr(head, "base_layer"):
        raise TypeError(
            f"{which} has an adapter, {type(head).__module__}.{type(head).__qualname__}; give "
            "eaft_ext.linear_gated_ce the effective weight, or leave the layer without one"
        )
    # Subclasses are welcome that only add to it, as FSDP2's are.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        of_class = f"{type(head).__module__}.{type(head).__qualname__}"
        raise TypeError(f"{which} must be an nn.Linear, got {of_class}")
    weight = head.weight
    # Quantised weights are of classes of their own, and some of those say that they are bfloat16.
    is_plain = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "device_mesh")
    if not is_plain or not weight.is_floating_point():
        raise TypeError(
            f"{which} must have a weight of floating-point numbers, got {type(weight).__name__} "
            f"of {weight.dtype}"
        )
    replaced = None if _patch_of(head, _forward_of(head)) else vars(head).get("forward")
    is_hooked = "_hf_hook" in vars(head)
    if (replaced is not None and not is_hooked) or hasattr(head, "_hf_tp_plan"):
        raise TypeError(
            f"{which} has another forward than its class, as tensor parallelism gives it; give "
            "eaft_ext.gated_ce the logits"
        )
