"""The texts of tokens, end to end those of the row; and signs for what cannot be seen."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers; pip install 'eaft_ext[demo]'")

from demo_tiny_model import tiny_folder, tokenizer

from eaft_ext.cli.inspect.page.safe import safe
from eaft_ext.cli.inspect.pieces import Pieces

__all__ = ["tiny_folder", "tokenizer"]

TEXTS = [
    "the order of the class",
    "a \N{GRINNING FACE} and \N{FAMILY}\N{ZERO WIDTH JOINER}\N{GIRL} e\N{COMBINING ACUTE ACCENT}",
    "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET} \N{CJK UNIFIED IDEOGRAPH-4E2D}",
    "\N{REPLACEMENT CHARACTER} is a character, \N{REPLACEMENT CHARACTER}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_bytes(tokenizer: Any, text: str) -> None:
    """A character of several tokens is the first one's, and is not broken."""
    ids = tokenizer(text)["input_ids"]
    pieces = Pieces(tokenizer).of(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert ("" in pieces) != text.isascii()
    if text.count("\N{REPLACEMENT CHARACTER}") == 0:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_that_is_cut_off(tokenizer: Any) -> None:
    ids = tokenizer("a \N{GRINNING FACE}")["input_ids"][:-1]
    pieces = Pieces(tokenizer).of(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "a \N{REPLACEMENT CHARACTER}"


class Sentences:
    """A tokenizer whose first token loses its space, as those of SentencePiece do."""

    words = (" the", " order", "s", " of")

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.words[one] for one in ids).removeprefix(" ")


def test_pieces_of_a_tokenizer_that_strips_the_first_space() -> None:
    pieces = Pieces(Sentences())
    assert pieces.of([0, 1, 2, 3]) == ["the", " order", "s", " of"]
    assert pieces.after([1], [3]) == " of" and pieces.after([], [3]) == "of"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n\tb", "a\n\tb"),
        ("a\0b\x1b[31m\r\n", "a\u2400b\u241b[31m\u240d\n"),
        ("\x7f\x85", "\u2421[U+0085]"),
        ("\u202eabc\u2066", "[U+202E]abc[U+2066]"),
        ("\N{GRINNING FACE}\N{ZERO WIDTH JOINER}<script>&amp;", None),
    ],
)
def test_what_cannot_be_seen_has_a_sign(text: str, shown: str | None) -> None:
    assert safe(text) == (text if shown is None else shown)
