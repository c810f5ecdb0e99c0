"""Text as a page shows it: what cannot be seen, or moves other text, is shown as a sign."""

from __future__ import annotations

import re

_DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_NO_WIDTH = "\u00ad\u200b\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb"
_UNSEEN = re.compile(
    f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_DIRECTIONS}{_NO_WIDTH}\u2028\u2029\ud800-\udfff]"
)


def safe(text: str) -> str:
    """Return the text with signs for control characters: those of Unicode, or ``[U+202E]``.

    Line breaks and tabs stay. Marks of direction would turn the text that follows a token.
    """
    return _UNSEEN.sub(lambda match: _sign(ord(match[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else f"[U+{code:04X}]"
