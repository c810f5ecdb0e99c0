"""The cases that are measured, and their inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TIMES = "\N{MULTIPLICATION SIGN}"


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
        return self.num_rows * self.vocab_size * getattr(torch, self.dtype).itemsize


DTYPES = ("float32", "bfloat16")
# In order of worth: time may be short.
SHAPES = {
    "cpu": ((512, 151_936), (2048, 50_257), (4, 151_936)),
    "cuda": (
        (8192, 151_936),
        (8192, 128_256),
        (4096, 262_144),
        (16384, 32_000),
        (64, 151_936),
        (1, 151_936),
    ),
}
QUICK_SHAPES = ((64, 8_192),)
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """The input of one call. What is in ``workspace`` equals ``logits``, and may be overwritten."""

    logits: Tensor
    labels: Tensor
    workspace: Tensor


class Rotation:
    """Batches in rotation, so many that the logits of one have left the cache when its turn comes.

    Logits are normal with standard deviation 3, about what a language model gives; labels are
    anywhere in the vocabulary. One in ``ignore_every`` is ignored; if that is 0, none, so that
    every row is work for everyone.
    """

    def __init__(
        self,
        case: Case,
        cache_bytes: int,
        device: str,
        seed: int = 0,
        ignore_every: int = 0,
    ) -> None:
        self.count = 1 + math.ceil(2 * cache_bytes / case.logits_bytes)
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.num_rows, case.vocab_size)
        self._batches = []
        for _ in range(self.count):
            logits = torch.randn(shape, generator=generator, device=device).mul_(3)
            logits = logits.to(getattr(torch, case.dtype))
            labels = torch.randint(
                case.vocab_size, (case.num_rows,), generator=generator, device=device
            )
            if ignore_every:
                labels[ignore_every // 2 :: ignore_every] = IGNORED
            self._batches.append(Batch(logits, labels, torch.empty_like(logits)))
        self._turn = 0

    def full_turn(self) -> list[Batch]:
        """Every batch once, with its workspace restored."""
        for batch in self._batches:
            batch.workspace.copy_(batch.logits)
        self._turn = 0
        return self._batches

    def next(self) -> Batch:
        """The batch that was used the longest ago. Workspaces are restored once in a full turn."""
        if self._turn == 0:
            self.full_turn()
        batch = self._batches[self._turn]
        self._turn = (self._turn + 1) % self.count
        return batch
