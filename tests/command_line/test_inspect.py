"""``eaft-ext inspect``: what it says of the tokens of a text."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

MISSING = "needs transformers and rich; pip install 'eaft_ext[demo]' brings them"
transformers = pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("rich", reason=MISSING)

from demo_tiny_model import tiny_folder, tokenizer  # noqa: E402

import eaft_ext  # noqa: E402
from eaft_ext import reference  # noqa: E402
from eaft_ext._landscape import REGIONS  # noqa: E402
from eaft_ext.cli.batches import Batch, Example, collate  # noqa: E402
from eaft_ext.cli.errors import CommandError  # noqa: E402
from eaft_ext.cli.inspect import command, table  # noqa: E402
from eaft_ext.cli.inspect import tokens as inspect  # noqa: E402
from eaft_ext.cli.inspect.pieces import Pieces  # noqa: E402
from eaft_ext.cli.inspect.shares import Columns  # noqa: E402
from eaft_ext.cli.inspect.spool import Spool  # noqa: E402
from eaft_ext.cli.main import main  # noqa: E402

__all__ = ["tiny_folder", "tokenizer"]

K = 5


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).float().eval()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Running text and a conversation."""
    path = tmp_path / "data.jsonl"
    records = [
        {"text": "the statement is executed in the order of the class"},
        {"question": "which order?", "answer": "the order of the class"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def _read(model: Any, tokenizer: Any, rows: list[Example], k: int, gate: Any) -> list[Any]:
    pieces = Pieces(tokenizer)
    reader = inspect.Reader(model, pieces, k, gate)

    def look(batch: Batch) -> list[Any]:
        return [(view,) for view in reader(batch)]

    return [*inspect.read(rows, 0, pieces, look), *inspect.read(rows, len(rows), pieces, look)]


def test_tokens_are_those_of_the_reference(model: Any, tokenizer: Any) -> None:
    rows = [Example(list(range(5, 25))), Example(list(range(40, 50)), prompt_length=4)]
    batch = collate(rows)
    gate = eaft_ext.EntropyGate(2.0, 3.0)
    tokens = _read(model, tokenizer, rows, K, gate)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
    _, stats = reference.gated_ce(logits, batch.labels, K, gate=gate, return_stats=True)
    places = stats.valid.nonzero().tolist()
    assert [[token.row, token.position] for token in tokens] == [
        *places,
        *([row + 2, position] for row, position in places),
    ]
    p = logits.softmax(-1)
    for token, (row, position) in zip(tokens, places, strict=False):
        at = (row, position)
        view = token.view
        label = int(batch.labels[at])
        assert token.token == tokenizer.decode([label])
        five = p[at].topk(5)
        assert [text for text, _ in view.likeliest] == [
            tokenizer.decode([one]) for one in five.indices.tolist()
        ]
        assert [chance for _, chance in view.likeliest] == pytest.approx(
            five.values.tolist(), rel=1e-5
        )
        assert view.normalized_entropy == pytest.approx(view.entropy / math.log(K))
        expected = [p[at][label], stats.nll[at], stats.entropy[at], stats.gate[at]]
        assert [view.probability, view.nll, view.entropy, view.gate] == pytest.approx(
            [float(value) for value in expected], rel=1e-5
        )
        onehot = torch.zeros_like(p[at]).index_fill_(0, torch.tensor(label), 1)
        assert view.gradient == pytest.approx(float((p[at] - onehot).norm()), rel=1e-5)
        assert view.muted == pytest.approx((1 - view.gate) * view.nll)
        context = batch.input_ids[row, max(0, position - 11) : position + 1].tolist()
        assert token.before == tokenizer.decode(context)
        unlikely, sure = p[at][label] < 0.1, stats.entropy[at] < 0.3 * math.log(K)
        region = REGIONS[2 * (not sure) + (not unlikely)]
        assert view.region == region and view.is_conflict == bool(unlikely and sure)


def test_a_model_that_gives_nan(tokenizer: Any) -> None:
    class Broken(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 9), torch.nan))

    with pytest.raises(CommandError, match="logits are NaN"):
        _read(Broken(), tokenizer, [Example([1, 2, 3])], K, eaft_ext.EntropyGate())


def _view(nll: float, normalized: float, gate: float, region: str = "open") -> inspect.View:
    entropy = normalized * math.log(K)
    return inspect.View(math.exp(-nll), nll, entropy, normalized, gate, 1.0, region, [("b", 0.5)])


def test_summary() -> None:
    """Shares are of the sums over all tokens; a token on a bound belongs to the row above it."""
    views = [
        _view(6.0, 0.05, 0.05, "conflict"),
        _view(1.0, 0.5, 0.5),
        _view(1.0, 0.7, 0.7),
        _view(2.0, 1.2, 1.2),
    ]
    head, rows = table.summary(Columns.of(views, K))
    assert len(head) == 6
    found = {row[0]: row[1:] for row in rows}
    gated = 0.3 + 0.5 + 0.7 + 2.4
    assert found["0 to 0.1"] == ["25.0%", "6.000", "0.050", "60.0%", f"{0.3 / gated:.1%}"]
    assert found["0.1 to 0.3"] == ["0", "-", "-", "-", "-"]
    assert found["0.3 to 0.6"] == ["25.0%", "1.000", "0.500", "10.0%", f"{0.5 / gated:.1%}"]
    assert found["0.6 and above"] == ["50.0%", "1.500", "0.950", "30.0%", f"{3.1 / gated:.1%}"]
    assert found["confident conflict"] == found["0 to 0.1"]
    assert found["known"] == ["0", "-", "-", "-", "-"]
    assert found["all"] == ["100.0%", "2.500", f"{2.45 / 4:.3f}", "100.0%", "100.0%"]


def test_summary_of_what_is_known_already() -> None:
    _, rows = table.summary(Columns.of([_view(0.0, 0.0, 0.0)], K))
    assert rows[0][1:] == ["100.0%", "0.000", "0.000", "-", "-"]


def test_the_command(
    tiny_folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokens.jsonl"
    options = ["--model", str(tiny_folder), "--data", str(texts), "--device", "cpu"]
    options += ["--sequence-length", "16", "--k", str(K), "--output", str(output), "--show", "3"]
    assert main(["inspect", *options]) == 0
    out = capsys.readouterr().out
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert f"{len(written)} tokens of {texts}" in out
    assert "confident conflict" in out and "Most muted" in out
    worst = sorted(written, key=lambda token: -(1 - token["gate"]) * token["nll"])
    shown = out.partition("Most muted")[2].splitlines()[4:7]
    for token, line in zip(worst, shown, strict=False):
        assert f"{token['probability']:.1e}" in line
        assert line.rstrip().endswith(f"{token['gate']:.3f}")
    # Of the conversation, the answer alone is to be predicted.
    answer = "".join(token["token"] for token in written if token["row"] == 1)
    assert written[-1]["row"] >= 1 and "which" not in answer


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--output", "/nowhere/tokens.jsonl"], "cannot write --output /nowhere/tokens.jsonl"),
        (["--data", "/nowhere/text.txt"], "cannot read /nowhere/text.txt"),
        (["--model", "/nowhere/model"], "cannot load --model /nowhere/model"),
        (["--sequence-length", "1000"], "--sequence-length 1000 is above the model's limit of 128"),
    ],
)
def test_complaints(
    tiny_folder: Path,
    texts: Path,
    options: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = ["--model", str(tiny_folder), "--data", str(texts), "--device", "cpu"]
    assert main(["inspect", *usual, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"eaft-ext inspect: {complaint}") and error.count("\n") == 1


def _written(folder: Path, texts: Path, output: Path, *options: str) -> list[dict[str, Any]]:
    """The tokens of a run with short rows."""
    usual = ["--model", str(folder), "--data", str(texts), "--device", "cpu", "--k", str(K)]
    usual += ["--sequence-length", "8", "--output", str(output)]
    assert main(["inspect", *usual, *options]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_options_change_what_they_name(
    tiny_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def recorded(rows: Any, *others: Any) -> Any:
        sizes.append(len(rows))
        return original(rows, *others)

    original = command.read
    monkeypatch.setattr(command, "read", recorded)
    output = tmp_path / "tokens.jsonl"
    run = partial(_written, tiny_folder, texts, output)
    plain = run()
    squared = run("--alpha", "2")
    assert max(sizes) == 2
    sizes.clear()
    thirds = run("--normalizer", "3", "--batch-size", "1")
    assert set(sizes) == {1}
    for one, two, three in zip(plain, squared, thirds, strict=True):
        assert one["gate"] == pytest.approx(one["normalized_entropy"], rel=1e-5)
        assert two["gate"] == pytest.approx(one["gate"] ** 2, rel=1e-5)
        assert three["gate"] == pytest.approx(one["entropy"] / 3, rel=1e-5)
    assert len(plain) > 10
    assert len(run("--tokens", "1")) == 1
    for most in (2, 5, 10):  # the first token of a row is read, and not predicted
        assert 0 < len(run("--tokens", str(most))) < most


@pytest.mark.parametrize("asked", [7, 100, 333, 5000])
def test_as_many_tokens_are_read_as_asked_for(
    tiny_folder: Path,
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    asked: int,
) -> None:
    """Of conversations as of text; and the report says why fewer of them are predicted."""
    path = tmp_path / "data.jsonl"
    records = [
        {"question": f"which of the {i} ?" * (i % 5 + 1), "answer": "the order " * (i % 7 + 1)}
        for i in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    read: list[torch.Tensor] = []

    def recorded(model: Any, batch: Any) -> torch.Tensor:
        read.append(batch.input_ids)
        return original(model, batch)

    original = inspect.forward
    monkeypatch.setattr(inspect, "forward", recorded)
    # A row at a time: without padding.
    options = ("--tokens", str(asked), "--batch-size", "1", "--sequence-length", "48")
    rows = [
        [record["question"] + "\n", record["answer"] + tokenizer.eos_token] for record in records
    ]
    whole = sum(min(48, sum(len(tokenizer(part).input_ids) for part in row)) for row in rows)
    assert 1000 < whole < 5000
    if asked < 10:
        usual = ["--model", str(tiny_folder), "--data", str(path), "--device", "cpu"]
        assert main(["inspect", *usual, *options]) == 1
        assert "the 7 tokens that were read are all of a prompt" in capsys.readouterr().err
        return
    predicted = len(_written(tiny_folder, path, tmp_path / "tokens.jsonl", *options))
    found = sum(ids.numel() for ids in read)
    assert found == min(asked, whole)
    told = " ".join(capsys.readouterr().out.split())
    reason = ", all that rows of 48 have" if asked > whole else ""
    assert f"{predicted} tokens of {path}" in told
    assert f"{found} tokens were read{reason}; {found - predicted} are of prompts" in told


def test_a_small_vocabulary_and_what_cannot_be(tmp_path: Path) -> None:
    """k is at most the vocabulary; a label of probability 0 leaves the others as they are."""

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            logits = torch.tensor([0.0, 1.0, 1.0, -torch.inf]).expand(*input_ids.shape, 4)
            return SimpleNamespace(logits=logits)

    class Letters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join("abcd"[i] for i in ids)

    tokens = _read(Fixed(), Letters(), [Example([0, 1, 3])], 4, eaft_ext.EntropyGate())[:2]
    views = [token.view for token in tokens]
    p = torch.tensor([0.0, 1.0, 1.0]).softmax(-1)
    expected = float(-(p * p.log()).sum() / math.log(4))
    for view in views:
        assert view.gate == pytest.approx(expected) == view.normalized_entropy
        assert view.likeliest[0] == ("b", pytest.approx(float(p[1])))
    assert [view.probability for view in views] == pytest.approx([float(p[1]), 0])
    _, rows = table.summary(Columns.of(views, 4))
    assert rows[-1] == ["all", "100.0%", "inf", f"{expected:.3f}", "-", "-"]
    spool = Spool(tmp_path / "tokens.jsonl", {})
    spool.append(tokens, 1)
    lines = (tmp_path / "tokens.jsonl").read_text().splitlines()
    assert [json.loads(line)["nll"] is None for line in lines] == [False, True]
    assert list(spool) == tokens


def test_what_is_shown_is_on_one_line() -> None:
    assert table._shown("\N{SNOWMAN}", is_unicode=False).plain == "\\u2603"
    assert table._shown("a\nb [bold]").plain == "a\\nb [bold]"
    assert table._shown("x" * 40, last=36).plain == "..." + "x" * 36
