"""The CUDA kernels, run on the host by the shim in ``cuda_on_host``, on torch CPU tensors.

What runs is their C++, or what nvcc made of it (``ptx_on_host``), as :data:`code` says.

Each function raises RuntimeError with the shim's sentence if a kernel goes wrong, and if it writes
to an input or outside of an output. What it does not write is NaN, or the lowest int64 for an
index; what it reads outside of an input is NaN too. ``seed`` chooses the order of threads and
blocks; 0 is the plain one.

``logits`` is (..., V) and what belongs to its rows is (...); only the last dimension of ``logits``
must be contiguous.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import pytest
import torch
from cuda_on_host import build
from cuda_on_host.build import why_not
from torch import Tensor

__all__ = [
    "MARKS",
    "Stats",
    "backward",
    "forward",
    "forward_with_grad",
    "merge",
    "partial",
    "scale_gradient",
    "topk",
    "why_not",
]

# Of every test of the kernels: each form of them, where they run.
MARKS = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.usefixtures("code"),
]

SOURCE = "kernels.cpp"
MAX_ROW_DIMS = 4  # as kMaxRowDims
ELEMENT_TYPES = [torch.float32, torch.bfloat16, torch.float16]  # as enum class ElementType
GATE_KINDS = [
    "none",
    "entropy",
    "sigmoid",
    "hard",
    "conflict",
    "probability",
    "power",
    "threshold",
    "focal",
]  # as enum class GateKind

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# The address, the bytes, and whether it may be written to, of each tensor.
Memory = Sequence[tuple[int, int, bool]]


class Code(Protocol):
    """What a call runs."""

    def call(self, function: str, memory: Memory, *arguments: object) -> None:
        """Calls a function of exports.h, and raises what it says went wrong.

        ``memory``: what its kernels may touch.
        """


class Source:
    """The C++ of the kernels."""

    def call(self, function: str, memory: Memory, *arguments: object) -> None:
        build.call(SOURCE, function, *arguments)


code: Code = Source()


class Stats(NamedTuple):
    """What a forward gives for each row, float32."""

    loss: Tensor
    nll: Tensor
    entropy: Tensor
    gate: Tensor
    row_max: Tensor
    log_sum: Tensor
    extra: Tensor
    """(num_extra, ...): lse, whether the label is the largest, the entropy of all logits."""


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """From the first element to the last, both included."""
    steps = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    return 0 if 0 in shape else 1 + steps


class Guarded:
    """A poisoned tensor in memory that must stay as it is around it and between its rows.

    Whoever reads there finds NaN.
    """

    GUARD = 1024  # elements before and behind
    PATTERN = 0x7FA5  # a NaN of each type, in 16 bits or repeated

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        strides: Sequence[int] | None = None,
        shift: int = 0,
    ) -> None:
        """``shift``: by how many elements it begins behind a multiple of 64 bytes."""
        strides = torch.empty(shape, device="meta").stride() if strides is None else strides
        start = self.GUARD + shift
        memory = torch.empty(start + _extent(shape, strides) + self.GUARD, dtype=dtype)
        memory.view(torch.int16).fill_(self.PATTERN)
        self.tensor = memory.as_strided(shape, strides, start)
        self._memory = memory.view(_INTEGERS[dtype.itemsize])
        self._outside = torch.ones_like(self._memory, dtype=torch.bool)
        self._outside.as_strided(shape, strides, start).fill_(False)
        self._pattern = self._memory[0].clone()
        self.tensor.fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).min)

    def check(self, name: str) -> None:
        """Raise if there was a write outside."""
        changed = (self._outside & (self._memory != self._pattern)).nonzero()
        if len(changed) > 0:
            place = int(changed[0, 0]) - self.tensor.storage_offset()
            raise RuntimeError(f"{name}: written at element {place}, which is outside")


class Call:
    """A call of an operator: its tensors, guarded, and what is checked of them afterwards."""

    MAX_COPY = 2**25  # elements; a tensor that spans more is itself given to the kernel, unguarded

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self._guarded: dict[str, Guarded] = {}
        self._inputs: dict[str, tuple[Tensor, Tensor]] = {}
        self._memory: dict[str, tuple[Tensor, bool]] = {}  # and whether it may be written to

    def output(
        self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32, shift: int = 0
    ) -> Tensor:
        """A contiguous tensor for the kernel to fill."""
        self._guarded[name] = Guarded(shape, dtype, shift=shift)
        self._memory[name] = (self._guarded[name].tensor, True)
        return self._guarded[name].tensor

    def input_and_output(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of the tensor, with its strides and its alignment, that the kernel may change."""
        self._memory[name] = (tensor, True)
        if _extent(tensor.shape, tensor.stride()) > self.MAX_COPY:
            return tensor
        shift = tensor.data_ptr() % 64 // tensor.element_size()
        self._guarded[name] = Guarded(tensor.shape, tensor.dtype, tensor.stride(), shift)
        self._memory[name] = (self._guarded[name].tensor, True)
        return self._guarded[name].tensor.copy_(tensor)

    def input(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of the tensor, with its strides and its alignment, that must stay as it is."""
        copy = self.input_and_output(name, tensor)
        self._inputs[name] = (copy, tensor)
        self._memory[name] = (copy, False)
        return copy

    def per_row(self, name: str, tensor: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """An input with one number for each row."""
        if tensor.shape != logits.shape[:-1]:
            raise ValueError(f"{name} of {tuple(logits.shape)} is {tuple(tensor.shape)}")
        return self.input(name, tensor.to(dtype).contiguous())

    def stats(self, logits: Tensor, num_extra: int) -> Stats:
        """The outputs of a forward."""
        shape = logits.shape[:-1]
        *names, extra = Stats._fields
        stats = [self.output(name, shape) for name in names]
        return Stats(*stats, self.output(extra, (num_extra, *shape)))

    def run(self, *arguments: object) -> None:
        """Run the kernels, and check that they changed nothing but the outputs."""
        memory = [
            (t.data_ptr(), _extent(t.shape, t.stride()) * t.element_size(), writable)
            for t, writable in self._memory.values()
        ]
        code.call(f"{self.operator}_on_host", memory, *arguments)
        for name, guarded in self._guarded.items():
            guarded.check(f"{self.operator}: {name}")
        for name, (copy, tensor) in self._inputs.items():
            if copy is not tensor and not torch.equal(_bits(copy), _bits(tensor)):
                raise RuntimeError(f"{self.operator}: {name} was written to")


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _layout(matrix: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Where the rows lie, as csrc/tensor_rows.h has it: dimensions without a gap are one."""
    if matrix.stride(-1) != 1 and matrix.size(-1) != 1:
        raise ValueError(f"rows must be contiguous, got strides {matrix.stride()}")
    dims: list[tuple[int, int]] = []
    for size, stride in zip(matrix.shape[:-1], matrix.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > MAX_ROW_DIMS:
        raise ValueError(f"rows of {len(dims)} dimensions: strides {matrix.stride()}")
    filled = dims + [(0, 0)] * (MAX_ROW_DIMS - len(dims))
    numbers = [len(dims), *(size for size, _ in filled), *(stride for _, stride in filled)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _type(logits: Tensor) -> int:
    return ELEMENT_TYPES.index(logits.dtype)


def _matrix(logits: Tensor) -> list[object]:
    """logits, their layout, num_rows, vocab_size."""
    num_rows, vocab_size = logits.shape[:-1].numel(), logits.size(-1)
    return [_pointer(logits), _layout(logits), ctypes.c_int64(num_rows), ctypes.c_int64(vocab_size)]


def _gate(name: str, parameters: Sequence[float]) -> list[object]:
    """kind, first, second, normalizer, as csrc/gate_from_name.h has them."""
    first, second = [*parameters, 0.0, 0.0][:2]
    normalizer = 0.0  # ln k
    if name == "entropy" and len(parameters) == 2:
        second, normalizer = 0.0, parameters[1]
    return [GATE_KINDS.index(name), *map(ctypes.c_double, (first, second, normalizer))]


def _partial_size(k: int, family: Sequence[float], tells_entropy: bool) -> int:
    """As csrc/core/shard_partial.h has it."""
    smooths = len(family) > 0 and family[2] != 0
    return 3 + max(k, 1) + (k == 0 or tells_entropy) + smooths


def _family(family: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    """softcap (0: none), logit_scale, label_smoothing and z_loss, as the operators take them."""
    return (ctypes.c_double * 4)(*(family or (0.0, 1.0, 0.0, 0.0)))


def forward(
    logits: Tensor,
    labels: Tensor,
    k: int,
    gate: str,
    gate_parameters: Sequence[float],
    ignore_index: int,
    *,
    family: Sequence[float] = (),
    num_extra: int = 0,
    num_spans: int = 1,
    seed: int = 0,
) -> Stats:
    """``gated_ce_forward``, each row split into ``num_spans``."""
    call = Call("forward")
    k = min(k, logits.size(-1))
    source = call.input("logits", logits)
    labels = call.per_row("labels", labels, logits, torch.int64)
    stats = call.stats(logits, num_extra)
    call.run(
        _type(logits),
        *_matrix(source),
        _pointer(labels),
        ctypes.c_int64(ignore_index),
        k,
        *_gate(gate, gate_parameters),
        _family(family),
        *map(_pointer, stats),
        num_extra,
        num_spans,
        ctypes.c_uint64(seed),
    )
    return stats


def partial(
    logits: Tensor,
    labels: Tensor,
    k: int,
    vocab_start: int,
    ignore_index: int,
    *,
    family: Sequence[float] = (),
    tells_entropy: bool = False,
    num_spans: int = 1,
    seed: int = 0,
) -> Tensor:
    """``gated_ce_partial``, each row split into ``num_spans``: (..., k + 3), or more."""
    call = Call("partial")
    source = call.input("logits", logits)
    labels = call.per_row("labels", labels, logits, torch.int64)
    size = _partial_size(k, family, tells_entropy)
    partials = call.output("partials", (*logits.shape[:-1], size))
    call.run(
        _type(logits),
        *_matrix(source),
        _pointer(labels),
        ctypes.c_int64(ignore_index),
        k,
        _family(family),
        int(tells_entropy),
        ctypes.c_int64(vocab_start),
        _pointer(partials),
        num_spans,
        ctypes.c_uint64(seed),
    )
    return partials


def merge(
    partials: Tensor,
    labels: Tensor,
    k: int,
    gate: str,
    gate_parameters: Sequence[float],
    ignore_index: int,
    *,
    family: Sequence[float] = (),
    num_words: int = 1,
    num_extra: int = 0,
    seed: int = 0,
) -> Stats:
    """``gated_ce_merge`` of partials (num_shards, ..., k + 3), or more."""
    if partials.size(-1) != _partial_size(k, family, num_extra == 3):
        raise ValueError(f"partials of k = {k} are {tuple(partials.shape)}")
    call = Call("merge")
    source = call.input("partials", partials)
    labels = call.per_row("labels", labels, partials[0], torch.int64)
    stats = call.stats(partials[0], num_extra)
    call.run(
        _pointer(source),
        partials.size(0),
        ctypes.c_int64(labels.numel()),
        _pointer(labels),
        ctypes.c_int64(ignore_index),
        k,
        *_gate(gate, gate_parameters),
        _family(family),
        ctypes.c_int64(num_words),
        *map(_pointer, stats),
        num_extra,
        ctypes.c_uint64(seed),
    )
    return stats


def backward(
    weight: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    *,
    family: Sequence[float] = (),
    upstream: Tensor | None = None,
    num_words: int | None = None,
    vocab_start: int = 0,
    inplace: bool = False,
    shift: int = 0,
    seed: int = 0,
) -> Tensor:
    """``gated_ce_backward``. In place, it is a copy of the logits that is overwritten.

    Else the gradient is contiguous, and begins ``shift`` elements behind a multiple of 64 bytes.
    """
    call = Call("backward")
    source, gradient = _logits_and_gradient(call, logits, inplace, shift)
    labels = call.per_row("labels", labels, logits, torch.int64)
    weight = call.per_row("weight", weight, logits, torch.float32)
    if upstream is not None:
        upstream = call.per_row("upstream", upstream, logits, torch.float32)
    row_max = call.per_row("row_max", row_max, logits, torch.float32)
    log_sum = call.per_row("log_sum", log_sum, logits, torch.float32)
    call.run(
        _type(logits),
        *_matrix(source),
        ctypes.c_int64(vocab_start),
        _pointer(gradient),
        _layout(gradient),
        _pointer(labels),
        ctypes.c_int64(ignore_index),
        _family(family),
        ctypes.c_int64(num_words or logits.size(-1)),
        _pointer(weight),
        None if upstream is None else _pointer(upstream),
        _pointer(row_max),
        _pointer(log_sum),
        ctypes.c_uint64(seed),
    )
    return gradient


def _logits_and_gradient(
    call: Call, logits: Tensor, inplace: bool, shift: int
) -> tuple[Tensor, Tensor]:
    if inplace:
        both = call.input_and_output("gradient", logits)
        return both, both
    return call.input("logits", logits), call.output(
        "gradient", logits.shape, logits.dtype, shift=shift
    )


def forward_with_grad(
    upstream: Tensor,
    logits: Tensor,
    labels: Tensor,
    k: int,
    gate: str,
    gate_parameters: Sequence[float],
    ignore_index: int,
    *,
    family: Sequence[float] = (),
    num_extra: int = 0,
    cluster_size: int = 0,
    inplace: bool = False,
    shift: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``gated_ce_forward_with_grad``: loss, nll, entropy, gate, extra, gradient.

    Each row by a cluster of that many blocks; 0 is the kernel without clusters. ``inplace`` and
    ``shift``: as for :func:`backward`.
    """
    call = Call("forward_with_grad")
    k = min(k, logits.size(-1))
    source, gradient = _logits_and_gradient(call, logits, inplace, shift)
    labels = call.per_row("labels", labels, logits, torch.int64)
    upstream = call.per_row("upstream", upstream, logits, torch.float32)
    stats = call.stats(logits, num_extra)
    call.run(
        _type(logits),
        _pointer(upstream),
        *_matrix(source),
        _pointer(gradient),
        _layout(gradient),
        _pointer(labels),
        ctypes.c_int64(ignore_index),
        k,
        *_gate(gate, gate_parameters),
        _family(family),
        *map(_pointer, stats),
        num_extra,
        cluster_size,
        ctypes.c_uint64(seed),
    )
    return stats.loss, stats.nll, stats.entropy, stats.gate, stats.extra, gradient


def scale_gradient(gradient: Tensor, factor: float, *, seed: int = 0) -> Tensor:
    """``scale_gradient_`` of a copy of the gradient."""
    call = Call("scale_gradient")
    result = call.input_and_output("gradient", gradient)
    number = call.input("factor", torch.tensor([factor]))
    call.run(_type(gradient), *_matrix(result), _pointer(number), ctypes.c_uint64(seed))
    return result


def topk(logits: Tensor, k: int, *, num_spans: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``topk``, each row split into ``num_spans``: values and indices (..., k)."""
    call = Call("topk")
    source = call.input("logits", logits)
    values = call.output("values", (*logits.shape[:-1], k), logits.dtype)
    indices = call.output("indices", (*logits.shape[:-1], k), torch.int64)
    call.run(
        _type(logits),
        *_matrix(source),
        k,
        _pointer(values),
        _pointer(indices),
        num_spans,
        ctypes.c_uint64(seed),
    )
    return values, indices
