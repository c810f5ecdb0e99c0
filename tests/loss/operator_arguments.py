"""Calls of the operators with whatever arguments: right ones, odd ones, and wrong ones.

A call gives its results, or raises one sentence. What else it may do is a fault of its checks: an
assertion of torch's own, an error of the standard library, a result of another shape, an input that
changed, and what only a sanitizer sees, for which this is a program, too::

    python tests/loss/operator_arguments.py --seconds 30
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import eaft_ext  # noqa: F401, registers the operators

ops = torch.ops.eaft_ext

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
SIZES = (0, 1, 1, 2, 3, 5, 8)
MOST_NUMBERS = 2**22
VOCAB_SIZES = (0, 1, 1, 2, 3, 31, 127, 128, 129, 300, 4097)
INTEGERS = (-(2**63), -(2**31) - 1, -100, -1, 0, 1, 2, 3, 20, 127, 128, 129, 2**31, 2**32 + 20)
INTEGERS += (2**62, 2**63 - 1)
NUMBERS = (0.0, -0.0, 1.0, 0.5, -1.0, 30.0, 1e-300, 1e300, float("inf"), -float("inf"))
NUMBERS += (float("nan"),)
GATES = {
    "none": 0,
    "entropy": 2,
    "sigmoid": 2,
    "hard": 1,
    "conflict": 2,
    "probability": 0,
    "power": 1,
    "threshold": 1,
    "focal": 1,
}
OPERATORS = (
    "gated_ce_forward",
    "gated_ce_backward",
    "gated_ce_backward_",
    "gated_ce_partial",
    "gated_ce_merge",
    "gated_ce_forward_with_grad",
    "gated_ce_forward_with_grad_",
    "scale_gradient_",
    "topk",
)
# What a call may raise, all else is a fault.
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError)
FAULTS = ("INTERNAL ASSERT", "std::", "vector", "basic_string", "bad_alloc", "Unknown exception")
# Of torch, before an operator is called: what it does for negative views knows no operator that
# changes an argument and gives other results.
OF_TORCH = "MathBitsFallback.h"


class Arguments:
    """Random arguments. ``oddity``: how likely each of them is not what it should be."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._oddity = self._random.choice((0.0, 0.03, 0.1, 0.4))

    def one_of(self, choices: Any) -> Any:
        """Any of them."""
        return self._random.choice(tuple(choices))

    def odd(self) -> bool:
        """Whether the next argument shall be odd."""
        return self._random.random() < self._oddity

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Numbers of that shape and dtype, some of them not finite."""
        wide = 10 * torch.randn(shape, generator=self._generator, dtype=torch.float64)
        if self._random.random() < 0.2 and wide.numel() > 0:
            place = self._random.randrange(wide.numel())
            wide.view(-1)[place] = self.one_of((*NUMBERS, 1e38, -1e38))
        return wide.to(dtype)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same numbers in memory of another layout."""
        if tensor.dim() == 0 or tensor.numel() == 0:
            return tensor
        way = self.one_of(("plain", "cut", "misaligned", "transposed", "expanded", "window"))
        if way == "cut":
            return torch.cat((tensor, tensor), -1)[..., : tensor.size(-1)]
        if way == "misaligned":
            memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
            return memory[1:].view(tensor.shape).copy_(tensor)
        if way == "transposed":
            first, second = (self._random.randrange(tensor.dim()) for _ in range(2))
            return tensor.transpose(first, second).contiguous().transpose(first, second)
        if way == "expanded":
            return tensor[:1].expand(tensor.shape)
        if way == "window" and tensor.dim() == 2:
            return (
                torch.arange(sum(tensor.shape)).to(tensor.dtype).unfold(0, tensor.size(1), 1)[:-1]
            )
        return tensor

    def unusual(self, tensor: Tensor) -> Tensor:
        """A tensor that is not what an operator expects."""
        way = self.one_of(("dtype", "shape", "scalar", "meta", "sparse", "grad", "negative"))
        if way == "dtype":
            return tensor.to(self.one_of((*FLOATS, *OTHER_DTYPES)))
        if way == "shape":
            shape = tuple(self.one_of(SIZES) for _ in range(self._random.randrange(6)))
            return torch.zeros(shape, dtype=tensor.dtype)
        if way == "meta":
            return tensor.to("meta")
        if way == "sparse" and tensor.dim() > 0:
            return tensor.to_sparse()
        if way == "grad" and tensor.dtype.is_floating_point:
            return tensor.detach().requires_grad_()
        if way == "negative" and tensor.dtype.is_floating_point:
            return torch._neg_view(tensor)
        return torch.zeros((), dtype=tensor.dtype)

    def logits(self) -> Tensor:
        """(..., V)."""
        dims = self._random.choice((0, 1, 1, 1, 2, 3, 6))
        shape = (*(self.one_of(SIZES) for _ in range(dims)), self.one_of(VOCAB_SIZES))
        while math.prod(shape) > MOST_NUMBERS:
            shape = shape[1:]
        result = self.laid_out(self.tensor(shape, self.one_of(FLOATS)))
        return self.unusual(result) if self.odd() else result

    def per_row(self, logits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """One number for each row."""
        if dtype is None:
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        result = self.tensor(tuple(logits.shape[:-1]), dtype)
        return self.unusual(result) if self.odd() else result

    def labels(self, logits: Tensor) -> Tensor:
        """In the vocabulary or ignored, for the most part."""
        vocab_size = logits.size(-1) if logits.dim() > 0 else 1
        shape = tuple(logits.shape[:-1])
        if vocab_size > 0:
            result = torch.randint(vocab_size, shape, generator=self._generator)
        else:
            result = torch.zeros(shape, dtype=torch.int64)
        if result.numel() > 0:
            ignored = torch.rand(shape, generator=self._generator) < 0.2
            result = result.masked_fill(ignored, -100)
            if self.odd():
                result.view(-1)[self._random.randrange(result.numel())] = self.one_of(INTEGERS)
        result = result.to(self.one_of((torch.int64, torch.int64, torch.int32)))
        return self.unusual(result) if self.odd() else result

    def integer(self, *usual: int | None) -> int | None:
        """One of the usual ones."""
        return self.one_of(INTEGERS) if self.odd() else self.one_of(usual)

    def gate(self) -> tuple[str, list[float]]:
        """Name and parameters."""
        name = self.one_of(GATES)
        count = GATES[name]
        if self.odd():
            return self.one_of((name, "", "Entropy", "entropy\0", "é" * 300)), self.numbers()
        return name, [self._random.random() for _ in range(count)]

    def numbers(self) -> list[float]:
        """Any numbers, a few."""
        return [self.one_of(NUMBERS) for _ in range(self._random.randrange(6))]

    def family(self) -> list[float]:
        """Empty, or of four."""
        if self.odd():
            return self.numbers()
        of_four = [self.one_of((0.0, 30.0)), 0.5, self.one_of((0.0, 0.1, 1.0)), 1e-4]
        return self.one_of(([], of_four))

    def call(self) -> tuple[str, list[Any]]:
        """An operator, and its arguments in order."""
        operator = self.one_of(OPERATORS)
        logits = self.logits()
        labels = self.labels(logits)
        k = self.integer(0, 2, 4, 20, 128)
        gate, parameters = self.gate()
        ignore_index = self.integer(-100)
        start = self.integer(0, 3)
        vocab_size = self.integer(None, logits.size(-1) if logits.dim() > 0 else 1)
        words = self.integer(None, 5000)
        num_extra = self.integer(0, 1, 2, 3)
        family = self.family()
        if operator == "topk":
            return operator, [logits, self.integer(1, 2, 20)]
        if operator == "scale_gradient_":
            return operator, [logits, self.per_row(torch.empty(1, 1), torch.float32)]
        if operator == "gated_ce_partial":
            told = self.one_of((False, True))
            return operator, [logits, labels, k, start, vocab_size, ignore_index, family, told]
        if operator.startswith("gated_ce_backward"):
            rows = [self.per_row(logits) for _ in range(4)]
            arguments = [rows[0], logits, labels, rows[1], rows[2], ignore_index]
            shard = [self.one_of((None, start)), vocab_size]
            return operator, [*arguments, *shard, self.one_of((None, rows[3])), family, words]
        loss = [k, gate, parameters, ignore_index]
        in_place = self.one_of((False, True))
        if operator == "gated_ce_forward":
            return operator, [logits, labels, *loss, in_place, family, num_extra]
        if operator == "gated_ce_merge":
            size = 3 + max(k, 1) + (k == 0 or num_extra == 3) + (len(family) > 2 and family[2] != 0)
            size = min(max(size, 0), 200)
            shards = self.tensor((self.one_of((1, 2, 5)), *labels.shape, size), torch.float32)
            if logits.dtype == torch.float64:
                shards = shards.double()
            shards = self.unusual(shards) if self.odd() else shards
            rest = [start, vocab_size, in_place, family, words, num_extra]
            return operator, [logits, labels, shards, *loss, *rest]
        return operator, [self.per_row(logits), logits, labels, *loss, family, num_extra]


def _bits(tensor: Tensor) -> Any:
    """What shows whether a tensor was written to; nothing of one that holds no numbers."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return None
    return tensor.detach().resolve_neg().contiguous().view(-1).view(torch.uint8).clone()


def _fault_of_results(operator: str, arguments: list[Any], results: Any) -> str | None:
    if operator == "gated_ce_forward":
        rows = arguments[0].shape[:-1]
        for name, stat in zip(("loss", "nll", "entropy", "gate"), results, strict=False):
            if stat.shape != rows:
                return f"{name} has the shape {tuple(stat.shape)}"
    if operator == "gated_ce_backward" and results.shape != arguments[1].shape:
        return f"the gradient has the shape {tuple(results.shape)}"
    return None


def fault_of(seed: int) -> tuple[str, str | None]:
    """What became of the call of that seed: its kind, and what is wrong with it."""
    operator, arguments = Arguments(seed).call()
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    before = [_bits(t) for t in tensors]
    try:
        results = getattr(ops, operator)(*arguments)
        kind, fault = "results", _fault_of_results(operator, arguments, results)
    except REFUSALS as error:
        kind, message = type(error).__name__, str(error)
        found = any(f in message for f in FAULTS) and OF_TORCH not in message
        fault = repr(message.splitlines()[0]) if found else None
        if not message:
            fault = "an error without a sentence"
        if kind in ("ValueError", "TypeError") and not message.startswith((operator, "gate ")):
            fault = fault or (None if "eaft_ext::" in message else repr(message))
    if not operator.endswith("_") and fault is None:
        for tensor, bits in zip(tensors, before, strict=True):
            if bits is not None and not torch.equal(bits, _bits(tensor)):
                fault = "an input was written to"
    return kind, fault and f"seed {seed}, {operator}{_shown(arguments)}: {fault}"


def _shown(arguments: list[Any]) -> str:
    def show(argument: Any) -> str:
        if not isinstance(argument, Tensor):
            return repr(argument)
        return f"{argument.dtype}{list(argument.shape)}"

    return f"({', '.join(map(show, arguments))})"


def run(seeds: Any, until: Callable[[], bool] = lambda: False) -> tuple[Counter[str], list[str]]:
    """The calls of the seeds: how many ended in what, and what was wrong with some."""
    kinds: Counter[str] = Counter()
    faults = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            if until():
                break
            kind, fault = fault_of(seed)
            kinds[kind] += 1
            if fault is not None:
                faults.append(fault)
    return kinds, faults


def main() -> int:
    """Calls for so many seconds; 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    options = parser.parse_args()
    torch.set_num_threads(2)
    end = time.monotonic() + options.seconds
    kinds, faults = run(itertools.count(options.seed), lambda: time.monotonic() > end)
    for fault in faults[:20]:
        print(fault)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"{kinds.total()} calls, {len(faults)} faults: {told}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
