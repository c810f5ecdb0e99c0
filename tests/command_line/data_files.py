"""Conversations in the forms that data has, and files of several kinds that hold them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Fields = dict[str, Any]

WITHOUT_PYARROW = "needs pyarrow; pip install 'eaft_ext[data]' brings it"
WITHOUT_DATASETS = "needs datasets; pip install 'eaft_ext[data]' brings it"

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def conversation(*contents: str, system: str = "") -> list[Fields]:
    """The user's and the assistant's messages in turn, after the system's if there is one."""
    roles = ("user", "assistant") * (len(contents) // 2)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def sharegpt(messages: list[Fields]) -> Fields:
    turns = [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in messages]
    return {"conversations": turns, "id": "a7"}


def alpaca(messages: list[Fields]) -> Fields:
    """The last request and its answer, the system's message, and the others as history."""
    texts = [message["content"] for message in messages if message["role"] != "system"]
    system = [message["content"] for message in messages if message["role"] == "system"]
    *history, request, answer = texts
    return {
        "instruction": request,
        "input": "",
        "output": answer,
        "system": "".join(system),
        "history": [history[i : i + 2] for i in range(0, len(history), 2)],
    }


FORMS: dict[str, Callable[[list[Fields]], Fields]] = {
    "messages": lambda messages: {"messages": messages},
    "sharegpt": sharegpt,
    "sharegpt with roles": lambda messages: {"conversations": messages},
    "alpaca": alpaca,
    "trl": lambda messages: {"prompt": messages[:-1], "completion": messages[-1:]},
}
"""Any conversation."""

PAIRS: dict[str, Callable[[list[Fields]], Fields]] = {
    "prompt": lambda m: {"prompt": m[0]["content"], "completion": m[1]["content"]},
    "question": lambda m: {"question": m[0]["content"], "answer": m[1]["content"], "n": 1},
    "instruction": lambda m: {"instruction": m[0]["content"], "output": m[1]["content"]},
}
"""One request and its answer."""


def write_lines(path: Path, rows: list[Fields]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_gzip(path: Path, rows: list[Fields]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(f"{json.dumps(row)}\n\n" for row in rows)


def write_list(path: Path, rows: list[Fields]) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")


def write_table(path: Path, rows: list[Fields]) -> None:
    """With what is a list as JSON, and a mark at the beginning as Excel puts it."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})


def write_parquet(path: Path, rows: list[Fields]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason=WITHOUT_PYARROW)
    parquet = pytest.importorskip("pyarrow.parquet", reason=WITHOUT_PYARROW)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)


def write_saved(path: Path, rows: list[Fields]) -> None:
    datasets = pytest.importorskip("datasets", reason=WITHOUT_DATASETS)
    datasets.Dataset.from_list(rows).save_to_disk(path)


def write_saved_splits(path: Path, rows: list[Fields]) -> None:
    datasets = pytest.importorskip("datasets", reason=WITHOUT_DATASETS)
    train = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(path)


def write_folder(path: Path, rows: list[Fields]) -> None:
    """A folder of files that ``datasets.load_dataset`` takes."""
    pytest.importorskip("datasets", reason=WITHOUT_DATASETS)
    path.mkdir()
    write_lines(path / "train.jsonl", rows)
    write_lines(path / "test.jsonl", rows[:1])


CONTAINERS: dict[str, Callable[[Path, list[Fields]], None]] = {
    "rows.jsonl": write_lines,
    "rows.ndjson": write_lines,
    "rows.json": write_lines,
    "list.json": write_list,
    "rows.jsonl.gz": write_gzip,
    "table.csv": write_table,
    "table.tsv": write_table,
    "table.parquet": write_parquet,
    "saved": write_saved,
    "saved-splits": write_saved_splits,
    "folder": write_folder,
}
