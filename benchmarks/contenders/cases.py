"""The cases that are measured, and their inputs."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIMES = "\N{MULTIPLICATION SIGN}"
DTYPES = ("float32", "bfloat16")
IGNORED = -100
# With so few rows, the time goes into launching kernels.
FEW_ROWS = 64


@dataclass(frozen=True)
class Case:
    """Logits of shape (num_rows, vocab_size) in a dtype, by its name."""

    num_rows: int
    vocab_size: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.num_rows:,} {TIMES} {self.vocab_size:,} {self.dtype}"

    @property
    def logits_bytes(self) -> int:
        """The size of the logits, and of their gradient."""
        return self.num_rows * self.vocab_size * self._itemsize()

    @property
    def input_bytes(self) -> int:
        """The size of all that a gradient is wanted for, and of the gradients."""
        return self.logits_bytes

    def batch(self, generator: torch.Generator) -> "Batch | LinearBatch":
        """An input of one call, on the generator's device.

        Logits are normal with standard deviation 3, about what a language model gives; labels are
        anywhere in the vocabulary.
        """
        logits = self._normal((self.num_rows, self.vocab_size), 3, generator)
        return Batch(logits, self._labels(generator), torch.empty_like(logits))

    def _itemsize(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)

    def _normal(
        self, shape: tuple[int, int], deviation: float, generator: torch.Generator
    ) -> Tensor:
        normal = torch.randn(shape, generator=generator, device=generator.device)
        return normal.mul_(deviation).to(getattr(torch, self.dtype))

    def _labels(self, generator: torch.Generator) -> Tensor:
        shape = (self.num_rows,)
        return torch.randint(self.vocab_size, shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class LinearCase(Case):
    """Logits of hidden (num_rows, hidden_size) and weight (vocab_size, hidden_size)."""

    hidden_size: int

    def __str__(self) -> str:
        sizes = (self.num_rows, self.hidden_size, self.vocab_size)
        return f" {TIMES} ".join(f"{size:,}" for size in sizes) + f" {self.dtype}"

    @property
    def input_bytes(self) -> int:
        """Hidden and weight; the labels need no gradient."""
        return (self.num_rows + self.vocab_size) * self.hidden_size * self._itemsize()

    def batch(self, generator: torch.Generator) -> "LinearBatch":
        hidden = self._normal((self.num_rows, self.hidden_size), 1, generator)
        deviation = 3 / math.sqrt(self.hidden_size)
        weight = self._normal((self.vocab_size, self.hidden_size), deviation, generator)
        return LinearBatch(hidden, weight, self._labels(generator))


def case_of(fields: dict[str, Any]) -> Case:
    return LinearCase(**fields) if "hidden_size" in fields else Case(**fields)


@dataclass(frozen=True)
class Batch:
    """The input of one call. What is in ``workspace`` equals ``logits``, and may be overwritten."""

    logits: Tensor
    labels: Tensor
    workspace: Tensor

    def restore(self) -> None:
        """Undo what the last call did to the workspace."""
        self.workspace.copy_(self.logits)


@dataclass(frozen=True)
class LinearBatch:
    """The input of one call; nothing of it is overwritten."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    def restore(self) -> None:
        pass


class Rotation:
    """Batches in rotation, so many that the inputs of one have left the cache when its turn comes.

    One label in ``ignore_every`` is ignored; if that is 0, none, so that every row is work for
    everyone.
    """

    def __init__(
        self, case: Case, cache_bytes: int, device: str, seed: int = 0, ignore_every: int = 0
    ) -> None:
        self.count = 1 + math.ceil(2 * cache_bytes / case.input_bytes)
        generator = torch.Generator(device).manual_seed(seed)
        self._batches: list[Any] = [case.batch(generator) for _ in range(self.count)]
        if ignore_every:
            for batch in self._batches:
                batch.labels[ignore_every // 2 :: ignore_every] = IGNORED
        self._turn = 0

    def full_turn(self) -> list[Any]:
        """Every batch of the case once, restored."""
        for batch in self._batches:
            batch.restore()
        self._turn = 0
        return self._batches

    def next(self) -> Any:
        """The batch that was used the longest ago. They are restored once in a full turn."""
        if self._turn == 0:
            self.full_turn()
        batch = self._batches[self._turn]
        self._turn = (self._turn + 1) % self.count
        return batch
