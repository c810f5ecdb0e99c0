"""Fake tensors and autograd for the operators: what torch.compile and backward() need to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from eaft_ext._library import MAX_TOP_K, MIN_TOP_K  # and loads the operators
from eaft_ext.reference import PARTIAL_HEAD

ops = torch.ops.eaft_ext

LABEL_SMOOTHING = 2
"""Its place in what the operators are given of the family."""


def _once(register: Callable[..., Any], key: str) -> Callable[..., Any]:
    """``register``, unless the dispatcher has such a kernel of the operator.

    The dispatcher lives as long as the process, and graphs hold its operators, compiled ones and
    those of autograd: they can neither be defined twice nor be taken away. So a later import, after
    ``del sys.modules["eaft_ext"]`` or by ``importlib.reload``, finds the operators of the first
    one, those in Python as those in C++. Without ``lib=`` torch.library keeps them alive.
    """

    def registered(op: str, *args: Any, **kwargs: Any) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
            return lambda function: function
        return register(op, *args, **kwargs)

    return registered


def define(op: str, schema: str) -> None:
    """Define an operator that is written in Python, unless an earlier import has."""
    if not torch._C._dispatch_has_kernel(op):
        torch.library.define(op, schema)


impl = _once(torch.library.impl, "CompositeExplicitAutograd")
register_fake = _once(torch.library.register_fake, "Meta")
_register_autograd = _once(torch.library.register_autograd, "Autograd")

Operator = Callable[..., Any]

# With these their own sentences begin; torch's, as that there is no memory, do not.
_REFUSALS = ("gated_ce_", "scale_gradient_", "topk", "gate ")


def called(op: Operator, *arguments: Any) -> Any:
    """What an operator returns. What it refuses is a ValueError, with every torch.

    From 2.15 on, torch makes a RuntimeError of whatever the C++ raises behind its stable ABI.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    try:
        return op(*arguments)
    except RuntimeError as error:
        sentence = str(error)
        if not sentence.startswith(_REFUSALS):
            raise
        raise ValueError(sentence) from None


def differentiable(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> Operator:
    """Register the gradient of an operator; return what calls it, with all that it saves from.

    What ``torch.library`` makes of a gradient is Python that the dispatcher calls, also where there
    is nothing to save, and that asks the schema for arguments which may have been left out: on few
    rows it takes longer than the operator. Where nothing but autograd looks on, the same functions
    do without.
    """
    _register_autograd(f"eaft_ext::{name}", backward, setup_context=setup_context)
    op: Operator = getattr(ops, name)

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return called(op, *inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = below_autograd(*inputs)
        assert setup_context is not None, "else it was not called"
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*inputs)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below_autograd(*inputs)
        return called(op, *inputs) if setup_context is None else function.apply(*inputs)

    return call


def stats_dtype(tensor: Tensor) -> torch.dtype:
    """What losses and stats are computed in, for logits or what makes them."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def fake_stats(logits: Tensor, count: int) -> tuple[Tensor, ...]:
    """Fake per-token outputs of a forward, of logits (..., V) or hidden (..., H)."""
    dtype = stats_dtype(logits)
    return tuple(logits.new_empty(logits.shape[:-1], dtype=dtype) for _ in range(count))


def fake_extra(logits: Tensor, num_extra: int) -> Tensor:
    """What such a forward tells of each token besides."""
    return logits.new_empty((num_extra, *logits.shape[:-1]), dtype=stats_dtype(logits))


@register_fake("eaft_ext::gated_ce_forward")
def _(
    logits: Tensor,
    labels: Tensor,
    k: int,
    gate: str,
    gate_parameters: Sequence[float],
    ignore_index: int,
    inplace_backward: bool = False,
    family: Sequence[float] = (),
    num_extra: int = 0,
) -> tuple[Tensor, ...]:
    return (*fake_stats(logits, 6), fake_extra(logits, num_extra))


@register_fake("eaft_ext::gated_ce_backward")
def _(
    weight: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    upstream: Tensor | None = None,
    family: Sequence[float] = (),
    num_words: int | None = None,
) -> Tensor:
    return torch.empty_like(logits)


@register_fake("eaft_ext::gated_ce_backward_")
def _(
    weight: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    upstream: Tensor | None = None,
    family: Sequence[float] = (),
    num_words: int | None = None,
) -> None:
    return None


@register_fake("eaft_ext::gated_ce_partial")
def _(
    logits: Tensor,
    labels: Tensor,
    k: int,
    vocab_start: int,
    vocab_size: int | None,
    ignore_index: int,
    family: Sequence[float] = (),
    tells_entropy: bool = False,
) -> Tensor:
    if k != 0 and not MIN_TOP_K <= k <= MAX_TOP_K:  # else there may be no such size
        bounds = f"from {MIN_TOP_K} to {MAX_TOP_K}, or 0 for all logits"
        raise ValueError(f"gated_ce_partial: k must be {bounds}, got {k}")
    (stat,) = fake_stats(logits, 1)
    smooths = len(family) > 0 and family[LABEL_SMOOTHING] != 0
    size = PARTIAL_HEAD + max(k, 1) + (k == 0 or tells_entropy) + smooths
    return stat.new_empty((*stat.shape, size))


@register_fake("eaft_ext::gated_ce_merge")
def _(
    logits: Tensor,
    labels: Tensor,
    partials: Tensor,
    k: int,
    gate: str,
    gate_parameters: Sequence[float],
    ignore_index: int,
    vocab_start: int,
    vocab_size: int | None,
    inplace_backward: bool = False,
    family: Sequence[float] = (),
    num_words: int | None = None,
    num_extra: int = 0,
) -> tuple[Tensor, ...]:
    return (*fake_stats(logits, 6), fake_extra(logits, num_extra))


@register_fake("eaft_ext::gated_ce_forward_with_grad")
def _(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    k: int,
    gate: str,
    gate_parameters: Sequence[float],
    ignore_index: int,
    family: Sequence[float] = (),
    num_extra: int = 0,
) -> tuple[Tensor, ...]:
    return (*fake_stats(logits, 4), fake_extra(logits, num_extra), torch.empty_like(logits))


@register_fake("eaft_ext::gated_ce_forward_with_grad_")
def _(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    k: int,
    gate: str,
    gate_parameters: Sequence[float],
    ignore_index: int,
    family: Sequence[float] = (),
    num_extra: int = 0,
) -> tuple[Tensor, ...]:
    return (*fake_stats(logits, 4), fake_extra(logits, num_extra))


@register_fake("eaft_ext::scale_gradient_")
def _(gradient: Tensor, factor: Tensor) -> None:
    return None


@register_fake("eaft_ext::topk")
def _(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, _, _, ignore_index, ctx.inplace_backward, ctx.family, _ = inputs
    ctx.num_words = None
    _save(ctx, logits, labels, output, ignore_index, None, None)


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, _, _, _, *shard, ctx.inplace_backward, ctx.family, ctx.num_words, _ = inputs
    _save(ctx, logits, labels, output, *shard)


def _save(
    ctx: Any, logits: Tensor, labels: Tensor, output: tuple[Tensor, ...], *options: Any
) -> None:
    """What the backward takes: ``options`` are ignore_index, vocab_start and vocab_size."""
    _, nll, entropy, gate, row_max, log_sum, extra = output
    # Only the loss has a gradient: gate and entropy are detached by definition.
    ctx.mark_non_differentiable(nll, entropy, gate, row_max, log_sum, extra)
    ctx.save_for_backward(logits, labels, gate, row_max, log_sum)
    ctx.set_materialize_grads(False)
    ctx.options = options


def _gradient(ctx: Any, grad_loss: Tensor | None) -> Tensor | None:
    """The gradient of the logits."""
    if grad_loss is None:
        return None
    logits, labels, gate, row_max, log_sum = ctx.saved_tensors
    arguments = (grad_loss * gate, logits, labels, row_max, log_sum, *ctx.options)
    if ctx.family:
        arguments = (*arguments, grad_loss, ctx.family, ctx.num_words)
    gradient: Tensor
    if not ctx.inplace_backward:
        gradient = gated_ce_backward(*arguments)
        return gradient
    if torch.is_grad_enabled():
        raise RuntimeError(
            "eaft_ext: inplace_backward overwrites the logits, so the graph of the backward cannot "
            "be kept; drop create_graph=True or inplace_backward=True"
        )
    called(ops.gated_ce_backward_, *arguments)
    # A new tensor on the same memory: autograd then keeps it as the gradient without a copy.
    gradient = logits.detach()
    return gradient


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, grad_loss), *(None,) * 8


def _backward_merge(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, grad_loss), *(None,) * 12


gated_ce_forward = differentiable("gated_ce_forward", _backward, _save_forward)
gated_ce_merge = differentiable("gated_ce_merge", _backward_merge, _save_merge)


def _no_double_backward(ctx: Any, *_: Tensor) -> NoReturn:
    raise RuntimeError(
        "eaft_ext: gated_ce has no second derivative; eaft_ext.reference.gated_ce has one"
    )


gated_ce_backward = differentiable("gated_ce_backward", _no_double_backward)


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.vocab_size = inputs[0].shape[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _topk_backward(ctx: Any, grad_values: Tensor, _: None) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    zeros = grad_values.new_zeros((*grad_values.shape[:-1], ctx.vocab_size))
    return zeros.scatter(-1, indices, grad_values), None


topk = differentiable("topk", _topk_backward, _save_topk)
