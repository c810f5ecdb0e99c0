"""Tokens in chunks: as many as their logits may be held of, and the products over all chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eaft_ext._registration import stats_dtype

MiB = 2**20

# Every chunk reads and writes the weight's gradient once, which takes as long as the products of
# some hundred tokens on a GPU and of some ten on a CPU: chunks shall be several times as long.
MAX_CHUNK_BYTES = {"cpu": 64 * MiB}
MAX_CHUNK_BYTES_ELSEWHERE = 640 * MiB
# Longer ones save no time, and shorter ones no memory to speak of beside the weight's gradient.
MAX_CHUNK_TOKENS = 4096
MIN_CHUNK_TOKENS = 128
# Products are computed in tiles, and are slower if one is cut off.
TILE = 64
# Elements, in the 16 bytes that kernels and products load at once; of 16 bits each.
VECTOR = 8
# Float32 sums that are small beside a chunk are no reason to round after each one.
SMALL_SUM_SHARE = 8
# What a float32 copy of some columns takes, at most, and as a share of the chunk.
SLICE_BYTES = 16 * MiB
SLICE_SHARE = 10


def max_chunk_bytes(device: torch.device) -> int:
    """How much memory the logits of a chunk may take."""
    return MAX_CHUNK_BYTES.get(device.type, MAX_CHUNK_BYTES_ELSEWHERE)


def default_chunk_size(num_tokens: int, row_bytes: int, device: torch.device) -> int:
    """Tokens in a chunk: all chunks about as long, and none longer than the limits allow.

    ``row_bytes`` is the size of a token's logits.
    """
    affordable = max_chunk_bytes(device) // max(1, row_bytes)
    limit = min(max(affordable, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)
    limit -= limit % TILE
    if num_tokens <= limit:
        return max(1, num_tokens)
    num_chunks = -(-num_tokens // limit)
    even = -(-num_tokens // num_chunks)
    return min(limit, -(-even // TILE) * TILE)


Where = slice | Tensor


def put(target: Tensor, where: Where, part: Tensor) -> None:
    """``target[where] = part``, for rows that are a slice or indices."""
    if isinstance(where, slice):
        target[where] = part
    else:
        target.index_copy_(0, where, part)


class Chunk(NamedTuple):
    """Some of the tokens: ``where`` they are, as a slice or as indices."""

    where: Where
    size: int


@dataclass(frozen=True)
class Tokens:
    """The tokens that have a part: ``kept`` are their indices, None if that is all of them.

    There are ``count``, and at most ``size`` of them in a chunk.
    """

    kept: Tensor | None
    count: int
    size: int

    def chunk(self, start: int, stop: int) -> Chunk:
        """Those from ``start`` to ``stop``."""
        where = slice(start, stop) if self.kept is None else self.kept[start:stop]
        return Chunk(where, stop - start)

    def chunks(self) -> Iterator[Chunk]:
        """All of them."""
        for start in range(0, self.count, self.size):
            yield self.chunk(start, min(start + self.size, self.count))


def tokens_of(valid: Tensor, row_bytes: int, chunk_size: int | None) -> Tokens:
    """The tokens that are ``valid``, (T), and how long their chunks are.

    To know how many there are takes a synchronisation. While a CUDA graph is captured there can be
    none: then all tokens have a part, and the kernels skip those that are not valid.
    """
    num_tokens = valid.numel()
    capturing = valid.is_cuda and torch.cuda.is_current_stream_capturing()
    kept = None if capturing else valid.nonzero().squeeze(1)
    if kept is not None and len(kept) == num_tokens:
        kept = None
    count = num_tokens if kept is None else len(kept)
    size = chunk_size or default_chunk_size(count, row_bytes, valid.device)
    return Tokens(kept, count, max(1, min(size, count)))


def sum_dtype(
    shape: torch.Size, dtype: torch.dtype, in_float32: bool | None, device: torch.device
) -> torch.dtype:
    """In what a gradient of that shape and dtype is added up over chunks."""
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if in_float32 is None:
        in_float32 = 4 * shape.numel() <= max_chunk_bytes(device) // SMALL_SUM_SHARE
    return torch.float32 if in_float32 else dtype


def _slices(gradient: Tensor, column_size: int) -> Iterator[slice]:
    """The columns of a chunk's gradient, some at a time, for float32 copies of that column size."""
    affordable = min(SLICE_BYTES, gradient.nbytes // SLICE_SHARE)
    width = affordable // (4 * max(1, column_size))
    # Each slice begins at an aligned address, and if it is not short, is a number of tiles.
    width = max(VECTOR, width - width % (TILE if width >= TILE else VECTOR))
    for start in range(0, gradient.size(1), width):
        yield slice(start, min(start + width, gradient.size(1)))


class WeightSum:
    """``sum of gradient.T @ hidden`` over chunks, (V, H)."""

    def __init__(self, weight: Tensor, num_chunks: int, in_float32: bool | None) -> None:
        dtype = weight.dtype
        if num_chunks > 1:
            dtype = sum_dtype(weight.shape, dtype, in_float32, weight.device)
        self._dtype = weight.dtype
        self._is_empty = True
        self._total = torch.empty_like(weight, dtype=dtype)

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Of one chunk: the gradient of its logits (rows, V), and its hidden (rows, H).

        There may be fewer columns than rows of the weight, of which the last are padding then.
        """
        num_words = gradient.size(1)
        total = self._total[:num_words]
        if self._is_empty:
            self._total[num_words:] = 0
        if total.dtype == gradient.dtype:
            # With beta = 0 nothing is read of what is there.
            total.addmm_(gradient.t(), hidden, beta=0 if self._is_empty else 1)
        else:
            self._add_in_float32(gradient, hidden)
        self._is_empty = False

    def _add_in_float32(self, gradient: Tensor, hidden: Tensor) -> None:
        if self._is_empty:
            self._total.zero_()
        on_cuda = gradient.is_cuda
        wide_hidden = hidden if on_cuda else hidden.float()
        for columns in _slices(gradient, max(hidden.shape)):
            total, part = self._total[columns], gradient[:, columns].t()
            if on_cuda:
                total.add_(torch.mm(part, hidden, out_dtype=torch.float32))
            else:
                total.addmm_(part.float(), wide_hidden)

    def result(self) -> Tensor:
        """The sum, in the weight's dtype."""
        if self._is_empty:
            self._total.zero_()
        return self._total.to(self._dtype)


class BiasSum:
    """``sum of gradient`` over all rows of all chunks, (V); float32 or float64 until the end."""

    def __init__(self, bias: Tensor) -> None:
        self._total = torch.zeros_like(bias, dtype=stats_dtype(bias))
        self._dtype = bias.dtype

    def add(self, gradient: Tensor) -> None:
        """Of one chunk: the gradient of its logits (rows, V)."""
        total = self._total
        if gradient.device.type != "cpu":
            total[: gradient.size(1)] += gradient.sum(0, dtype=total.dtype)
            return
        # The CPU's sum makes a copy in float32.
        for columns in _slices(gradient, gradient.size(0)):
            total[columns] += gradient[:, columns].sum(0, dtype=total.dtype)

    def result(self) -> Tensor:
        """The sum, in the bias's dtype."""
        return self._total.to(self._dtype)
