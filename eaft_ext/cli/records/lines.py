"""Files of text, a line at a time: none is held whole, and what is no text is refused."""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from eaft_ext.cli.errors import CommandError

from .formats import parse_json
from .record import LazyRecords, Record

LONGEST_LINE = 64 << 20
"""Bytes. A longer line, or element of a JSON list, is refused before it has been read."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Parse = Callable[[BinaryIO, str], Record]
"""From a file that stands at the record's beginning, and the name of that place."""


class FileRecords(LazyRecords):
    """Records of a file of which it is kept where each begins, 16 bytes for each.

    ``name`` is what the file is called, followed by the record's number among lines or records.
    """

    def __init__(self, file: BinaryIO, name: str, parse: Parse) -> None:
        self._file, self._name, self._parse = file, name, parse
        self._starts = array("q")
        self._numbers = array("q")
        weakref.finalize(self, file.close)

    def append(self, start: int, number: int) -> None:
        """Add the record that begins at a byte."""
        self._starts.append(start)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Record:
        """Return the record, read from the file."""
        self._file.seek(self._starts[index])
        return self._parse(self._file, f"{self._name} {self._numbers[index]}")


def opened(path: Path) -> BinaryIO:
    """Return the bytes of a file; those within, if its name ends in .gz."""
    with telling(path):
        if path.suffix.lower() == ".gz":
            return cast(BinaryIO, gzip.open(path))
        return path.open("rb")


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a file into one sentence."""
    try:
        yield
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise CommandError(f"cannot read {path}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}") from None


def line_at(file: BinaryIO, where: str) -> bytes:
    """Return the line at which a file stands.

    Raises:
        CommandError: it is longer than :data:`LONGEST_LINE`.
    """
    line = file.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise CommandError(f"{where}: longer than {LONGEST_LINE >> 20} MiB, which is no record")
    return line


def decoded(line: bytes, where: str) -> str:
    """Return text, of which the first byte that cannot be is named."""
    if b"\0" in line:
        raise CommandError(f"{where}: byte {line.index(0)} is 0x00, which is not text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{where}: byte {error.start} is {line[error.start]:#04x}, which is not UTF-8"
        ) from None


def lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield of every line where it begins, its number from 1, and its text."""
    start = 0
    number = 1
    while line := line_at(file, f"{path}, line {number}"):
        end = start + len(line)
        if number == 1 and line.startswith(BYTE_ORDER_MARK):
            start, line = start + len(BYTE_ORDER_MARK), line[len(BYTE_ORDER_MARK) :]
        yield start, number, decoded(line, f"{path}, line {number}")
        start = end
        number += 1


def json_lines(file: BinaryIO, path: Path) -> FileRecords:
    """Return the records of a file of one JSON object a line, all of which it checks."""

    def parse_at(at: BinaryIO, where: str) -> Record:
        return parse_json(decoded(line_at(at, where), where), where)

    records = FileRecords(file, f"{path}, line", parse_at)
    for start, number, line in lines(file, path):
        if line.strip():
            parse_json(line.rstrip("\r\n"), f"{path}, line {number}")
            records.append(start, number)
    return records


def unpacked(found: Iterable[Record], path: Path) -> FileRecords:
    """Return records that can only be read from first to last, by way of a temporary file."""
    temporary = tempfile.TemporaryFile(prefix="eaft-ext-")  # noqa: SIM115 (the records close it)
    file = cast(BinaryIO, temporary)
    records = FileRecords(file, f"{path}, record", _parse_unpacked)
    start = 0
    for number, record in enumerate(found, start=1):
        written = json.dumps([record.text, record.conversation]).encode() + b"\n"
        with _telling_of_unpacking(path):
            file.write(written)
        records.append(start, number)
        start += len(written)
    with _telling_of_unpacking(path):
        file.flush()
    return records


@contextlib.contextmanager
def _telling_of_unpacking(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"cannot unpack {path} into {tempfile.gettempdir()}: {error.strerror}"
        ) from None


def _parse_unpacked(file: BinaryIO, where: str) -> Record:
    text, conversation = json.loads(file.readline())
    return Record(text, tuple(conversation), where)
