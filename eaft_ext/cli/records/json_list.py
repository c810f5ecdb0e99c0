"""A file that is one JSON list of records, an element at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from eaft_ext.cli.errors import CommandError

from . import lines
from .formats import parse_record, shown
from .record import Record

CHUNK = 1 << 20
"""Bytes that are read at a time."""

LONGEST_LITERAL = 16
"""An error so near to what has been read may be one of what has not, as in ``tru``."""

BLANK = " \t\r\n"


def list_records(file: BinaryIO, path: Path) -> Iterator[Record]:
    """Yield the records of a file that is one JSON list."""
    text = _Text(file, path)
    text.expect("[")
    ended = text.next_is("]")
    while not ended:
        yield parse_record(text.value(), text.where())
        text.number += 1
        ended = text.next_is("]")
        if not ended:
            text.expect(",")
    if text.rest():
        raise CommandError(f"{path}, line {text.line()}: text after the end of the JSON list")


class _Text:
    """What has been read of a file and is not parsed yet, and where that is."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._line, self._read = "", 0, 1, 0
        self._value_line = 1
        self.number = 1

    def line(self) -> int:
        """The line at which this stands."""
        return self._line + self._text.count("\n", 0, self._at)

    def where(self) -> str:
        """The name of the place of the value that was read last."""
        return f"{self._path}, record {self.number} (line {self._value_line})"

    def rest(self) -> str:
        """Return what follows, without blanks at its beginning, or nothing at the file's end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in BLANK:
                self._at += 1
            if self._at < len(self._text) or not self._more(CHUNK):
                return self._text[self._at : self._at + 80]

    def next_is(self, sign: str) -> bool:
        """Pass over a sign, if it is next."""
        found = self.rest().startswith(sign)
        self._at += found
        return found

    def expect(self, sign: str) -> None:
        """Pass over a sign, which must be next."""
        if not self.next_is(sign):
            found = shown(self.rest()) if self.rest() else "the end of the file"
            raise CommandError(
                f"{self._path}, line {self.line()}: not JSON (expected {sign!r} before record "
                f"{self.number}), got {found}"
            )

    def value(self) -> object:
        """Return the next value, and read as much as it needs."""
        self.rest()
        self._value_line = self.line()
        chunk = CHUNK
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string")
                unfinished |= error.pos >= len(self._text) - LONGEST_LITERAL
                if not unfinished or not self._more(chunk):
                    line = self._line + self._text.count("\n", 0, error.pos)
                    raise CommandError(
                        f"{self.where()}: not JSON ({error.msg} at line {line}): "
                        f"{shown(self._text[self._at : self._at + 81])}"
                    ) from None
            except (ValueError, RecursionError) as error:  # a number too long, too many levels
                raise CommandError(f"{self.where()}: JSON that cannot be read ({error})") from None
            else:
                if end < len(self._text) or not self._more(chunk):  # a number may go on
                    self._at = end
                    return value
            if len(self._text) - self._at > lines.LONGEST_LINE:
                raise CommandError(
                    f"{self.where()}: longer than {lines.LONGEST_LINE >> 20} MiB, "
                    "which is no record"
                )
            chunk *= 2  # so that a long value is parsed again only a few times

    def _more(self, size: int) -> bool:
        """Read on; return whether there was anything. What has been parsed is let go."""
        found = self._file.read(size)
        if b"\0" in found:
            place = self._read + found.index(0)
            raise CommandError(f"{self._path}: byte {place} is 0x00, which is not text")
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(found, final=not found)
        except UnicodeDecodeError as error:
            place = self._read - pending + error.start
            raise CommandError(
                f"{self._path}: byte {place} is {error.object[error.start]:#04x}, "
                "which is not UTF-8"
            ) from None
        self._read += len(found)
        self._line = self.line()
        self._text = self._text[self._at :] + text
        self._at = 0
        return bool(found)
