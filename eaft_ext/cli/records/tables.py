"""Tables with a column for each field: CSV and TSV, Parquet, and datasets of a hub or a folder."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from eaft_ext.cli.errors import CommandError

from . import lines
from .formats import FIELDS, parse_record, shown
from .lines import FileRecords
from .record import Record, Rows

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ROWS_AT_A_TIME = 256


def csv_records(file: BinaryIO, path: Path, delimiter: str) -> FileRecords:
    """Return the records of a table whose first row names its columns; all rows are checked."""
    csv.field_size_limit(lines.LONGEST_LINE)
    place = [0, 1]  # byte and line at which the next row begins

    def text() -> Iterator[str]:
        for start, number, line in lines.lines(file, path):
            place[:] = start + len(line.encode()), number + 1
            yield line

    rows = _rows(text(), delimiter, lambda: f"{path}, line {place[1]}")
    columns = next(rows, [])
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise CommandError(f"{path}, line 1: two columns have one name: {shown(twice)}")

    def parse(row: list[str], where: str) -> Record:
        if len(row) != len(columns):
            raise CommandError(
                f"{where}: {len(row)} cells, but the header has {len(columns)} columns"
            )
        return parse_record(dict(zip(columns, row, strict=True)), where)

    def parse_at(at: BinaryIO, where: str) -> Record:
        following = (lines.decoded(line, where) for line in iter(at.readline, b""))
        return parse(next(_rows(following, delimiter, lambda: where)), where)

    records = FileRecords(file, f"{path}, line", parse_at)
    while True:
        start, number = place
        row = next(rows, None)
        if row is None:
            return records
        if row:  # not an empty line
            parse(row, f"{path}, line {number}")
            records.append(start, number)


def parquet_records(path: Path) -> Iterator[Record]:
    """Yield the records of a Parquet file, of which the columns of :data:`FIELDS` are read."""
    _require("pyarrow", path)
    parquet, pyarrow = (importlib.import_module(name) for name in ("pyarrow.parquet", "pyarrow"))
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            known, others = _divided(file.schema_arrow.names)
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=known or None):
                for row in batch.to_pylist():
                    number += 1
                    yield parse_record({**others, **row}, f"{path}, record {number}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        after = f" after record {number}" if number else ""
        raise CommandError(f"cannot read {path}{after}: {reason}") from None


def dataset_records(name: str, split: str, configuration: str | None, folder: bool) -> Rows:
    """Return the records of a split of a data set, by the package ``datasets``.

    ``name`` is a hub's; or a folder that ``save_to_disk`` wrote, or one of data files.
    """
    _require("datasets", name)
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    try:
        if folder and any((Path(name) / file).exists() for file in SAVED):
            found = datasets.load_from_disk(name)
            if isinstance(found, dict):
                if split not in found:
                    raise CommandError(f"{name} has no split {split!r}, only {', '.join(found)}")
                found = found[split]
        else:
            found = datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # what a data file has, rather than that it failed
        reason = _first_line(cause)
        no_file = "" if folder else f"there is no file {name}, and "
        raise CommandError(f"{no_file}the data set {name} cannot be loaded: {reason}") from None
    known, others = _divided(found.column_names)
    table = found.select_columns(known) if known else found

    def parse(row: dict[str, Any], index: int) -> Record:
        return parse_record({**others, **row}, f"{name}, record {index + 1}")

    for index, row in enumerate(table):
        parse(row, index)
    return Rows(len(table), lambda index: parse(table[index], index))


SAVED = ("state.json", "dataset_dict.json")
"""What ``save_to_disk`` leaves in a folder: one of these."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _divided(names: Iterable[str]) -> tuple[list[str], dict[str, None]]:
    """Return the columns to read, and the others as fields without a value."""
    names = list(names)
    known = [name for name in names if name in FIELDS]
    return known, dict.fromkeys(name for name in names if name not in FIELDS)


def _rows(text: Iterable[str], delimiter: str, where: Callable[[], str]) -> Iterator[list[str]]:
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        begins = where()
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise CommandError(f"{begins}: not CSV ({error})") from None
        if row is None:
            return
        yield row


def _require(package: str, source: object) -> None:
    from eaft_ext.cli.options import require_extras

    try:
        require_extras([package], extra="data")
    except CommandError as error:
        raise CommandError(f"cannot read {source}: {error}") from None
