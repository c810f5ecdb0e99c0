"""The text of each token of a row, so that the row's text is that of its tokens, end to end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""How tokenizers decode a token that ends inside of a character."""

MOST_TOKENS = 4
"""Of one character: a token has at least one byte of UTF-8."""


class Pieces:
    """What a tokenizer's tokens say after one another."""

    def __init__(self, tokenizer: Any) -> None:
        @lru_cache(maxsize=1 << 17)
        def decode(ids: tuple[int, ...]) -> str:
            return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        self._decode = decode

    def after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ``ids`` add: after another token, some tokenizers begin with a space."""
        context = tuple(before[-1:])
        both, alone = self._decode((*context, *ids)), self._decode(context) if context else ""
        return both[len(alone) :] if both.startswith(alone) else self._decode(tuple(ids))

    def of(self, ids: Sequence[int]) -> list[str]:
        """A text for each token. A character of several tokens is the first one's."""
        found: list[str] = []
        while len(found) < len(ids):
            begin = len(found)
            count = self._whole(ids, begin)
            found += [self.after(ids[:begin], ids[begin : begin + count]), *[""] * (count - 1)]
        return found

    def _whole(self, ids: Sequence[int], begin: int) -> int:
        """How many tokens from ``begin`` on are whole characters, at least."""
        most = min(MOST_TOKENS, len(ids) - begin)
        for count in range(1, most + 1):
            if not self.after(ids[:begin], ids[begin : begin + count]).endswith(BROKEN):
                return count
        # The text has that character, or ends within another: where can it be cut in two?
        some = tuple(ids[begin : begin + 2 * MOST_TOKENS])
        for count in range(1, most + 1):
            if self._decode(some[:count]) + self._decode(some[count:]) == self._decode(some):
                return count
        return 1
