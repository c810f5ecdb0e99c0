"""What ``--data`` reads: the same records in every form and in every kind of file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from data_files import (
    CONTAINERS,
    FORMS,
    PAIRS,
    WITHOUT_DATASETS,
    conversation,
    write_lines,
    write_saved,
)

MISSING = "needs transformers and rich; pip install 'eaft_ext[demo]' brings them"
pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("rich", reason=MISSING)

from demo_tiny_model import tiny_folder, tokenizer  # noqa: E402

from eaft_ext.cli import batches  # noqa: E402
from eaft_ext.cli.demo import corpus  # noqa: E402
from eaft_ext.cli.errors import CommandError  # noqa: E402
from eaft_ext.cli.main import main  # noqa: E402
from eaft_ext.cli.records import Part, Record, json_list, lines, read_records  # noqa: E402
from eaft_ext.cli.records import source as sources  # noqa: E402

__all__ = ["tiny_folder", "tokenizer"]

LONG = [
    conversation(f'the "{i}", is\nthe class', "order é", "which\tone?", f"the {i}th", system="Be.")
    for i in range(11)
]
SHORT = [conversation(f"which of {i},\nthe order", f"the class {i}") for i in range(11)]


def expected(conversations: list[Any]) -> list[Record]:
    return [Record(c[-1]["content"], tuple(c[:-1])) for c in conversations]


def same_batches(records: Any, others: Any, tokenizer: Any) -> bool:
    def made(read: Any, turns: str) -> list[Any]:
        options: Any = {"length": 48, "turns": turns, "batch_size": 2}
        found = batches.training_batches(read, tokenizer, steps=3, seed=5, **options)
        found += batches.evaluation_batches(read, tokenizer, max_tokens=300, **options)
        return [[batch.input_ids.tolist(), batch.labels.tolist()] for batch in found]

    return all(made(records, turns) == made(others, turns) for turns in ("last", "all"))


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("form", "container"),
    [
        (form, container)
        for form in FORMS
        for container in CONTAINERS
        if form != "trl" or container not in ("table.csv", "table.tsv")  # there a prompt is text
    ],
)
def test_conversations_are_the_same_in_every_form_and_file(
    tmp_path: Path, tokenizer: Any, form: str, container: str
) -> None:
    path = tmp_path / container
    CONTAINERS[container](path, [FORMS[form](messages) for messages in LONG])
    records = read_records(path)
    assert list(records) == expected(LONG)
    assert same_batches(records, expected(LONG), tokenizer)


@pytest.mark.parametrize("form", [*PAIRS, *FORMS])
def test_requests_are_the_same_in_every_form(
    tmp_path: Path, tiny_folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the weights that ``inspect`` writes."""
    written = []
    for name, of in (("a", PAIRS["question"]), ("b", {**PAIRS, **FORMS}[form])):
        data, output = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.out"
        write_lines(data, [of(messages) for messages in SHORT])
        options = ["--model", str(tiny_folder), "--data", str(data), "--output", str(output)]
        assert main(["inspect", *options, "--device", "cpu", "--sequence-length", "64"]) == 0
        written.append(output.read_text())
    assert written[0] == written[1] and written[0].count("\n") > 50


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", PAIRS)
def test_requests_are_the_same_in_every_file(tmp_path: Path, form: str, container: str) -> None:
    path = tmp_path / container
    CONTAINERS[container](path, [PAIRS[form](messages) for messages in SHORT])
    records = read_records(path)
    assert list(records) == expected(SHORT)
    assert records[-1] == expected(SHORT)[-1]
    assert list(records[2:9:3]) == expected(SHORT)[2:9:3]
    with pytest.raises(IndexError):
        records[len(SHORT)]


@pytest.mark.parametrize(
    ("fields", "roles"),
    [
        (
            {"conversations": [["human", "q"], ["observation", "o"], ["gpt", "a"]]},
            ["user", "tool"],
        ),
        (
            {"conversations": [["user", "q"], ["function_call", "f"], ["tool", "t"], ["bot", "a"]]},
            ["user", "assistant", "tool"],
        ),
        (
            {"system": "s", "conversations": [["human", "q"], ["model", "a"]]},
            ["system", "user"],
        ),
        ({"system": "", "conversations": [["human", "q"], ["chatgpt", "a"]]}, ["user"]),
    ],
)
def test_speakers_of_sharegpt(tmp_path: Path, fields: Any, roles: list[str]) -> None:
    turns = [{"from": speaker, "value": value} for speaker, value in fields["conversations"]]
    path = tmp_path / "data.jsonl"
    write_lines(path, [{**fields, "conversations": turns}])
    (record,) = read_records(path)
    assert [message["role"] for message in record.conversation] == roles
    assert record.text == "a"


def test_a_prompt_in_text_and_a_completion_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_lines(path, [{"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]}])
    assert list(read_records(path)) == [Record("c", ({"role": "user", "content": "p"},))]


def test_the_demo_divides_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text\n" + "".join(f"record {i % 20}\n" for i in range(60)))
    divided = corpus.read_corpus(path)
    held_out = {record.text for record in divided.held_out}
    assert len(held_out) == 4 and len(divided.held_out) == 12
    assert len(divided.train) == 48
    assert held_out.isdisjoint(record.text for record in divided.train)


class TestReadingLittle:
    def test_records_are_read_when_they_are_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "data.jsonl"
        write_lines(path, [{"text": f"record {i}"} for i in range(1000)])
        records = read_records(path)
        assert not isinstance(records, list) and len(records) == 1000
        parsed: list[str] = []
        original = lines.parse_json

        def counted(line: str, where: str) -> Record:
            parsed.append(where)
            return original(line, where)

        monkeypatch.setattr(lines, "parse_json", counted)
        part = Part(records, range(900, 1000))
        assert [part[3].text, records[7].where] == ["record 903", f"{path}, line 8"]
        assert parsed == [f"{path}, line 904", f"{path}, line 8"]

    @pytest.mark.parametrize("name", ["data.jsonl", "table.csv", "list.json", "table.parquet"])
    def test_memory_is_that_of_a_chunk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Of Python's own; Arrow's is that of a row group."""
        import tracemalloc

        monkeypatch.setattr(json_list, "CHUNK", 1 << 14)
        path = tmp_path / name
        writer = {**CONTAINERS, "data.jsonl": write_lines}[name]
        writer(path, [{"text": f"{i} " * 500} for i in range(4000)])
        tracemalloc.start()
        records = read_records(path)
        read = sum(len(record.text) for record in records)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert read > 9_000_000
        assert peak < 2_500_000

    @pytest.mark.parametrize("chunk", [1, 7, 64])
    def test_a_list_is_the_same_in_chunks_of_any_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
    ) -> None:
        monkeypatch.setattr(json_list, "CHUNK", chunk)
        path = tmp_path / "list.json"
        CONTAINERS["list.json"](path, [{"messages": messages, "n": -1.5e3} for messages in LONG])
        assert list(read_records(path)) == expected(LONG)

    @pytest.mark.parametrize(
        ("name", "before", "after"),
        [
            ("long.jsonl", b'{"text": "a"}\n{"text": "', b"line 2"),
            ("long.csv", b"text\na\n", b"line 3"),
            ("long.json", b'[{"text": "a"},\n {"text": "', b"record 2 (line 2)"),
        ],
    )
    def test_a_line_without_an_end_is_not_read_to_its_end(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        before: bytes,
        after: bytes,
    ) -> None:
        monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 20)
        path = tmp_path / name
        with path.open("wb") as file:
            file.write(before + b"x" * (8 << 20))
            size = file.tell()
        read = 0
        opened = sources.opened

        def counted(at: Path) -> Any:
            file = opened(at)

            class Counted:
                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def read(self, limit: int) -> bytes:
                    return self._counted(file.read(limit))

                def readline(self, limit: int) -> bytes:
                    return self._counted(file.readline(limit))

                def _counted(self, found: bytes) -> bytes:
                    nonlocal read
                    read += len(found)
                    return found

            return Counted()

        monkeypatch.setattr(sources, "opened", counted)
        with pytest.raises(CommandError) as error:
            read_records(path)
        assert (
            str(error.value) == f"{path}, {after.decode()}: longer than 1 MiB, which is no record"
        )
        assert read < size / 2


class TestDatasets:
    @pytest.mark.parametrize("container", ["saved-splits", "folder"])
    def test_a_split_of_a_folder(self, tmp_path: Path, container: str) -> None:
        rows = [PAIRS["prompt"](messages) for messages in SHORT]
        CONTAINERS[container](tmp_path / container, rows)
        records = read_records(tmp_path / f"{container}:test")
        assert list(records) == expected(SHORT[:1])
        assert records[0].where == f"{tmp_path / container}, record 1"
        with pytest.raises(CommandError) as error:
            read_records(tmp_path / f"{container}:validation")
        assert "validation" in str(error.value) and "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("name", "asked"),
        [
            ("owner/name", ("owner/name", None, "train")),
            ("name", ("name", None, "train")),
            ("owner/name:test", ("owner/name", None, "test")),
            ("owner/name-1.5:train[:10%]", ("owner/name-1.5", None, "train[:10%]")),
            ("owner/name:main:test", ("owner/name", "main", "test")),
        ],
    )
    def test_a_name_on_a_hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[Any, ...]
    ) -> None:
        datasets = pytest.importorskip("datasets", reason=WITHOUT_DATASETS)
        monkeypatch.chdir(tmp_path)
        found = []

        def load_dataset(name: str, configuration: str | None, split: str) -> Any:
            found.append((name, configuration, split))
            return datasets.Dataset.from_list([{"text": "a", "n": 1}, {"text": "b", "n": 2}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert list(read_records(Path(name))) == [Record("a"), Record("b")]
        assert found == [asked]

    def test_what_a_hub_does_not_have(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        datasets = pytest.importorskip("datasets", reason=WITHOUT_DATASETS)
        monkeypatch.chdir(tmp_path)

        def load_dataset(*_: Any, **__: Any) -> Any:
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist\nmore")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(CommandError) as error:
            read_records(Path("a/b"))
        assert str(error.value) == (
            "there is no file a/b, and the data set a/b cannot be loaded: "
            "Dataset 'a/b' doesn't exist"
        )

    def test_a_bad_row_is_named(self, tmp_path: Path) -> None:
        write_saved(tmp_path / "saved", [{"text": "a"}, {"text": " "}])
        with pytest.raises(CommandError, match="record 2: 'text' must be text that is not empty"):
            read_records(tmp_path / "saved")

    @pytest.mark.parametrize("name", ["data/own.txt", "nowhere.jsonl", "here/mine"])
    def test_a_file_that_is_not_there_is_not_sought_on_a_hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("here").mkdir()
        with pytest.raises(CommandError, match=f"^cannot read {name}: No such file"):
            read_records(Path(name))


def test_json_within_json_of_a_table_stays_as_it_is(tmp_path: Path) -> None:
    """A text that looks like a list is text."""
    path = tmp_path / "data.jsonl"
    write_lines(path, [{"question": "[1]", "answer": json.dumps([{"role": "a"}])}])
    assert read_records(path)[0].text == '[{"role": "a"}]'
