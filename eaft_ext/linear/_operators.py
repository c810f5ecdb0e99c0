"""The operators of the linear loss: chunks of tokens, of which only one has its logits in memory.

They are written in PyTorch, on the operators of ``csrc/ops.cpp``, for every device. Shapes: hidden
(..., H), weight (V, H), bias (V), labels and all stats (...). With ``group``, the name of a process
group, weight and bias are the rows of a shard of the vocabulary, and each chunk costs one
all-gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from eaft_ext._checks import check_label_values
from eaft_ext._options import STATS_OF_EXTRA, TokenLoss, from_family
from eaft_ext._registration import (
    define,
    differentiable,
    fake_extra,
    fake_stats,
    impl,
    register_fake,
    stats_dtype,
)
from eaft_ext._scalar_loss import scaled
from eaft_ext.gates import BUILT_IN, NoGate
from eaft_ext.linear._chunks import VECTOR, BiasSum, Chunk, WeightSum, put, tokens_of
from eaft_ext.linear._dropped import Weights, dropped, kept_rows, moved_up
from eaft_ext.linear._pending import Pending
from eaft_ext.linear._rows import Rows, RowsOfBackward
from eaft_ext.parallel import _agreement
from eaft_ext.parallel._group import all_gather, all_reduce
from eaft_ext.parallel._shard import VocabShard, num_words
from eaft_ext.reference import weigh

# by_kernel: not in plain PyTorch. accumulate_in_float32: the weight's gradient; None: if it is
# small. drop_below: see _dropped.py. total: words of all shards. reduce_hidden: add up the hidden's
# gradients of the group.
_OPTIONS = (
    "int k, str gate, float[] gate_parameters, int ignore_index, float[] family, int num_extra, "
    "bool by_kernel, SymInt? chunk_size, bool? accumulate_in_float32, float drop_below, "
    "SymInt vocab_start, SymInt? vocab_size, SymInt total, str? group, int group_size, "
    "bool reduce_hidden"
)
_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
# -> loss, nll, entropy, gate, row_max, log_sum, extra
define(
    "eaft_ext::linear_gated_ce_forward",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# -> the gradients of hidden, weight and bias for those that are wanted, else tensors of no elements
define(
    "eaft_ext::linear_gated_ce_backward",
    "(Tensor upstream, Tensor nll, Tensor gate_weight, Tensor row_max, Tensor log_sum, "
    f"bool[] wanted, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
# -> sum(token_weight * loss) / divisor, nll, entropy, gate, extra, the tokens that have no part in
# the gradients, and the gradients of the first, as above
define(
    "eaft_ext::linear_gated_ce_forward_with_grad",
    f"({_INPUTS}, Tensor divisor, Tensor? token_weight, bool[] wanted, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class _Options(NamedTuple):
    """As the operators are given them, one after the other."""

    k: int
    gate: str
    gate_parameters: Sequence[float]
    ignore_index: int
    family: Sequence[float]
    num_extra: int
    by_kernel: bool
    chunk_size: int | None
    accumulate_in_float32: bool | None
    drop_below: float
    vocab_start: int
    vocab_size: int | None
    total: int
    group: str | None
    group_size: int
    reduce_hidden: bool


class _Exchange:
    """From this shard's partials of a chunk to those of all shards.

    It does not know the call, which knows it: in a cycle the buffer of the logits would stay until
    Python looks for those.
    """

    def __init__(self, labels: Tensor, shape: torch.Size, options: _Options) -> None:
        self.chunk: Chunk | None = None
        self._labels, self._shape, self._options = labels, shape, options

    def __call__(self, partial: Tensor) -> Tensor:
        given = self._options
        assert given.group is not None and self.chunk is not None, "a chunk is being computed"
        partials = all_gather(partial, given.group, given.group_size)
        labels = self._labels[self.chunk.where]
        op = "vocab_parallel_linear_gated_ce"
        _agreement.check_labels(op, partials, labels, given.ignore_index, self._position)
        return partials

    def _position(self, row: int) -> list[int]:
        """Where in the labels a row of the chunk is."""
        assert self.chunk is not None, "a chunk is being computed"
        where = self.chunk.where
        token = where.start + row if isinstance(where, slice) else int(where[row])
        place = torch.tensor(token, device="cpu")
        return [int(i) for i in torch.unravel_index(place, self._shape)]


class _Call:
    """What the operators have in common: the chunks, and how their logits become losses.

    The chunks are of tokens that are not ignored; in a backward, of those with a gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        *options: Any,
        of_backward: Weights | None = None,
    ) -> None:
        self.options = given = _Options(*options)
        self.shape = labels.shape
        self.hidden = hidden.reshape(-1, hidden.size(-1))
        # Rows of padding take no part.
        words = num_words(
            weight.size(0), VocabShard(given.vocab_start, given.vocab_size, given.total)
        )
        self.weight = weight[:words]
        self.bias = None if bias is None else bias[:words]
        self.labels = labels.reshape(-1)
        self._exchange = None if given.group is None else _Exchange(self.labels, self.shape, given)
        gate = next(known for known in BUILT_IN if known.name == given.gate)
        self.rows = Rows(
            TokenLoss(
                given.k or None,
                gate(*given.gate_parameters),
                given.ignore_index,
                *from_family(given.family),
                STATS_OF_EXTRA[given.num_extra],
            ),
            given.by_kernel,
            given.vocab_start,
            given.total,
            self._exchange,
        )
        if given.group is None:
            # The kernels would name a position in the chunk.
            on_cpu = labels.device.type == "cpu"
            check_label_values("linear_gated_ce", labels, words, given.ignore_index, always=on_cpu)
        valid = self.labels != given.ignore_index
        if of_backward is not None:
            muted = of_backward._replace(upstream=torch.where(valid, of_backward.upstream, 0))
            valid &= ~dropped(self.rows.of_token, muted, given.drop_below)
        # The same in all processes: they shall have as many chunks.
        row_bytes = -(-given.total // given.group_size) * hidden.element_size()
        self.tokens = tokens_of(valid, row_bytes, given.chunk_size)
        # Rows begin where vectors can be loaded, whatever V is.
        width = -(-words // VECTOR) * VECTOR
        buffer = hidden.new_empty(min(self.tokens.size, self.tokens.count), width)
        if hidden.device.type == "cpu" and hidden.element_size() == 2:
            # Some CPUs' products in bfloat16 read beyond a row, and multiply what is there by 0.
            buffer[:, words:] = 0
        self.buffer = buffer[:, :words]

    def logits(self, chunk: Chunk, first: int = 0) -> tuple[Tensor, Tensor]:
        """Hidden (rows, H) of a chunk, and its logits (rows, V), in the buffer from a row on."""
        if self._exchange is not None:
            self._exchange.chunk = chunk
        hidden = self.hidden[chunk.where]
        logits = self.buffer[first : first + chunk.size]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
        return hidden, logits

    def without_dropped(
        self, chunk: Chunk, hidden: Tensor, gradient: Tensor, weights: Weights
    ) -> tuple[Chunk, Tensor]:
        """The chunk and its hidden without dropped rows; the others' gradients move up in place."""
        of_token, drop_below = self.rows.of_token, self.options.drop_below
        # Tokens of weight 0 are ignored; the gates alone can make others.
        all_count = of_token.z_loss != 0 or isinstance(of_token.gate, NoGate)
        capturing = gradient.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or (all_count and drop_below == 0):
            return chunk, hidden
        kept = kept_rows(dropped(of_token, weights, drop_below))
        if kept is None:
            return chunk, hidden
        order = moved_up(gradient, kept)
        where = chunk.where
        where = where.start + order if isinstance(where, slice) else where[order]
        return Chunk(where, len(order)), hidden[order]

    def stats(self, count: int) -> list[Tensor]:
        """Zeros for every token, (T), and last those for what is told besides, (num_extra, T)."""
        dtype, tokens = stats_dtype(self.hidden), len(self.labels)
        new = [self.hidden.new_zeros(tokens, dtype=dtype) for _ in range(count)]
        return [*new, self.hidden.new_zeros(self.options.num_extra, tokens, dtype=dtype)]

    def put(self, stats: Sequence[Tensor], chunk: Chunk, of_chunk: Sequence[Tensor]) -> None:
        """Write those of a chunk, (rows) and (num_extra, rows), to their places."""
        *stats, extra = stats
        *of_chunk, extra_of_chunk = of_chunk
        stats, of_chunk = [*stats, *extra.unbind()], [*of_chunk, *extra_of_chunk.unbind()]
        for stat, part in zip(stats, of_chunk, strict=True):
            put(stat, chunk.where, part)

    def shaped(self, stats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Like the labels, behind another dimension where there is one."""
        return tuple(stat.view((*stat.shape[:-1], *self.shape)) for stat in stats)


class _Gradients:
    """The gradients of hidden, weight and bias, from those of one chunk's logits after another."""

    def __init__(
        self, call: _Call, wanted: Sequence[bool], weight: Tensor, bias: Tensor | None
    ) -> None:
        wants_hidden, wants_weight, wants_bias = wanted
        self._call = call
        self._hidden = call.hidden.new_zeros(call.hidden.shape) if wants_hidden else None
        self._weight = None
        if wants_weight:
            num_chunks = -(-call.tokens.count // call.tokens.size)
            self._weight = WeightSum(weight, num_chunks, call.options.accumulate_in_float32)
        self._bias = BiasSum(bias) if wants_bias and bias is not None else None

    def add(self, chunk: Chunk, hidden: Tensor, gradient: Tensor) -> None:
        """``gradient`` is that of the chunk's logits; ``hidden`` is not needed afterwards."""
        if self._weight is not None:
            self._weight.add(gradient, hidden)
        if self._bias is not None:
            self._bias.add(gradient)
        if self._hidden is None:
            return
        if isinstance(chunk.where, slice):
            torch.mm(gradient, self._call.weight, out=self._hidden[chunk.where])
        else:
            # In the memory of the copy that was taken of these rows.
            torch.mm(gradient, self._call.weight, out=hidden)
            put(self._hidden, chunk.where, hidden)

    def results(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Each as its tensor is; ``shape`` is that of hidden."""
        call, empty = self._call, self._call.hidden.new_empty
        hidden = empty(0)
        if self._hidden is not None:
            hidden = self._hidden.view(shape)
            if call.options.group is not None and call.options.reduce_hidden:
                hidden = all_reduce(hidden, call.options.group)
        return (
            hidden,
            empty(0) if self._weight is None else self._weight.result(),
            empty(0) if self._bias is None else self._bias.result(),
        )


def _autocast_off(tensor: Tensor) -> AbstractContextManager[Any]:
    """Operands have the dtype that they are to be multiplied in."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


@impl("eaft_ext::linear_gated_ce_forward", "CompositeExplicitAutograd")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    with _autocast_off(hidden):
        call = _Call(hidden, weight, bias, labels, *options)
        stats = call.stats(6)
        for chunk in call.tokens.chunks():
            _, logits = call.logits(chunk)
            of_chunk = call.rows.losses(logits, call.labels[chunk.where])
            call.put(stats, chunk, of_chunk)
        return call.shaped(stats)


@impl("eaft_ext::linear_gated_ce_backward", "CompositeExplicitAutograd")
def _(
    upstream: Tensor,
    nll: Tensor,
    gate_weight: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    wanted: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    with _autocast_off(hidden):
        stats = [stat.reshape(-1) for stat in (upstream, gate_weight, row_max, log_sum)]
        weights = Weights(stats[0], stats[1], nll.reshape(-1))
        call = _Call(hidden, weight, bias, labels, *options, of_backward=weights)
        gradients = _Gradients(call, wanted, weight, bias)
        for chunk in call.tokens.chunks():
            rows, logits = call.logits(chunk)
            given = RowsOfBackward(*(stat[chunk.where] for stat in stats))
            call.rows.gradient_(given, logits, call.labels[chunk.where])
            gradients.add(chunk, rows, logits)
        return gradients.results(hidden.shape)


@impl("eaft_ext::linear_gated_ce_forward_with_grad", "CompositeExplicitAutograd")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    divisor: Tensor,
    token_weight: Tensor | None,
    wanted: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    with _autocast_off(hidden):
        call = _Call(hidden, weight, bias, labels, *options)
        gradients = _Gradients(call, wanted, weight, bias)
        loss, *stats = call.stats(4)
        gone = torch.zeros_like(call.labels, dtype=torch.bool)
        upstream = divisor.reciprocal().expand(call.labels.shape)
        if token_weight is not None:
            upstream = weigh(upstream, token_weight.reshape(-1).to(upstream.dtype))
        pending = Pending(call.tokens, call.buffer, gradients.add)
        while (chunk := pending.next_chunk()) is not None:
            rows, logits = call.logits(chunk, pending.count)
            given = upstream[chunk.where]
            of_chunk = call.rows.losses_and_gradient_(given, logits, call.labels[chunk.where])
            call.put((loss, *stats), chunk, of_chunk)
            weights = Weights(given, gate=of_chunk[3], nll=of_chunk[1])
            left, rows = call.without_dropped(chunk, rows, logits, weights)
            if left is not chunk:
                gone[chunk.where] = True
                gone[left.where] = False
            pending.add(left, rows)
        if token_weight is not None:
            loss = weigh(loss, token_weight.reshape(-1).to(loss.dtype))
        told = (*stats, gone)
        return loss.sum() / divisor, *call.shaped(told), *gradients.results(hidden.shape)


def _fake_gradients(
    wanted: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    return tuple(
        hidden.new_empty(0)
        if tensor is None or not is_wanted
        else hidden.new_empty(tensor.shape)
        if tensor is hidden
        else torch.empty_like(tensor)
        for is_wanted, tensor in zip(wanted, (hidden, weight, bias), strict=True)
    )


@register_fake("eaft_ext::linear_gated_ce_forward")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return (*fake_stats(hidden, 6), fake_extra(hidden, _Options(*options).num_extra))


@register_fake("eaft_ext::linear_gated_ce_backward")
def _(
    upstream: Tensor,
    nll: Tensor,
    gate_weight: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    wanted: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    return _fake_gradients(wanted, hidden, weight, bias)


@register_fake("eaft_ext::linear_gated_ce_forward_with_grad")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    divisor: Tensor,
    token_weight: Tensor | None,
    wanted: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    total, *stats = fake_stats(hidden, 4)
    gone = torch.empty_like(stats[0], dtype=torch.bool)
    stats += [fake_extra(hidden, _Options(*options).num_extra), gone]
    return total.new_empty(()), *stats, *_fake_gradients(wanted, hidden, weight, bias)


_NO_DOUBLE_BACKWARD = (
    "eaft_ext: linear_gated_ce has no second derivative; eaft_ext.reference.linear_gated_ce has one"
)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *ctx.options = inputs
    _, nll, entropy, gate, row_max, log_sum, extra = output
    ctx.mark_non_differentiable(nll, entropy, gate, row_max, log_sum, extra)
    ctx.save_for_backward(hidden, weight, bias, labels, nll, gate, row_max, log_sum)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (1 + len(ctx.options))
    if grad_loss is None:
        return None, None, None, *rest
    hidden, weight, bias, labels, nll, gate, row_max, log_sum = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    stats = (grad_loss, nll, gate, row_max, log_sum)
    gradients = linear_gated_ce_backward(*stats, wanted, hidden, weight, bias, labels, *ctx.options)
    found = [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]
    return *found, *rest


def _save_forward_with_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_inputs, ctx.wanted = len(inputs), inputs[6]
    _, *others = output
    ctx.mark_non_differentiable(*others)
    gradients = others[5:]
    ctx.save_for_backward(
        *(g for g, is_wanted in zip(gradients, ctx.wanted, strict=True) if is_wanted)
    )
    ctx.set_materialize_grads(False)


def _backward_with_grad(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Any, ...]:
    rest = (None,) * (ctx.num_inputs - 3)
    if grad_total is None:
        return None, None, None, *rest
    gradients = iter(scaled(ctx.saved_tensors, grad_total, _NO_DOUBLE_BACKWARD))
    return *(next(gradients) if is_wanted else None for is_wanted in ctx.wanted), *rest


def _no_double_backward(ctx: Any, *_: Tensor) -> NoReturn:
    raise RuntimeError(_NO_DOUBLE_BACKWARD)


linear_gated_ce_forward = differentiable("linear_gated_ce_forward", _backward, _save_forward)
linear_gated_ce_forward_with_grad = differentiable(
    "linear_gated_ce_forward_with_grad", _backward_with_grad, _save_forward_with_grad
)
linear_gated_ce_backward = differentiable("linear_gated_ce_backward", _no_double_backward)
