"""Where records are read from: a file by the end of its name, a folder, or a hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from eaft_ext.cli.errors import CommandError

from .json_list import CHUNK, list_records
from .lines import BYTE_ORDER_MARK, decoded, json_lines, opened, telling, unpacked
from .record import Record
from .tables import DELIMITERS, csv_records, dataset_records, parquet_records

JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
PARQUET_SUFFIXES = {".parquet", ".pq"}
TABLE_SUFFIXES = JSON_SUFFIXES | PARQUET_SUFFIXES | set(DELIMITERS)

DEFAULT_SPLIT = "train"

LARGEST_TEXT = 256 << 20
"""Bytes of plain text, which is one record, and so is held whole."""

PART = r"(?::([^:\[]+(?:\[[^]]*\])?))"
ON_A_HUB = re.compile(rf"([\w.-]+(?:/[\w.-]+)?){PART}??{PART}?")
"""Name, configuration and split of a data set; of two parts, the second is the split."""


def read_records(path: Path) -> Sequence[Record]:
    """Return the records of a file, or of a data set that :func:`dataset_records` takes.

    All are parsed once, so that a bad one is told before any is used; they are then read again as
    they are asked for. Plain text is one record.
    """
    folder, split, configuration = _data_set(path)
    if folder is not None:
        records: Sequence[Record] = dataset_records(
            folder, split, configuration, folder=Path(folder).is_dir()
        )
    elif is_plain_text(path):
        return [Record(_plain_text(path), where=str(path))]
    else:
        records = _read_file(path)
    if not records:
        raise CommandError(f"{path} is empty: it has no record")
    return records


def is_plain_text(path: Path) -> bool:
    """Return whether a file is running text, by its name."""
    return _data_set(path)[0] is None and _suffix(path) not in TABLE_SUFFIXES


def _suffix(path: Path) -> str:
    """The end of a name that says what is in the file, .gz or not."""
    inner = Path(path.stem) if path.suffix.lower() == ".gz" else path
    return inner.suffix.lower()


def _data_set(path: Path) -> tuple[str | None, str, str | None]:
    """Return (name, split, configuration) of a data set; for a file the name is None."""
    if path.is_file():
        return None, "", None
    whole = path.as_posix()
    if path.is_dir():
        return whole, DEFAULT_SPLIT, None
    folder, colon, split = whole.rpartition(":")
    if colon and Path(folder).is_dir():
        return folder, split, None
    found = ON_A_HUB.fullmatch(whole)
    beside_files = "/" in whole and path.parent.is_dir()
    if not found or beside_files or _suffix(path) in TABLE_SUFFIXES | {".txt", ".md"}:
        return None, "", None
    name, configuration, split = found.groups()
    return name, split or DEFAULT_SPLIT, configuration


def _read_file(path: Path) -> Sequence[Record]:
    suffix = _suffix(path)
    packed = path.suffix.lower() == ".gz"
    with telling(path), contextlib.ExitStack() as until_read:
        if suffix in PARQUET_SUFFIXES:
            return unpacked(parquet_records(path), path)
        file = until_read.enter_context(opened(path))
        if suffix in DELIMITERS:
            records = csv_records(file, path, DELIMITERS[suffix])
        elif _begins_a_list(file):
            return unpacked(list_records(file, path), path)
        else:
            records = json_lines(file, path)
        if packed:  # from there alone a record can be reached without all before it
            return unpacked(records, path)
        until_read.pop_all()  # the records go on reading
    return records


def _begins_a_list(file: BinaryIO) -> bool:
    found = file.read(CHUNK).removeprefix(BYTE_ORDER_MARK).lstrip()
    file.seek(0)
    return found.startswith(b"[")


def _plain_text(path: Path) -> str:
    with telling(path), opened(path) as file:
        found = file.read(LARGEST_TEXT + 1)
    if len(found) > LARGEST_TEXT:
        raise CommandError(
            f"{path} is plain text of more than {LARGEST_TEXT >> 20} MiB, which is read whole: "
            'divide it, or make it JSONL with a {"text": ...} a line'
        )
    text = decoded(found, str(path)).removeprefix("\ufeff")
    if not text.strip():
        raise CommandError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")
