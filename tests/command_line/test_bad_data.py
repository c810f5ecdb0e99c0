"""What ``--data`` refuses: one sentence, with the file and the place in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from data_files import CONTAINERS, write_lines

from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.records import read_records, source


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.jsonl", b"\n \n", "{path} is empty: it has no record"),
        ("empty.csv", b"", "{path} is empty: it has no record"),
        ("header.csv", b"text\n", "{path} is empty: it has no record"),
        ("empty.json", b" []", "{path} is empty: it has no record"),
        ("nul.txt", b"a\0b", "{path}: byte 1 is 0x00, which is not text"),
        (
            "nul.jsonl",
            b'{"text": "a"}\n{"text": "\0"}',
            "{path}, line 2: byte 10 is 0x00, which is not text",
        ),
        ("nul.json", b'[{"text": "\0"}]', "{path}: byte 11 is 0x00, which is not text"),
        (
            "latin.csv",
            b"text\na\ncaf\xe9\n",
            "{path}, line 3: byte 3 is 0xe9, which is not UTF-8",
        ),
        ("latin.json", b'[{"text": "\xe9"}]', "{path}: byte 11 is 0xe9, which is not UTF-8"),
        (
            "middle.jsonl",
            b'{"text": "a"}\n\n{"text": \n{"text": "b"}',
            "{path}, line 3: not JSON (Expecting value at column 10): '{{\"text\": '",
        ),
        (
            "list.json",
            b'[\n{"text": "a"},\n{"text": tru},\n{"text": "b"}]',
            "{path}, record 2 (line 3): not JSON (Expecting value at line 3): ",
        ),
        (
            "fields.json",
            b'[{"text": "a"},\n{"body": "b"}]',
            "{path}, record 2 (line 2): expected the fields text, messages, conversations",
        ),
        (
            "comma.json",
            b'[{"text": "a"}\n{"text": "b"}]',
            "{path}, line 2: not JSON (expected ',' before record 2), got ",
        ),
        (
            "end.json",
            b'[{"text": "a"},\n',
            "{path}, record 2 (line 2): not JSON (Expecting value at line 2): ''",
        ),
        (
            "open.json",
            b'[{"text": "a"}\n',
            "{path}, line 2: not JSON (expected ',' before record 2), got the end of the file",
        ),
        ("more.json", b"[]\n[1]", "{path}, line 2: text after the end of the JSON list"),
        (
            "ragged.csv",
            b'prompt,completion\na,b\n"a\nc",d\na,b,c\n',
            "{path}, line 5: 3 cells, but the header has 2 columns",
        ),
        (
            "quote.csv",
            b'prompt,completion\na,b\na,"b\nc,d\n',
            "{path}, line 3: not CSV (unexpected end of data)",
        ),
        ("twice.csv", b"text,text\na,b\n", "{path}, line 1: two columns have one name: 'text'"),
        (
            "columns.tsv",
            b"prompt,completion\na,b\n",
            "{path}, line 2: expected the fields text, messages",
        ),
        (
            "cell.csv",
            b"question,answer\na,\n",
            "{path}, line 2: 'answer' must be text that is not empty, got ''",
        ),
        (
            "half.jsonl",
            b'{"text": "a\\ud800"}',
            "{path}, line 1: 'text' has '\\ud800' at character 1, which is half of a",
        ),
        (
            "deep.jsonl",
            b'{"text": ' + b"[" * 100_000 + b"}",
            "{path}, line 1: JSON that cannot be read",
        ),
        ("packed.jsonl.gz", b"no gzip", "cannot read {path}: not a whole gzip file"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0", "cannot read {path}: not a whole gzip"),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CommandError) as error:
        read_records(path)
    assert str(error.value).startswith(complaint.format(path=path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"conversations": []}, "conversations must be a list of 2 or more, got []"),
        (
            {"conversations": [{"from": "human", "value": "q"}] * 2},
            "the last message must be the assistant's, got role 'user'",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
            "the last message must be the assistant's, got role 'user'",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "a"}] * 2},
            "'from' must be one of assistant, bot, chatgpt, ",
        ),
        (
            {"conversations": [{"from": "human", "value": ""}] * 2},
            "'value' must be text that is not empty, got ''",
        ),
        ({"messages": "[{oops"}, "messages must be a list of 2 or more, got '[{oops'"),
        ({"prompt": [], "completion": "c"}, "prompt must be a list of 1 or more, got []"),
        (
            {"prompt": "p", "completion": [{"role": "user", "content": "u"}]},
            "the last message must be the assistant's, got role 'user'",
        ),
        (
            {"instruction": "i", "output": "o", "history": [["q", "a"], ["q"]]},
            "'history' must be a list of pairs of texts, got ['q']",
        ),
        (
            {"instruction": "i", "output": "o", "history": [["q", None]]},
            "'history' must be text that is not empty, got None",
        ),
        ({"instruction": "i", "output": "o", "system": 3}, "'system' must be text"),
    ],
)
def test_records(tmp_path: Path, fields: Any, complaint: str) -> None:
    path = tmp_path / "data.jsonl"
    write_lines(path, [{"text": "fine"}, fields])
    with pytest.raises(CommandError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}, line 2: {complaint}")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write = CONTAINERS[path.name]
    write(path, [{"text": "a", "other": 1}, {"text": "", "other": 2}])
    with pytest.raises(CommandError, match=r"record 2: 'text' must be text .* got ''"):
        read_records(path)
    write(path, [{"body": "a", "other": 1}])
    with pytest.raises(CommandError, match=r"record 1: expected .* got \['body', 'other'\]"):
        read_records(path)
    write(path, [{"text": f"{i} " * 999} for i in range(2000)])
    whole = path.read_bytes()
    for content in (b"text", whole[: len(whole) // 2], b"PAR1" + b"\1" * 99 + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(CommandError, match=f"^cannot read {path}: ") as error:
            read_records(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole[:2000] + b"\1" * 3000 + whole[5000:])
    with pytest.raises(CommandError, match=f"^cannot read {path}"):
        read_records(path)


def test_plain_text_is_read_whole_and_so_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "LARGEST_TEXT", 1 << 20)
    path = tmp_path / "data.txt"
    path.write_text("a" * (1 << 20))
    assert len(read_records(path)[0].text) == 1 << 20
    path.write_text("a" * ((1 << 20) + 1))
    with pytest.raises(CommandError, match="is plain text of more than 1 MiB"):
        read_records(path)


@pytest.mark.parametrize(
    ("name", "package"), [("table.parquet", "pyarrow"), ("owner/name:test", "datasets")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == package else original(n)
    )
    monkeypatch.chdir(tmp_path)
    Path("table.parquet").write_bytes(b"PAR1")
    told = f"{package} not installed: pip install 'eaft_ext\\[data\\]' brings what it needs"
    with pytest.raises(CommandError, match=f"cannot read .*: {told}"):
        read_records(Path(name))
