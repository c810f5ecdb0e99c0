"""Files of every kind with bytes changed at random: records, or one short sentence."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import CONTAINERS, FORMS, Fields, conversation

from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.records import read_records

LONGEST = 500
"""Characters of a sentence, its path left out."""

FILES = [name for name in CONTAINERS if "." in name]  # not the folders
CHANGES = 60  # of each kind of file

CONVERSATIONS = [
    conversation("q", "a"),
    conversation("q é", "a\n2", "q3", "a4"),
    conversation("x", "y", system="s"),
]
ROWS: list[list[Fields]] = [[form(m) for m in CONVERSATIONS] for form in FORMS.values()]
ROWS += [[{"text": "a b"}, {"text": "c"}], [{"prompt": "p", "completion": "c"}] * 2]

PIECES = (b'"', b"{", b"[", b"}", b"]", b",", b"\t", b"\r", b"\n", b"-", b"1", b"NaN", b"1e999")
PIECES += (b"\\u0000", b"\\ud800", b"\xef\xbb\xbf", b"\xff\xfe", b"null", b"true", b"9" * 5000)
VALUES = (b"null", b"1", b"[]", b"{}", b'""', b"[1]", b"true", b"1e400", b'{"a": 1}')


def _overwrite(data: bytearray, place: int, chance: random.Random) -> None:
    data[place] = chance.randrange(256)


def _remove(data: bytearray, place: int, chance: random.Random) -> None:
    del data[place : place + chance.randint(1, 20)]


def _insert(data: bytearray, place: int, chance: random.Random) -> None:
    data[place:place] = chance.choice(PIECES)


def _repeat(data: bytearray, place: int, chance: random.Random) -> None:
    begin = chance.randrange(len(data))
    data[place:place] = data[begin : begin + 30]


def _cut(data: bytearray, place: int, chance: random.Random) -> None:
    del data[place:]


def _another_value(data: bytearray, place: int, chance: random.Random) -> None:
    """In the place of a quoted text."""
    begin = data.find(b'"', place)
    end = data.find(b'"', begin + 1)
    if 0 <= begin < end:
        data[begin : end + 1] = chance.choice(VALUES)


HOW: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    _overwrite,
    _remove,
    _insert,
    _repeat,
    _cut,
    _another_value,
)


@pytest.mark.parametrize("name", FILES)
def test_changed_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    refused = 0
    for seed in range(CHANGES):
        chance = random.Random(f"{name} {seed}")
        CONTAINERS[name](path, chance.choice(ROWS))
        data = bytearray(path.read_bytes())
        for _ in range(chance.randint(1, 4)):
            if data:
                chance.choice(HOW)(data, chance.randrange(len(data)), chance)
        path.write_bytes(data)
        try:
            records = read_records(path)
            assert all(record.text for record in records)
        except CommandError as error:
            refused += 1
            sentence = str(error).replace(str(path), "")
            assert "\n" not in sentence and len(sentence) < LONGEST, f"seed {seed}: {sentence}"
    assert refused > CHANGES / 4


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "r" * 5000, "content": "a"}] * 2},
        {"conversations": [{"from": "r" * 5000, "value": "a"}] * 2},
        {"r" * 5000: "a"},
        {"text": ["r" * 5000]},
    ],
)
def test_what_is_shown_of_a_long_value_is_its_beginning(tmp_path: Path, row: Fields) -> None:
    path = tmp_path / "rows.jsonl"
    CONTAINERS[path.name](path, [row])
    with pytest.raises(CommandError) as error:
        read_records(path)
    assert "rrr" in str(error.value) and len(str(error.value)) < LONGEST + len(str(path))


def test_of_many_columns_the_one_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(",".join([*(f"c{i}" for i in range(999)), "c7"]) + "\n")
    with pytest.raises(CommandError, match=r"line 1: two columns have one name: 'c7'$"):
        read_records(path)


def test_a_column_whose_name_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    CONTAINERS[path.name](path, ROWS[-1])
    path.write_bytes(path.read_bytes().replace(b"prompt", b"pro\xa2pt"))
    with pytest.raises(CommandError, match=f"^cannot read {path}: "):
        read_records(path)
