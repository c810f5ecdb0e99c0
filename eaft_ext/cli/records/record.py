"""What a record is, whatever it was read from; and a part of many."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

Message = dict[str, str]


@dataclass(frozen=True)
class Record:
    """Running text, or the last answer of a conversation with the messages before it.

    ``where`` names its place in the data, for what is said of it later.
    """

    text: str
    conversation: tuple[Message, ...] = ()
    where: str = field(default="", compare=False, repr=False)


class LazyRecords(Sequence[Record]):
    """Records that are read as they are asked for: a subclass says how many, and reads one."""

    def read(self, index: int) -> Record:
        """Return record ``index``, from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return Part(self, range(len(self))[index])
        return self.read(range(len(self))[index])

    def __iter__(self) -> Iterator[Record]:
        return (self.read(index) for index in range(len(self)))


class Part(LazyRecords):
    """Those of the records that have these indices, in this order."""

    def __init__(self, records: Sequence[Record], indices: Iterable[int]) -> None:
        self._records = records
        self._indices = array("q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Record:
        """Return the record, read from what this is a part of."""
        return self._records[self._indices[index]]


class Rows(LazyRecords):
    """Records of a table that gives any of its rows at once."""

    def __init__(self, count: int, read: Callable[[int], Record]) -> None:
        self._count = count
        self._read = read

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> Record:
        """Return the record of a row."""
        return self._read(index)
