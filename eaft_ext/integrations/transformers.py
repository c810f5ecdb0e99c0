"""Hugging Face transformers: the gated loss of causal language models, without their logits.

gated = use_linear_gated_ce(model)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

import eaft_ext
from eaft_ext._checks import check_chunks
from eaft_ext._options import (
    LOSS_DEFAULTS,
    LossKeywords,
    token_loss,
    with_keywords,
)
from eaft_ext.integrations import _output_layer
from eaft_ext.integrations._absent_logits import LogitMap
from eaft_ext.integrations._call import LOSS, OP, Call
from eaft_ext.integrations._causal_lm import causal_lm, expected_map
from eaft_ext.integrations._output_layer import active
from eaft_ext.integrations._patches import Patch, forward_slot, patch_of, restore
from eaft_ext.integrations._training_steps import TrainingSteps, calling_function, defined_as
from eaft_ext.integrations._trl import (
    FUSED,
    fused_forward,
    fused_output,
    hook_chunks,
    is_chunked,
)
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LinearGatedLoss", "use_linear_gated_ce"]

_REPLICATE = "_replicate_for_data_parallel"
# accelerate moves what is in _old_forward to forward when it takes its hooks off.
_SLOTS = ("forward", "_old_forward", LOSS, _REPLICATE)


@with_keywords
def use_linear_gated_ce(
    model: nn.Module,
    k: int | None = 20,
    *,
    chunk_size: int | None = None,
    accumulate_in_float32: bool | None = None,
    drop_below: float = 0.0,
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
    ``label_smoothing_factor`` or a ``compute_loss_func``; TRL's ``SFTTrainer`` computes its own,
    and takes :class:`eaft_ext.integrations.trainer.EAFTCallback` instead of this.
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
    return _install(
        model,
        None,
        k=k,
        chunk_size=chunk_size,
        accumulate_in_float32=accumulate_in_float32,
        drop_below=drop_below,
        logits_in_evaluation=logits_in_evaluation,
        watch_steps=watch_steps,
        **options,
    )


def for_trainer(model: nn.Module, arguments: Any, **options: Any) -> LinearGatedLoss:
    """:func:`use_linear_gated_ce` for a trainer with these arguments, TRL's ``SFTTrainer`` too."""
    return _install(model, arguments, **options)


def _install(
    model: nn.Module,
    arguments: Any,
    *,
    k: int | None,
    chunk_size: int | None = None,
    accumulate_in_float32: bool | None = None,
    drop_below: float = 0.0,
    logits_in_evaluation: bool = True,
    watch_steps: bool = True,
    **options: Any,
) -> LinearGatedLoss:
    z_loss = token_loss(OP, k, **options).z_loss
    check_chunks(OP, chunk_size, accumulate_in_float32, drop_below, z_loss)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model must be a module, got {type(model).__name__}")
    for name, value in (
        ("logits_in_evaluation", logits_in_evaluation),
        ("watch_steps", watch_steps),
    ):
        if not isinstance(value, bool):
            raise TypeError(f"{OP}: {name} must be True or False, got {value!r}")
    causal = causal_lm(OP, model)
    for layer in _output_layer.layers_of(causal):
        _output_layer.check(OP, layer, type(causal).__name__)
    return LinearGatedLoss(
        causal,
        logits_in_evaluation,
        watch_steps,
        fused_forward(OP, causal, arguments),
        k=k,
        chunk_size=chunk_size,
        accumulate_in_float32=accumulate_in_float32,
        drop_below=drop_below,
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
    num_logits: int
    """How many logits the entropy of the gate was taken over in that call."""

    def __init__(
        self,
        causal: nn.Module,
        logits_in_evaluation: bool,
        watch_steps: bool,
        trl_forward: Callable[..., Any] | None,
        **options: Any,
    ) -> None:
        self.stats = None
        self.num_logits = 0
        self.options = options
        self.trl_forward = trl_forward
        if trl_forward is not None and is_chunked(trl_forward):
            hook_chunks(trl_forward)
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
        _Loss(self, causal, LOSS)
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

    def of_logits(self, call: Call, logits: Tensor) -> Tensor:
        """The loss where there are logits."""
        # They are what the model has made of them already.
        if self.given_map != LogitMap():
            self.check_given(call.name, self.model_map)
        options, labels = call.options_and_labels(logits)
        for name in ("chunk_size", "accumulate_in_float32", "drop_below"):
            del options[name]
        self.note_vocab(logits.size(-1))
        loss, self.stats = eaft_ext.gated_ce(logits, labels, return_stats=True, **options)
        self.steps.asked()
        return loss

    def note_vocab(self, vocab_size: int) -> None:
        """Say how many words there are: outside of its call the weight may be sharded, or empty."""
        self.num_logits = min(self.options["k"] or vocab_size, vocab_size)

    def check_given(self, name: str, model_map: LogitMap) -> None:
        """Options for logits that the model leaves as they are, and does it?"""
        if model_map == LogitMap():
            return
        given = self.given_map
        raise TypeError(
            f"{OP}: {name} caps or scales its logits itself (softcap={model_map.softcap}, "
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
            if by_whom.startswith("trl."):
                by_whom += (
                    " (an SFTTrainer takes eaft_ext.integrations.trainer.EAFTCallback among its "
                    "callbacks)"
                )
        else:
            # A compiled call is not seen; the step, at least, is made by somebody.
            by_whom = f"{caller or calling_function()}, which gave it no labels"
            if by_whom.startswith("transformers.trainer."):
                by_whom += ", as with label_smoothing_factor or compute_loss_func"
        raise RuntimeError(
            f"{OP}: this step trains {type(self._causal).__name__} on another loss than its gated "
            f"one, which was not asked for: that of {by_whom}; take the loss from the model, or "
            "end this with remove()"
        )


def _removed() -> LinearGatedLoss:
    handle = LinearGatedLoss.__new__(LinearGatedLoss)
    handle.stats, handle.options, handle.is_removed = None, {}, True
    return handle


class _Forward(Patch):
    """The model's forward."""

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = self.original(module)
        if self.owner.is_removed:
            return original(*args, **kwargs)
        trl_forward = self.owner.trl_forward
        chunks = is_chunked(trl_forward)
        if not (chunks or kwargs.get(FUSED)):
            trl_forward = None
        if trl_forward is not None and not chunks:
            # Of the sum: TRL divides it, and adds what else the model's loss has.
            kwargs = {name: value for name, value in kwargs.items() if name != FUSED}
            kwargs["num_items_in_batch"] = 1
        labels = self._argument("labels", args, kwargs)
        is_shifted = labels is None or self._argument("shift_labels", args, kwargs) is not None
        if is_shifted and trl_forward is not None and not chunks:
            raise TypeError(
                f"{OP}: TRL gave {type(module).__name__} shift_labels, as under context or "
                "sequence parallelism, which is not supported with it"
            )
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
            if trl_forward is None:
                call = Call(self.owner, module, labels, given, keeps_logits)
            else:
                call = Call(self.owner, module, labels, given, return_stats="full")
            call.look_up_layers()
        active.call = call
        try:
            outputs = original(*args, **kwargs)
        finally:
            active.call = earlier
        if call is None:
            return outputs
        if chunks:
            if not call.is_taken:
                raise TypeError(f"{OP}: TRL did not ask for the loss of {type(module).__name__}")
            return outputs
        outputs = call.without_logits(outputs)
        if trl_forward is None:
            return outputs
        assert call.loss is not None and call.stats is not None, "the loss was taken"
        return fused_output(trl_forward, call.loss, call.stats, getattr(outputs, "aux_loss", None))

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
        # Trainers look whether it takes num_items_in_batch.
        with suppress(TypeError, ValueError):  # of what has no signature
            signature = inspect.signature(self.own)
            own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            parameters = [own, *signature.parameters.values()]
            function.__signature__ = signature.replace(parameters=parameters)
        return function

    def call(
        self,
        module: nn.Module,
        logits: Tensor,
        labels: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        call = cast("Call | None", active.call)
        loss: Tensor
        if self.owner.is_removed:
            loss = self.own(logits, labels, *args, **kwargs)
        elif call is None or call.owner is not self.owner:
            loss = self.owner.of_logits(Call(self.owner, module, labels, kwargs), logits)
        else:
            loss = call.take(logits, labels, kwargs)
        return loss


class _Replicate(Patch):
    """What ``nn.DataParallel`` calls for copies whose methods are those of the original."""

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{OP}: nn.DataParallel is not supported: its replicas of {type(module).__name__} "
            "would compute with the weights of the original; use DistributedDataParallel, or one "
            "GPU"
        )
