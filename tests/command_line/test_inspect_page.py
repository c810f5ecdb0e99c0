"""The page of ``eaft-ext inspect --html``: what it holds, its size, and a run that was stopped."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

MISSING = "needs transformers, rich and matplotlib; pip install 'eaft_ext[demo]' brings them"
for _name in ("transformers", "rich", "matplotlib"):
    pytest.importorskip(_name, reason=MISSING)

from demo_tiny_model import tiny_folder  # noqa: E402
from inspect_page import (  # noqa: E402
    HOSTILE,
    PLAIN,
    inspect,
    save_sure_model,
    sure_folder,
    tokens_of,
    tuned_folder,
    write_texts,
)

from eaft_ext._landscape import REGIONS  # noqa: E402
from eaft_ext.cli.inspect import command, page  # noqa: E402
from eaft_ext.cli.inspect.page.safe import safe  # noqa: E402

__all__ = ["sure_folder", "tiny_folder", "tuned_folder"]


class Read(HTMLParser):
    """The elements of a page: texts of rows, of cells by table row, of scripts."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.rows: list[str] = []
        self.counts: dict[str, int] = {}
        self.scripts: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self._inside: str = ""
        self._region = ""
        self.feed(file.read_text("utf-8"))
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        given = dict(attrs)
        self.links += [given[name] or "" for name in ("src", "href", "xlink:href") if name in given]
        if tag == "tr":
            self._region = given.get("data-region") or ""
        self._inside = tag if tag == "script" else given.get("class") or ""
        if self._inside == "text":
            self.rows.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "text":
            self.rows[-1] += data
        elif self._inside == "count" and self._region:
            self.counts[self._region] = int(data)
        elif self._inside == "script":
            self.scripts[-1] += data


def _regions(tokens: list[dict[str, Any]], name: str | None = None) -> list[str]:
    """Where the numbers of a JSONL file put its tokens."""
    found = []
    for token in tokens:
        view = token if name is None else token[name]
        sure, unlikely = view["normalized_entropy"] < 0.3, view["probability"] < 0.1
        found.append(REGIONS[2 * (not sure) + (not unlikely)])
    return found


def test_counts_are_those_of_the_tokens(sure_folder: Path, tmp_path: Path) -> None:
    """The page's, and those that its script counts, from the numbers in the JSONL file."""
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    html, output = tmp_path / "page.html", tmp_path / "tokens.jsonl"
    assert inspect(sure_folder, data, "--html", str(html), "--output", str(output)) == 0
    tokens = tokens_of(output)
    regions = _regions(tokens)
    found = Read(html)
    expected = {name: regions.count(name) for name in REGIONS} | {"all": len(tokens)}
    assert found.counts == expected and min(expected.values()) > 0
    digits = "".join(row["views"][0]["region"] for row in found.data["rows"])
    assert [REGIONS[int(digit)] for digit in digits] == regions
    assert [token["region"] for token in tokens] == regions
    assert len(found.rows) == len(PLAIN)
    for text, row, said in zip(found.rows, found.data["rows"], PLAIN, strict=True):
        assert f"{said}<eos>" in text and sum(row["lengths"]) == len(text)
        begins = [sum(row["lengths"][:position]) for position in row["positions"]]
        pieces = [
            text[begin : begin + row["lengths"][position]]
            for begin, position in zip(begins, row["positions"], strict=True)
        ]
        assert "".join(pieces) == f"{said}<eos>"


def test_nothing_is_fetched_and_no_text_is_code(sure_folder: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data.jsonl", HOSTILE)
    html = tmp_path / "page.html"
    assert inspect(sure_folder, data, "--html", str(html)) == 0
    found = Read(html)
    assert found.tags["script"] == 2 and found.tags["img"] == 0
    assert {re.match(r"#|data:image/png", link) is not None for link in found.links} == {True}
    text = html.read_text("utf-8")
    assert not re.search(r"url\((?!#)|@import", text)
    assert "default-src 'none'" in text
    for row, hostile in zip(found.rows, HOSTILE, strict=True):
        assert safe(hostile)[:60] in row
    lengths = [sum(row["lengths"]) for row in found.data["rows"]]
    assert lengths == [len(row.encode("utf-16-le")) // 2 for row in found.rows]


def test_two_models(sure_folder: Path, tuned_folder: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    html, output = tmp_path / "page.html", tmp_path / "tokens.jsonl"
    files = ("--html", str(html), "--output", str(output))
    assert inspect(sure_folder, data, "--against", str(tuned_folder), *files) == 0
    tokens = tokens_of(output)
    alone = tmp_path / "alone.jsonl"
    assert inspect(tuned_folder, data, "--output", str(alone)) == 0
    for token, other in zip(tokens, tokens_of(alone), strict=True):
        assert token["after"] == {name: other[name] for name in token["after"]}
    moves = Counter(zip(_regions(tokens), _regions(tokens, "after"), strict=True))
    text = html.read_text("utf-8")
    for (before, after), count in moves.items():
        button = rf'data-filter="{before}" data-after="{after}">{count}<'
        assert re.search(button, text), (before, after)
    assert len(moves) > 4


def test_a_model_with_another_tokenizer(
    sure_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    save_sure_model(other)
    file = other / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.write_text(json.dumps(settings))
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    assert inspect(sure_folder, data, "--against", str(other)) == 1
    assert f"--against {other}: its tokenizer is another" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["--output", "--html"])
def test_a_run_that_was_stopped_goes_on(
    sure_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """At half time, in the middle of a write: the page and the tokens are the same in the end."""
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    whole, again = tmp_path / "whole.html", tmp_path / "again.html"
    tokens = tmp_path / "tokens.jsonl"
    more = ("--output", str(tokens)) if kept == "--output" else ()
    assert inspect(sure_folder, data, "--html", str(whole), *more) == 0
    written = tokens.read_bytes() if more else b""
    rows: list[int] = []
    original = command.read

    def stopped(some: Any, first: int, *others: Any) -> Any:
        for count, token in enumerate(original(some, first, *others)):
            if first == 10 and count == 5 and 10 not in rows:
                rows.append(first)
                raise KeyboardInterrupt
            yield token
        rows.append(first)

    monkeypatch.setattr(command, "read", stopped)
    assert inspect(sure_folder, data, "--html", str(again), *more) == 130
    assert rows == [0, 2, 4, 6, 8, 10] and not again.exists()
    assert inspect(sure_folder, data, "--html", str(again), *more) == 0
    assert rows[6:] == [10, 12, 14, 16, 18]
    assert again.read_bytes() == whole.read_bytes()
    assert (tokens.read_bytes() if more else b"") == written
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"data.jsonl", "whole.html", "again.html", *([tokens.name] if more else [])}


@contextmanager
def stopped_at_half_time() -> Iterator[None]:
    """As by Ctrl-C when the eleventh row comes."""
    original = command.read

    def stopped(some: Any, first: int, *others: Any) -> Any:
        if first == 10:
            raise KeyboardInterrupt
        return original(some, first, *others)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "read", stopped)
        yield


def test_other_settings_begin_anew(sure_folder: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    output = tmp_path / "tokens.jsonl"
    with stopped_at_half_time():
        assert inspect(sure_folder, data, "--output", str(output)) == 130
    assert inspect(sure_folder, data, "--output", str(output), "--alpha", "2") == 0
    tokens = tokens_of(output)
    assert [t["gate"] for t in tokens] == pytest.approx(
        [t["normalized_entropy"] ** 2 for t in tokens], rel=1e-5
    )
    assert {token["row"] for token in tokens} == set(range(len(PLAIN)))


def test_more_texts_than_are_shown(
    sure_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with most muted loss stay; the counts are of all."""
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    html, output = tmp_path / "page.html", tmp_path / "tokens.jsonl"
    monkeypatch.setattr(page, "MOST_TOKENS", 200)
    assert inspect(sure_folder, data, "--html", str(html), "--output", str(output)) == 0
    tokens = tokens_of(output)
    muted: Counter[int] = Counter()
    for token in tokens:
        muted[token["row"]] += (1 - token["gate"]) * token["nll"]
    found = Read(html)
    assert found.counts["all"] == len(tokens) > 200
    most = sorted(row for row, _ in muted.most_common(len(found.rows)))
    assert 0 < len(found.rows) < len(PLAIN)
    assert [PLAIN[row] in text for row, text in zip(most, found.rows, strict=True)] == [True] * len(
        most
    )
    left_out = len(PLAIN) - len(found.rows)
    assert f"{left_out} of {len(PLAIN)} texts are not shown" in html.read_text("utf-8")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plots(sure_folder: Path, tmp_path: Path, suffix: str) -> None:
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    plot = tmp_path / f"plot{suffix}"
    assert inspect(sure_folder, data, "--plot", str(plot)) == 0
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert plot.read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--plot", "plot.gif"), "--plot must end in .png, .svg, .pdf, got plot.gif"),
        (("--html", "/nowhere/page.html"), "cannot write --html /nowhere/page.html: not a file"),
    ],
)
def test_complaints(
    sure_folder: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    assert inspect(sure_folder, data, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"eaft-ext inspect: {complaint}") and error.count("\n") == 1


@pytest.mark.parametrize("twice", [("--data", "--html"), ("--output", "--html")])
def test_a_file_that_is_given_twice(
    sure_folder: Path,
    tmp_path: Path,
    twice: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The data, and what was written before, stay."""
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    before = data.read_bytes()
    file = data if "--data" in twice else tmp_path / "other"
    more = () if "--data" in twice else ("--output", str(file))
    assert inspect(sure_folder, data, "--html", f"{tmp_path}/./{file.name}", *more) == 1
    one, other = (name.removeprefix("--") for name in twice)
    assert f"--{one} and --{other} are the same file" in capsys.readouterr().err
    assert data.read_bytes() == before


def test_rows_are_made_for_the_first_model(
    sure_folder: Path, tuned_folder: Path, tmp_path: Path
) -> None:
    """A second model with a chat template changes nothing of what the first is shown."""
    chat = tmp_path / "chat"
    shutil.copytree(tuned_folder, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}"
    )
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    alone, beside = tmp_path / "alone.jsonl", tmp_path / "beside.jsonl"
    assert inspect(sure_folder, data, "--output", str(alone)) == 0
    assert inspect(sure_folder, data, "--against", str(chat), "--output", str(beside)) == 0
    without = [{k: v for k, v in token.items() if k != "after"} for token in tokens_of(beside)]
    assert without == tokens_of(alone)


def test_a_model_that_was_trained_on_begins_anew(
    sure_folder: Path, tuned_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(sure_folder, model)
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    output, alone = tmp_path / "tokens.jsonl", tmp_path / "alone.jsonl"
    with stopped_at_half_time():
        assert inspect(model, data, "--output", str(output)) == 130
    shutil.copy(tuned_folder / "model.safetensors", model)
    assert inspect(model, data, "--output", str(output)) == 0
    assert inspect(tuned_folder, data, "--output", str(alone)) == 0
    assert output.read_bytes() == alone.read_bytes()


def test_a_row_without_a_token_to_predict_is_not_left_out(
    sure_folder: Path, tmp_path: Path
) -> None:
    """The last row is cut within its prompt."""
    data = write_texts(tmp_path / "data.jsonl", PLAIN)
    html, output = tmp_path / "page.html", tmp_path / "tokens.jsonl"
    files = ("--html", str(html), "--output", str(output))
    for count in range(100, 130):
        assert inspect(sure_folder, data, *files, "--tokens", str(count)) == 0
        rows = {token["row"] for token in tokens_of(output)}
        assert "are not shown" not in html.read_text("utf-8")
        if f"<dd>{len(rows) + 1}</dd>" in html.read_text("utf-8"):
            return
    pytest.fail("no row was cut within its prompt")


def test_names_that_try_to_break_the_page(sure_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<b>\N{RIGHT-TO-LEFT OVERRIDE}x"
    folder.mkdir()
    data = write_texts(folder / "data.jsonl", PLAIN)
    html = tmp_path / "page.html"
    assert inspect(sure_folder, data, "--html", str(html)) == 0
    text = html.read_text("utf-8")
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in text and "&lt;b&gt;[U+202E]x" in text
