"""Hugging Face transformers: the gated loss of causal language models, without their logits.

gated = use_linear_gated_ce(model)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

import eaft_ext
from eaft_ext._checks import check_chunks
from eaft_ext._options import LOSS_DEFAULTS, LossKeywords, token_loss, with_keywords
from eaft_ext.integrations import _output_layer
from eaft_ext.integrations._absent_logits import AbsentLogits, LogitMap
from eaft_ext.integrations._causal_lm import causal_lm, expected_map
from eaft_ext.integrations._output_layer import active
from eaft_ext.integrations._patches import Patch, forward_slot, patch_of, restore
from eaft_ext.integrations._training_steps import TrainingSteps, calling_function, defined_as
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LinearGatedLoss", "use_linear_gated_ce"]

_OP = "use_linear_gated_ce"
_LOSS = "_loss_function"  # where the setter of transformers' loss_function puts one
_REPLICATE = "_replicate_for_data_parallel"
# accelerate moves what is in _old_forward to forward when it takes its hooks off.
_SLOTS = ("forward", "_old_forward", _LOSS, _REPLICATE)


@with_keywords
def use_linear_gated_ce(
    model: nn.Module,
    k: int = 20,
    *,
    chunk_size: int | None = None,
    accumulate_in_float32: bool | None = None,
    logits_in_evaluation: bool = True,
    watch_steps: bool = True,
    **options: Unpack[LossKeywords],
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
    here. What the model adds to its loss, such as a router's, it adds still. The output layer is
    looked up in every call: one that was resized, replaced or merged since is the one that counts.
    A scale or a soft cap that the model puts on its logits is put on them by the loss.

    A trainer has to take the loss from the model: ``Trainer`` does, unless it has a
    ``label_smoothing_factor`` or a ``compute_loss_func``; TRL's ``SFTTrainer`` computes its own.
    Where an optimizer of torch makes a step of the model and its loss was never asked for, that
    raises, before a weight is changed (with a closure, after it). A compiled step is not seen.

    Args:
        model: one causal language model, or a wrapper of one (PEFT, DDP, FSDP2, ``torch.compile``).
            Its output layer is an ``nn.Linear``, tied to the embedding or not, shared with other
            models or not, and nothing but its loss takes the logits.
        ignore_index: of labels, which are (..., tokens), int64 or int32.
        logits_in_evaluation: in eval mode and without gradients, return the logits beside the loss:
            the metrics of a ``Trainer`` and its ``predict`` are computed from them. False: none.
        watch_steps: False lets optimizers step though the loss was not asked for, as in training
            that alternates with another loss of your own.

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
            parallelism, with an encoder, or with another loss than that of causal language models;
            in the forward, for models that turn out or come to be such, change their logits but by
            a scale or a soft cap, do that beside a ``softcap`` or ``logit_scale`` given here, use
            their logits outside of their loss, or are replicated by ``nn.DataParallel``, and for
            labels that are not one for each position, as with ``logits_to_keep``.
        RuntimeError: in the ``step`` of an optimizer, if the gradients are those of another loss.

    ``torch.compile`` traces through it, before or after this call.
    """
    token_loss(_OP, k, **options)
    check_chunks(_OP, chunk_size, accumulate_in_float32)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a module, got {type(model).__name__}")
    for name, value in (
        ("logits_in_evaluation", logits_in_evaluation),
        ("watch_steps", watch_steps),
    ):
        if not isinstance(value, bool):
            raise TypeError(f"{_OP}: {name} must be True or False, got {value!r}")
    causal = causal_lm(_OP, model)
    for layer in _output_layer.layers_of(causal):
        _output_layer.check(_OP, layer, type(causal).__name__)
    return LinearGatedLoss(
        causal,
        logits_in_evaluation,
        watch_steps,
        k=k,
        chunk_size=chunk_size,
        accumulate_in_float32=accumulate_in_float32,
        **(LOSS_DEFAULTS | dict(options)),
    )


class LinearGatedLoss:
    """What :func:`use_linear_gated_ce` did to a model. As a context manager it ends with the block.

    It keeps the model alive until :meth:`remove`.
    """

    stats: TokenStats | None
    """nll, entropy, gate and valid of the last call with labels; None before the first.

    Each is [b, s], for the position whose next token is predicted.
    """

    def __init__(
        self, causal: nn.Module, logits_in_evaluation: bool, watch_steps: bool, **options: Any
    ) -> None:
        self.stats = None
        self.options = options
        self.logits_in_evaluation = logits_in_evaluation
        self.is_removed = False
        self._causal: nn.Module | None = causal
        self.model_map = expected_map(causal)
        self.given_map = LogitMap(options["softcap"], options["logit_scale"])
        latest = None
        for slot in _SLOTS:
            earlier = patch_of(causal, slot)
            if earlier is not None and earlier.owner._causal is causal:
                latest = earlier.owner.steps.latest
                earlier.owner.remove()
        restore(causal, _SLOTS)  # a copy, whose original keeps what it has
        _Loss(self, causal, _LOSS)
        _Forward(self, causal, forward_slot(causal))
        _Replicate(self, causal, _REPLICATE)
        for layer in _output_layer.layers_of(causal):
            _output_layer.install(layer, self)
        self.steps = TrainingSteps(causal, self._refuse_step)
        self.steps.latest = latest
        if not watch_steps:
            self.steps.stop()

    def remove(self) -> None:
        """Give the model its own loss again, unless a later call has taken the place of this."""
        if self.is_removed:
            return
        if self._causal is not None:
            restore(self._causal, _SLOTS, self)
        self._causal = None
        _output_layer.uninstall(self)
        self.steps.stop()
        # Where others have wrapped our methods, or have copied them, these stay and do nothing.
        self.is_removed = True
        self.stats = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearGatedLoss:
        """Copies of a model have the handle of the original."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A model that was pickled has its own loss, and nothing for a handle to undo."""
        return _removed, ()

    def __enter__(self) -> LinearGatedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def of_logits(self, call: _Call, logits: Tensor) -> Tensor:
        """The loss where there are logits."""
        # They are what the model has made of them already.
        if self.given_map != LogitMap():
            self.check_given(call.name, self.model_map)
        options, labels = call.options_and_labels(logits)
        del options["chunk_size"], options["accumulate_in_float32"]
        loss, self.stats = eaft_ext.gated_ce(logits, labels, return_stats=True, **options)
        self.steps.asked()
        return loss

    def check_given(self, name: str, model_map: LogitMap) -> None:
        """Options for logits that the model leaves as they are, and does it?"""
        if model_map == LogitMap():
            return
        given = self.given_map
        raise TypeError(
            f"{_OP}: {name} caps or scales its logits itself (softcap={model_map.softcap}, "
            f"logit_scale={model_map.logit_scale}), and softcap={given.softcap}, "
            f"logit_scale={given.logit_scale} were given"
        )

    def _refuse_step(self) -> NoReturn:
        """For an optimizer's step of the model, in which nobody asked for its loss."""
        assert self._causal is not None, "nothing is watched after remove()"
        slot = forward_slot(self._causal)
        replaced = vars(self._causal).get(slot)
        caller = self.steps.caller_without_labels
        if caller is None and not isinstance(patch_of(self._causal, slot), _Forward):
            by_whom = f"{defined_as(replaced)}, which has replaced its forward"
        else:
            # A compiled call is not seen; the step, at least, is made by somebody.
            by_whom = f"{caller or calling_function()}, which gave it no labels"
            if by_whom.startswith("transformers.trainer."):
                by_whom += ", as with label_smoothing_factor or compute_loss_func"
        raise RuntimeError(
            f"{_OP}: this step trains {type(self._causal).__name__} on another loss than its gated "
            f"one, which was not asked for: that of {by_whom}; take the loss from the model, or "
            "end this with remove()"
        )


def _removed() -> LinearGatedLoss:
    handle = LinearGatedLoss.__new__(LinearGatedLoss)
    handle.stats, handle.options, handle.is_removed = None, {}, True
    return handle


class _Call:
    """A forward with labels: its loss is computed where its logits would be."""

    def __init__(
        self,
        owner: LinearGatedLoss,
        model: nn.Module,
        labels: Any,
        given: dict[str, Any],
        keeps_logits: bool = False,
    ) -> None:
        self.owner = owner
        self.model = model
        self.name = type(model).__name__
        self.labels = labels
        self.given = given
        self.keeps_logits = keeps_logits
        self.layers: list[nn.Module] = []
        self.loss: Tensor | None = None
        self.map = owner.model_map if owner.given_map == LogitMap() else owner.given_map
        self.product: tuple[Tensor, nn.Linear] | None = None
        self.stats: TokenStats | None = None
        self.version: int | None = None
        self.is_taken = False

    def look_up_layers(self) -> None:
        """Find the output layer that the model has now."""
        self.layers = _output_layer.layers_of(self.model)
        # A compiler has guards on what it looks at here, and traces anew when that has changed.
        is_ready = all(_output_layer.is_ready(layer) for layer in self.layers)
        if not (torch.compiler.is_compiling() and is_ready):
            self._check_layers()

    @torch.compiler.disable(reason=f"{_OP} has to look at an output layer that was replaced")
    def _check_layers(self) -> None:
        for layer in self.layers:
            _output_layer.check(_OP, layer, self.name)
            _output_layer.install(layer, self.owner)

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
            has_less = self.given.get("logits_to_keep") is not None
            hint = "; logits_to_keep does not go with labels" if has_less else ""
            raise ValueError(
                f"{_OP}: labels must be one for each position, got {tuple(labels.shape)} where the "
                f"output layer has {tuple(like.shape[:-1])}{hint}"
            )
        return options, labels.to(like.device).reshape(like.shape[:-1])

    def is_for(self, layer: nn.Module) -> bool:
        """Whether the loss is computed in the call of this layer."""
        return not (self.is_taken or self.keeps_logits) and any(layer is one for one in self.layers)

    def absent_logits(self, layer: nn.Linear, input: Tensor) -> AbsentLogits:
        """Compute the loss, for the hidden state that the output layer was given."""
        hidden = input
        if hasattr(layer.weight, "device_mesh"):
            raise TypeError(
                f"{_OP}: the output layer of {self.name} is divided by tensor parallelism; give "
                "eaft_ext.gated_ce the logits, which it takes divided as they are"
            )
        if self.loss is not None:
            self.refuse("a second call of its output layer")
        self.version = _version_of(self.labels)
        self.product = (hidden, layer)
        self.loss = self.compute()
        shape = torch.Size((*hidden.shape[:-1], layer.weight.size(0)))
        return AbsentLogits(self.loss, shape, layer.weight.dtype, self.refuse)

    def compute(self) -> Tensor:
        """The loss, of logits of which the model makes what is in ``map``."""
        assert self.product is not None, "the output layer was called"
        hidden, layer = self.product
        options, labels = self.options_and_labels(hidden)
        options |= self.map._asdict()
        loss, self.stats = eaft_ext.linear_gated_ce(
            hidden, layer.weight, labels, layer.bias, return_stats=True, **options
        )
        return loss

    def take(self, logits: Any, labels: Tensor | None, given: dict[str, Any]) -> Tensor:
        """The loss, for what the model gives its loss function."""
        if self.is_taken:
            self.refuse("a second call of its loss function")
        self.is_taken = True
        is_moved = isinstance(labels, Tensor) and labels.device != self.labels.device
        is_shifted = given.get("shift_labels") is self.given.get("shift_labels")
        is_same = labels is self.labels and self.version in (None, _version_of(self.labels))
        if not is_shifted or not (is_same or is_moved):
            raise TypeError(f"{_OP}: {self.name} changes the labels before its loss")
        for name in ("ignore_index", "num_items_in_batch"):
            value, own = given.get(name), self.given.get(name)
            if value is not own and (isinstance(value, Tensor) or value not in (None, own)):
                raise TypeError(
                    f"{_OP}: {self.name} gives its loss function {name}={value}, and its forward "
                    f"was given {own}"
                )
        if self.keeps_logits:
            return self.owner.of_logits(self, logits)
        if self.loss is None or not isinstance(logits, AbsentLogits):
            raise TypeError(f"{_OP}: {self.name} does not call its output layer for its logits")
        if self.owner.given_map != LogitMap():
            self.owner.check_given(self.name, logits.map)
        elif not self.map.is_close(logits.map):
            # It does what its configuration did not tell; from the next call on it is expected.
            logits.loss = self.loss.new_empty(0)  # the gradients that it holds are free again
            self.map = self.owner.model_map = logits.map
            self.loss = self.compute()
        self.owner.stats = self.stats
        self.owner.steps.asked()
        # Not what the logits have in its place: FSDP2 may have rounded that to an output dtype.
        return self.loss

    def refuse(self, use: str) -> NoReturn:
        """For a use of the logits that are not there, such as "mul"."""
        raise TypeError(
            f"{_OP}: {self.name} changes its logits, or uses them, outside of its loss function "
            f"({use}){self._replaced()}; give eaft_ext.gated_ce the logits that it returns "
            "without labels"
        )

    def _replaced(self) -> str:
        """What of the model has come from elsewhere, for a sentence that says what it does."""
        parts = ""
        forward = patch_of(self.model, forward_slot(self.model))
        below = None if forward is None else getattr(forward.replaced, "__func__", forward.replaced)
        if below not in (None, type(self.model).forward):
            parts += f"; its forward is {defined_as(below)}"
        if not isinstance(patch_of(self.model, _LOSS), _Loss):
            parts += f"; its loss function is {defined_as(cast('Any', self.model).loss_function)}"
        return parts

    def without_logits(self, outputs: Any) -> Any:
        """What the forward gives, a dict with attributes or a tuple, less what were the logits."""
        if not self.is_taken:
            raise TypeError(
                f"{_OP}: {self.name} did not call its loss_function with the logits of its output "
                f"layer, as models of transformers do{self._replaced()}"
            )
        if self.keeps_logits:
            return outputs
        if isinstance(outputs, tuple):
            return tuple(output for output in outputs if not isinstance(output, AbsentLogits))
        # A new one: to set an entry to None would leave what it was under its name.
        return type(outputs)(
            **{
                name: output
                for name, output in outputs.items()
                if not isinstance(output, AbsentLogits)
            }
        )


def _version_of(labels: Any) -> int | None:
    """How often they were written to, where this is counted."""
    if torch.compiler.is_compiling() or not isinstance(labels, Tensor) or labels.is_inference():
        return None
    return labels._version


class _Forward(Patch):
    """The model's forward."""

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = self.original(module)
        if self.owner.is_removed:
            return original(*args, **kwargs)
        labels = self._argument("labels", args, kwargs)
        earlier = active.call
        if labels is None:
            self._note_caller(module)
            if earlier is None:
                return original(*args, **kwargs)
        call = None
        if labels is not None:
            names = ("shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep")
            given = {name: self._argument(name, args, kwargs) for name in names}
            is_evaluation = not (module.training or torch.is_grad_enabled())
            keeps_logits = is_evaluation and self.owner.logits_in_evaluation
            call = _Call(self.owner, module, labels, given, keeps_logits)
            call.look_up_layers()
        active.call = call
        try:
            outputs = original(*args, **kwargs)
        finally:
            active.call = earlier
        return outputs if call is None else call.without_logits(outputs)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self.names.index(name) if name in self.names else len(args)
        return args[position] if position < len(args) else None

    def _note_caller(self, module: nn.Module) -> None:
        """Who might train the model on another loss."""
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.owner.steps.caller_without_labels = calling_function()


class _Loss(Patch):
    """The model's ``loss_function``."""

    def __init__(self, owner: LinearGatedLoss, module: nn.Module, slot: str) -> None:
        self.own: Any = cast("Any", module).loss_function
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
        call = cast("_Call | None", active.call)
        loss: Tensor
        if self.owner.is_removed:
            loss = self.own(logits, labels, *args, **kwargs)
        elif call is None or call.owner is not self.owner:
            loss = self.owner.of_logits(_Call(self.owner, module, labels, kwargs), logits)
        else:
            loss = call.take(logits, labels, kwargs)
        return loss


class _Replicate(Patch):
    """What ``nn.DataParallel`` calls for copies whose methods are those of the original."""

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{_OP}: nn.DataParallel is not supported: its replicas of {type(module).__name__} "
            "would compute with the weights of the original; use DistributedDataParallel, or one "
            "GPU"
        )
