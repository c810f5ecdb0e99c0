"""Rows of several chunks whose gradients' products are made together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eaft_ext.linear._chunks import Chunk, Tokens


class Pending:
    """Rows whose products are still to be made, in the first rows of the buffer.

    They are of one chunk, or what several have left: products of few rows take as long as those of
    many, since they read or write the whole weight. ``make`` is given the chunk, its hidden and the
    gradient of its logits.
    """

    def __init__(
        self, tokens: Tokens, buffer: Tensor, make: Callable[[Chunk, Tensor, Tensor], None]
    ) -> None:
        self._tokens, self._buffer, self._make = tokens, buffer, make
        self._start = 0
        self._parts: list[tuple[Chunk, Tensor]] = []
        self.count = 0

    def next_chunk(self) -> Chunk | None:
        """The next tokens, as many as there is room for in the buffer; None at the end."""
        start = self._start
        self._start = min(start + self._tokens.size - self.count, self._tokens.count)
        return self._tokens.chunk(start, self._start) if self._start > start else None

    def add(self, chunk: Chunk, hidden: Tensor) -> None:
        """Rows that are in the buffer already, behind those that are pending."""
        if chunk.size:
            self._parts.append((chunk, hidden))
            self.count += chunk.size
        is_last = self._start == self._tokens.count
        if self.count and (is_last or 2 * self.count >= self._tokens.size):
            self._make(*_together(self._parts), self._buffer[: self.count])
            self._parts, self.count = [], 0


def _together(parts: list[tuple[Chunk, Tensor]]) -> tuple[Chunk, Tensor]:
    """One chunk of all, and its hidden."""
    if len(parts) == 1:
        return parts[0]
    places = [
        torch.arange(where.start, where.stop, device=hidden.device)
        if isinstance(where := chunk.where, slice)
        else where
        for chunk, hidden in parts
    ]
    where = torch.cat(places)
    return Chunk(where, len(where)), torch.cat([hidden for _, hidden in parts])
