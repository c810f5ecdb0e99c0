"""Logits and labels that break implementations of this loss, and plain ones.

Every builder gives float64 logits (num_rows, vocab_size) and int64 labels; ``make`` rounds them.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from eaft_ext.reference import TokenStats

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IGNORED = -100

TOLD = tuple(name for name in TokenStats._fields if name != "dropped")
"""The stats that a loss of logits has, with a z_loss and ``return_stats="full"``."""

_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
REFUSAL = ValueError if _TORCH <= (2, 13) else (ValueError, RuntimeError)
"""What an operator that is called directly raises of bad input. Torch 2.15 makes a RuntimeError of
all that the C++ raises; the public functions raise ValueErrors with any torch."""

Builder = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


def dtype_name(value: object) -> str:
    """For the ids of tests."""
    return str(value).removeprefix("torch.")


def _normal(num_rows: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocab_size, (num_rows,), generator=generator)


def _changed(change: Callable[[Tensor], Tensor]) -> Builder:
    def build(num_rows: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        logits, labels = _normal(num_rows, vocab_size, generator)
        return change(logits), labels

    return build


def _confident(doubt: float) -> Builder:
    """The label's probability is 1 - doubt, and the rest is spread over the whole row."""

    def build(num_rows: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        logits, labels = _normal(num_rows, vocab_size, generator)
        logits /= 3
        rest = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
        # A vocabulary of one has no rest.
        target = torch.where(rest.isinf(), 0.0, rest + math.log((1 - doubt) / doubt))
        return logits.scatter(1, labels[:, None], target[:, None]), labels

    return build


def _raised(positions: Callable[[int], Tensor]) -> Builder:
    """The largest logits are at ``positions(vocab_size)``, with 16 of them equal to the 20th."""

    def build(num_rows: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        logits, labels = _normal(num_rows, vocab_size, generator)
        where = positions(vocab_size)
        steps = torch.arange(len(where), dtype=torch.float64).clamp(max=12) / 4
        logits[:, where] = 16 - steps
        return logits, labels

    return build


def _masked(filler: float, keep: float) -> Builder:
    """A share of the logits is ``filler``; never the label's."""

    def build(num_rows: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        logits, labels = _normal(num_rows, vocab_size, generator)
        drop = torch.rand(num_rows, vocab_size, generator=generator) >= keep
        drop.scatter_(1, labels[:, None], False)
        return logits.masked_fill(drop, filler), labels

    return build


def _few_finite(count: int) -> Builder:
    """All but ``count`` logits are -inf, among them the label's."""

    def build(num_rows: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        logits, _ = _normal(num_rows, vocab_size, generator)
        finite = torch.rand(num_rows, vocab_size, generator=generator).argsort(1)[:, :count]
        masked = torch.full_like(logits, -math.inf).scatter(1, finite, logits.gather(1, finite))
        return masked, finite[:, 0].clone()

    return build


def _outliers(scale: float) -> Callable[[Tensor], Tensor]:
    def change(logits: Tensor) -> Tensor:
        logits[:, ::7] *= scale
        return logits

    return change


def _huge(logits: Tensor) -> Tensor:
    logits[:, ::5] = 1e4
    logits[:, 1::5] = -1e4
    return logits


TRAPS: dict[str, Builder] = {
    "normal": _normal,
    "all_negative": _changed(lambda x: x - 1000),
    "far_from_zero": _changed(lambda x: x + 3e4),
    "equal": _changed(lambda x: torch.full_like(x, -7.25)),
    "zeros_of_both_signs": _changed(lambda x: torch.copysign(torch.zeros_like(x), x)),
    "many_ties": _changed(lambda x: x.round()),
    "outliers_times_20": _changed(_outliers(20)),
    "outliers_of_1e4": _changed(_huge),
    "probability_0.999": _confident(1e-3),
    "probability_one_minus_1e-6": _confident(1e-6),
    "masked_half": _masked(-math.inf, keep=0.5),
    "masked_with_lowest_float16": _masked(torch.finfo(torch.float16).min, keep=0.3),
    "five_finite": _few_finite(5),
    "one_finite": _few_finite(1),
    "ascending": _changed(lambda x: x.sort(1).values),
    "descending": _changed(lambda x: x.sort(1, descending=True).values),
    "largest_in_one_group": _raised(lambda v: torch.arange(v // 3, v)[:40]),
    "largest_one_in_a_group": _raised(lambda v: torch.arange(0, v, 128)),
    "largest_at_the_end": _raised(lambda v: torch.arange(v)[-36:]),
    "largest_at_both_ends": _raised(
        lambda v: torch.cat([torch.arange(v)[:1], torch.arange(v)[-1:]])
    ),
}


def make(
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    trap: str = "normal",
    device: str = "cpu",
    ignored: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits (num_rows, vocab_size) and labels (num_rows,), a share of the labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits, labels = TRAPS[trap](num_rows, vocab_size, generator)
    drop = torch.rand(num_rows, generator=generator) < ignored
    labels = labels.masked_fill(drop, IGNORED)
    return logits.to(dtype).to(device), labels.to(device)


def upstream_of(labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A gradient for every token's loss: of both signs and several sizes, and 0 for the second."""
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(labels.shape, generator=generator, dtype=torch.float64)
    upstream *= 10.0 ** torch.randint(-1, 2, labels.shape, generator=generator)
    upstream.view(-1)[1:2] = 0
    return upstream.to(dtype).to(labels.device)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that equality is of bits, also of NaN and of signed zeros."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    integer = sizes[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of floats, or bools, agree in shape, dtype and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results for the same rows agree, of different layouts or among different rows.

    In every bit on the CPU, whose kernels add in one order. On CUDA the order depends on the rows'
    alignment, on their number and on the operator: there to a few roundings.
    """
    if a.device.type == "cpu":
        return same_bits(a, b)
    relative = max(1e-5, 2 * torch.finfo(a.dtype).eps)
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.allclose(a.float(), b.float(), relative, 1e-6, equal_nan=True)


def sparse_elements(count: int) -> Tensor:
    """bfloat16 of which only what is written to takes memory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs memory that is not backed until it is written, as on Linux")
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        memory = mmap.mmap(-1, 2 * count, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for {2 * count >> 30} GB: {error}")
    return torch.frombuffer(memory, dtype=torch.bfloat16)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let CPU operators use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
