"""Logits that do not lie in memory as a plain matrix, in a buffer that is NaN everywhere else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from inputs import sparse_elements
from torch import Tensor

V = 4115
"""Two blocks of the CPU kernels; rows start at odd addresses."""

# Each gives a buffer's shape and the view of it that is the logits.
Layout = tuple[tuple[int, ...], Callable[[Tensor], Tensor]]

READ_IN_PLACE: dict[str, Layout] = {
    "matrix": ((6, V), lambda buffer: buffer),
    "one_row": ((V,), lambda buffer: buffer),
    "last_token_cut_off": ((3, 4, V), lambda buffer: buffer[:, :-1]),
    "first_token_cut_off": ((3, 4, V), lambda buffer: buffer[:, 1:]),
    "sequence_first": ((4, 3, V), lambda buffer: buffer.transpose(0, 1)),
    "padded_vocabulary": ((10, V + 13), lambda buffer: buffer[:, :V]),
    "middle_of_the_vocabulary": ((5, V + 13), lambda buffer: buffer[:, 4:-9]),
    "every_other_row": ((17, V), lambda buffer: buffer[1::2]),
    "misaligned": ((6 * V + 1,), lambda buffer: buffer[1:].view(6, V)),
    "misaligned_and_padded": (
        (5 * (V + 3) + 1,),
        lambda buffer: buffer.as_strided((5, V), (V + 3, 1), 1),
    ),
    "five_dimensions": ((2, 2, 2, 3, V), lambda buffer: buffer[..., :-1, :].permute(1, 3, 0, 2, 4)),
    "six_that_are_two": ((2, 1, 2, 3, 1, V + 1), lambda buffer: buffer[..., :V]),
}

# Read from a contiguous copy: there is no way to write the gradient over these.
COPIED: dict[str, Layout] = {
    "vocabulary_first": ((V, 6), lambda buffer: buffer.t()),
    "vocabulary_before_tokens": ((2, V, 3), lambda buffer: buffer.transpose(1, 2)),
    "every_other_logit": ((6, 2 * V), lambda buffer: buffer[:, ::2]),
    "last_of_a_pair": ((6, V, 2), lambda buffer: buffer[..., 1]),
    "six_dimensions": (
        (2, 2, 2, 2, 2, V + 1),
        lambda buffer: buffer.permute(4, 3, 2, 1, 0, 5)[..., :V],
    ),
}

OVERLAPPING: dict[str, Layout] = {
    "expanded_rows": ((1, V), lambda buffer: buffer.expand(6, V)),
    "expanded_batch": ((3, V), lambda buffer: buffer.unsqueeze(0).expand(2, 3, V)),
    "sliding_window": ((V + 5,), lambda buffer: buffer.unfold(0, V, 1)),
    "sliding_by_two": ((V + 10,), lambda buffer: buffer.unfold(0, V, 2)),
}

ALL = READ_IN_PLACE | COPIED | OVERLAPPING


def build(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A buffer of NaN, the logits that are a view of it, and labels."""
    shape, view = ALL[name]
    generator = torch.Generator().manual_seed(0)
    buffer = torch.full(shape, math.nan, dtype=dtype, device=device)
    logits = view(buffer)
    values = 3 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    if name in OVERLAPPING:
        buffer.copy_(values.flatten()[: buffer.numel()].view(shape))
    else:
        logits.copy_(values)
    labels = torch.randint(V, logits.shape[:-1], generator=generator)
    labels.view(-1)[1::4] = -100
    return buffer, logits, labels.to(device)


def far_rows(dims: int, limit: int, vocab_size: int) -> Tensor:
    """(3, V) or (2, 3, V): rows that far apart, in the fastest dimension. All of one alignment."""
    memory = sparse_elements(2 * limit + 2 * vocab_size + 16)
    next_block = (vocab_size + 15) // 8 * 8
    shape, strides = ((2, 3, vocab_size), (next_block, limit, 1))
    return memory.as_strided(shape[2 - dims :], strides[2 - dims :])


each_far_layout = pytest.mark.parametrize("dims", [1, 2], ids=["rows", "blocks_of_rows"])
each_limit = pytest.mark.parametrize("limit", [2**31, 2**32], ids=["2^31", "2^32"])
