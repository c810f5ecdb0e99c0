"""Megatron-Core: the gated loss of its GPT models, under tensor and sequence parallelism.

gated = use_gated_ce(model)         # of its logits
gated = use_linear_gated_ce(model)  # of its hidden states: the logits are never all in memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import eaft_ext
from eaft_ext._checks import check_chunks
from eaft_ext._options import LOSS_DEFAULTS, LossKeywords, token_loss, with_keywords
from eaft_ext.integrations._megatron_linear import (
    OP,
    NoLogits,
    OutputLayer,
    check_model,
)
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = ["GatedLoss", "use_gated_ce", "use_linear_gated_ce", "vocab_parallel_cross_entropy"]

_METHOD = "compute_language_model_loss"


@with_keywords
def vocab_parallel_cross_entropy(  # type: ignore[misc]  # label_smoothing has Megatron's place
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    *,
    k: int | None = 20,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    tp_group: ProcessGroup | None = None,
    **options: Unpack[LossKeywords],
) -> Tensor:
    r"""Gated losses in place of ``megatron.core.tensor_parallel.vocab_parallel_cross_entropy``.

    ``loss = g * -ln softmax(x)_y`` with g of :func:`eaft_ext.gated_ce`, over the vocabulary of all
    processes. Unlike Megatron-Core's, it leaves the logits as they are.

    Args:
        vocab_parallel_logits: [s, b, V/tp], this process's columns, in the order of the ranks.
        target: [s, b], int64 or int32, words of the whole vocabulary. Negative ones are ignored:
            Megatron-Core takes any, for tokens that its mask removes.
        label_smoothing: as in Megatron-Core, what the words other than the label share, which is
            ``V / (V - 1)`` of it for ``F.cross_entropy``. V are the words of the whole vocabulary:
            under tensor parallelism Megatron-Core's own takes those of a shard.
        tp_group: the processes that share the vocabulary; by default Megatron-Core's tensor model
            parallel group.

    Other arguments are as for :func:`eaft_ext.vocab_parallel_gated_ce`.

    Returns:
        [s, b], float32, in nats, the same in all processes of the group.

    Raises:
        TypeError, ValueError: as :func:`eaft_ext.vocab_parallel_gated_ce`, so for logits that were
            gathered, where processes compare what they have.
    """
    ignore_index = token_loss("vocab_parallel_cross_entropy", k, **options).ignore_index
    group = _megatron_group() if tp_group is None else tp_group
    if label_smoothing != 0:
        words = vocab_parallel_logits.size(-1) * group.size() if vocab_size is None else vocab_size
        label_smoothing *= words / max(words - 1, 1)
    losses: Tensor = eaft_ext.vocab_parallel_gated_ce(
        vocab_parallel_logits,
        _ignoring_negative(target, ignore_index),
        k,
        group=group,
        vocab_size=vocab_size,
        reduction="none",
        inplace_backward=inplace_backward,
        label_smoothing=label_smoothing,
        **options,
    )
    return losses


@with_keywords
def use_gated_ce(
    model: nn.Module | Iterable[nn.Module],
    k: int | None = 20,
    *,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    **options: Unpack[LossKeywords],
) -> GatedLoss:
    r"""Make Megatron-Core models return gated losses for each token.

    ``model(tokens, position_ids, attention_mask, labels=labels)`` then gives the losses [b, s] of
    :func:`eaft_ext.vocab_parallel_gated_ce`, float32, in nats, in training and in evaluation, and
    with them the losses of multi-token prediction. What a training script does with them, such as
    its ``loss_mask`` and ``loss_func``, stays as it is. Where the mask is 0 the backward does not
    read the logits, and their gradient is 0::

        gated = use_gated_ce(model)  # in model_provider
        ...
        return output_tensor, gated.report(partial(loss_func, loss_mask), loss_mask)

    Args:
        model: a ``GPTModel`` or another model with ``compute_language_model_loss``, a wrapper of
            one (``Float16Module``, ``DistributedDataParallel``), or several model chunks. Any
            pipeline stage will do, also one that computes no loss.
        vocab_size: words of the vocabulary, if Megatron has padded it: the columns from there on
            then take no part. By default all take part, as in Megatron-Core's own loss.
        inplace_backward: let the gradient overwrite the logits, which halves their memory.

    Other arguments are as for :func:`eaft_ext.gated_ce`. Of several calls for a model the last
    counts.

    Returns:
        The :class:`GatedLoss` that undoes it and reports what the gate does.

    Raises:
        TypeError, ValueError: for options that :func:`eaft_ext.gated_ce` refuses, a model without
            ``compute_language_model_loss`` or one whose loss never sees logits; in the forward, for
            logits that were gathered.
    """
    token_loss("use_gated_ce", k, **options)
    modules = _modules_of("use_gated_ce", model, vocab_size)
    return GatedLoss(
        [_Method(module) for module in modules],
        k=k,
        vocab_size=vocab_size,
        inplace_backward=inplace_backward,
        **(LOSS_DEFAULTS | dict(options)),
    )


@with_keywords
def use_linear_gated_ce(
    model: nn.Module | Iterable[nn.Module],
    k: int | None = 20,
    *,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    accumulate_in_float32: bool | None = None,
    drop_below: float = 0.0,
    **options: Unpack[LossKeywords],
) -> GatedLoss:
    r"""The same of hidden states: output layer and loss in one, a chunk of tokens at a time.

    The losses of :func:`use_gated_ce` by :func:`eaft_ext.vocab_parallel_linear_gated_ce`, for the
    next token and for those of multi-token prediction; the logits are never all in memory. Under
    sequence parallelism the hidden states of the whole sequence are gathered, and stay until the
    backward, which scatters their gradient. Calls without labels have their logits. Losses are for
    each token, so that the backward computes the logits of each chunk a second time.

    Args:
        model, vocab_size: as for :func:`use_gated_ce`.
        chunk_size, accumulate_in_float32, drop_below: as for :func:`eaft_ext.linear_gated_ce`. The
            weight's gradient arrives in ``weight.grad``, from where Megatron-Core adds it to
            ``main_grad``, also with ``gradient_accumulation_fusion``, which this layer then does
            without.

    Other arguments, and what is returned, are as for :func:`use_gated_ce`.

    Raises:
        TypeError, ValueError: as :func:`use_gated_ce` does; for an output layer that is more than a
            ``ColumnParallelLinear``, or has ``defer_embedding_wgrad_compute``; for a model whose
            forward has no ``labels``; in the forward, for one that uses its logits otherwise, or
            has a loss without them.
    """
    z_loss = token_loss(OP, k, **options).z_loss
    check_chunks(OP, chunk_size, accumulate_in_float32, drop_below, z_loss)
    chunking: dict[str, Any] = {
        "chunk_size": chunk_size,
        "accumulate_in_float32": accumulate_in_float32,
        "drop_below": drop_below,
    }
    modules = _modules_of(OP, model, vocab_size)
    for module in modules:
        check_model(module)
    return GatedLoss(
        [_LinearMethod(module, chunking) for module in modules],
        k=k,
        vocab_size=vocab_size,
        **(LOSS_DEFAULTS | dict(options)),
    )


def _modules_of(
    op: str, model: nn.Module | Iterable[nn.Module], vocab_size: int | None
) -> list[nn.Module]:
    """The modules of a model, or of chunks of one, that have a loss."""
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    modules = [module for chunk in chunks for module in chunk.modules() if _has_loss(module)]
    if not modules:
        names = ", ".join(type(chunk).__name__ for chunk in chunks) or "an empty list"
        raise TypeError(f"{op}: nothing in {names} has {_METHOD}, as GPTModel has")
    for module in modules:
        _check_model(op, module, vocab_size)
    return modules


class GatedLoss:
    """What :func:`use_gated_ce` or :func:`use_linear_gated_ce` did to a model.

    As a context manager it ends with the block. It keeps the model alive until :meth:`remove`.
    """

    stats: TokenStats | None
    """nll, entropy, gate and valid, each [b, s], of the last micro-batch; None before the first."""

    def __init__(self, methods: list[_Method], **options: Any) -> None:
        self.stats = None
        self.options = options
        self._methods = methods
        for method in methods:
            method.owner = self

    def remove(self) -> None:
        """Give the model its own loss again, unless a later call has taken the place of this."""
        for method in self._methods:
            method.uninstall()
        self._methods.clear()
        self.stats = None

    def __enter__(self) -> GatedLoss:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def report(
        self, loss_func: Callable[..., Any], loss_mask: Tensor | None = None
    ) -> Callable[..., Any]:
        """``loss_func`` with what the gate did added to the dict that it returns for the log.

        The entries are "eaft gate"; "eaft entropy" and "eaft nll" in nats, the latter being the
        plain cross-entropy. Each is a float32 tensor [sum, number of tokens], which Megatron-LM
        adds up over micro-batches and data parallel ranks and divides; where the dict has single
        numbers, the mean. No host synchronisation.

        Args:
            loss_func: of the losses [b, s] of the last micro-batch, to ``(loss, num_tokens, dict)``
                or ``(loss, dict)``.
            loss_mask: [b, s], the weights of the tokens; by default 1. Tokens with ``ignore_index``
                do not count.
        """

        @wraps(loss_func)
        def loss_func_with_report(*args: Any, **kwargs: Any) -> Any:
            outputs = loss_func(*args, **kwargs)
            if self.stats is None or not isinstance(outputs, tuple):
                return outputs
            *others, entries = outputs
            if not isinstance(entries, dict):
                return outputs
            return (*others, entries | _entries(self.stats, loss_mask, entries))

        return loss_func_with_report


class _Method:
    """Stands in for ``compute_language_model_loss`` of one module."""

    owner: GatedLoss

    def __init__(self, module: nn.Module) -> None:
        earlier = vars(module).get(_METHOD)
        if isinstance(earlier, _Method):
            earlier.uninstall()
        self.module = module
        # An instance has none as a rule; then the method of its class is what remains.
        self.replaced = vars(module).get(_METHOD)
        setattr(module, _METHOD, self)

    def uninstall(self) -> None:
        """Leave the module as it was found, if this is still in place."""
        if vars(self.module).get(_METHOD) is self:
            delattr(self.module, _METHOD)
            if self.replaced is not None:
                setattr(self.module, _METHOD, self.replaced)

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses [b, s] from labels [b, s] and logits [s, b, V/tp]."""
        group = _group_of(self.module)
        _check_not_gathered(self.module, logits, group)
        # [s, b] throughout: the gradient then has the layout that the output layer works with.
        loss, stats = eaft_ext.vocab_parallel_gated_ce(
            logits, self._targets(labels), group=group, **self._options()
        )
        return self._result(loss, stats)

    def _targets(self, labels: Tensor) -> Tensor:
        """[s, b] of labels [b, s]."""
        return _ignoring_negative(labels, self.owner.options["ignore_index"]).transpose(0, 1)

    def _options(self) -> dict[str, Any]:
        return {"reduction": "none", "return_stats": True, **self.owner.options}

    def _result(self, loss: Tensor, stats: TokenStats) -> Tensor:
        self.owner.stats = stats.map(lambda of_tokens: of_tokens.transpose(0, 1))
        return loss.transpose(0, 1).contiguous()


class _LinearMethod(_Method):
    """The same, for what the output layer was given."""

    def __init__(self, module: nn.Module, chunking: dict[str, Any]) -> None:
        super().__init__(module)
        self.chunking = chunking
        # A pipeline stage without one computes no loss.
        has_layer = getattr(module, "output_layer", None) is not None
        self.layer = OutputLayer(module) if has_layer else None

    def uninstall(self) -> None:
        super().uninstall()
        if self.layer is not None:
            self.layer.uninstall()

    def __call__(self, labels: Tensor, logits: Tensor | NoLogits) -> Tensor:
        if not isinstance(logits, NoLogits):
            # Called without labels, multi-token prediction has a loss of labels of its own.
            if self.layer is not None and self.layer.has_labels is False:
                return super().__call__(labels, logits)
            raise TypeError(
                f"{OP}: {type(self.module).__name__} gave its loss other logits than those of its "
                "output layer in a forward with labels; take use_gated_ce"
            )
        group = _group_of(self.module)
        hidden, reduces = logits.whole_sequence(group)
        loss, stats = eaft_ext.vocab_parallel_linear_gated_ce(
            hidden,
            logits.weight,
            self._targets(labels),
            logits.layer.bias,
            group=group,
            reduce_hidden_gradient=reduces,
            **self.chunking,
            **self._options(),
        )
        return self._result(loss, stats)


def _ignoring_negative(labels: Tensor, ignore_index: int) -> Tensor:
    """Some data sets label with -1 what the loss mask removes."""
    return labels.masked_fill(labels < 0, ignore_index)


def _has_loss(module: nn.Module) -> bool:
    """Of its own: some wrappers pass on the attributes of what they wrap."""
    return hasattr(type(module), _METHOD)


def _check_model(op: str, module: nn.Module, vocab_size: int | None) -> None:
    if getattr(module, "fuse_linear_cross_entropy", False):
        raise ValueError(
            f"{op}: {type(module).__name__} computes its loss without logits; it needs "
            "another cross_entropy_fusion_impl than 'linear', or cross_entropy_loss_fusion=False"
        )
    if vocab_size is None:
        return
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"{op}: vocab_size must be an int, got {vocab_size!r}")
    columns = getattr(module, "vocab_size", vocab_size)
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"{op}: vocab_size must be from 1 to the model's {columns}, got {vocab_size}"
        )


def _megatron_group() -> ProcessGroup:
    from megatron.core import parallel_state

    group: ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def _group_of(module: nn.Module) -> ProcessGroup:
    """The processes that share the vocabulary of a model."""
    group: ProcessGroup | None = getattr(getattr(module, "pg_collection", None), "tp", None)
    return group or getattr(module, "tp_group", None) or _megatron_group()


def _check_not_gathered(module: nn.Module, logits: Tensor, group: ProcessGroup) -> None:
    """Raise for whole rows at every call, on any device and for any labels.

    The function that they are given to knows no width of the vocabulary, and must compare values.
    """
    if group.size() > 1 and logits.size(-1) == getattr(module, "vocab_size", None):
        raise ValueError(
            f"use_gated_ce: got logits of all {logits.size(-1)} words, gathered from the "
            f"{group.size()} tensor parallel ranks; build the model with parallel_output=True"
        )


def _entries(
    stats: TokenStats, loss_mask: Tensor | None, others: dict[str, Any]
) -> dict[str, Tensor]:
    """What :meth:`GatedLoss.report` adds to ``others``."""
    weight = stats.valid.float()
    if loss_mask is not None:
        weight = weight * loss_mask.reshape(weight.shape)
    num_tokens = weight.sum()
    pairs = not others or any(
        isinstance(other, Tensor) and other.numel() == 2 for other in others.values()
    )
    divisor = num_tokens.masked_fill(num_tokens == 0, 1)
    entries = {}
    for name in ("gate", "entropy", "nll"):
        # Not the product alone: what the mask excludes may be NaN.
        total = torch.where(weight == 0, 0.0, weight * getattr(stats, name)).sum()
        entries[f"eaft {name}"] = torch.stack([total, num_tokens]) if pairs else total / divisor
    return entries
