"""The model of benchmarks/reports/costs.py against real runs: bytes, collectives and memory.

Bytes that operators move and collectives that they ask for are those of the model, exactly. Memory
is, but for what has one number a token.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import cost_model
import pytest
from cost_model_worker import CHUNK, HIDDEN, OWN_WORDS, TOKENS, K
from reports import costs
from reports.costs import Call, Cost
from spawned import Runs, by_size

FLOAT32 = 4
SCALARS = 64
"""Bytes of what has one number a call."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each process found, for each number of processes."""
    return Runs(Path(__file__).with_name("cost_model_worker.py"), tmp_path_factory)


def predicted(name: str, world_size: int, columns: int) -> Cost:
    """What the model says of a case of cost_model_worker.py."""
    words = sum(OWN_WORDS[world_size])
    call = Call(TOKENS, words, HIDDEN, K, processes=world_size, own_words=columns)
    alone = replace(call, processes=1, words=columns)
    square = replace(call, tokens=TOKENS // 2, processes=2, words=2 * columns)
    rows = costs.logits_loss(square)
    wide = replace(call, item=FLOAT32)
    cases = {
        "logits": lambda: costs.logits_loss(call),
        "logits in place": lambda: costs.logits_loss(call, in_place=True),
        "logits in forward": lambda: costs.logits_loss(call, in_forward=True),
        "logits in forward in place": lambda: costs.logits_loss(call, True, True),
        "eager": lambda: costs.eager_loss(call),
        "alone": lambda: costs.logits_loss(alone),
        "rows and vocabulary": lambda: costs.rows_divided(rows),
        "rows and vocabulary, counted": lambda: costs.rows_divided(rows, counts=False),
        "output layer": lambda: costs.output_layer(wide),
        "linear": lambda: costs.linear_loss(wide, CHUNK),
        "linear parts": lambda: costs.linear_loss(wide, CHUNK, reduce_hidden=False),
        "linear sequence": lambda: costs.linear_loss(wide, CHUNK, sequence=True),
        "linear alone": lambda: costs.linear_loss(replace(alone, item=FLOAT32), CHUNK),
    }
    return cases[name]()


CASES = [
    (1, "logits"),
    (1, "logits in place"),
    (1, "logits in forward"),
    (1, "logits in forward in place"),
    (1, "output layer"),
    (1, "linear"),
    (1, "eager"),
    *((n, name) for n in (2, 3, 4) for name in ("logits", "logits in place")),
    *((n, name) for n in (2, 3, 4) for name in ("linear", "linear parts")),
    *((n, name) for n in (2, 3, 4) for name in ("alone", "linear alone")),
    *((n, name) for n in (2, 4) for name in ("eager", "linear sequence")),
    (4, "rows and vocabulary"),
    (4, "rows and vocabulary, counted"),
]
each_case = pytest.mark.parametrize(("world_size", "name"), by_size(CASES))


@each_case
def test_bytes_moved_and_products(results: Runs, world_size: int, name: str) -> None:
    for found in results[world_size]:
        cost = predicted(name, world_size, found["columns"])
        assert (found[name]["forward"], found[name]["backward"]) == (cost.forward, cost.backward)
        assert found[name]["products"] == cost.products


def _sums(sent: list[tuple[str, str, int, int]]) -> dict[tuple[str, str], tuple[int, int]]:
    """How many collectives there are of each name and group, and their bytes."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for name, group, count, given in sent:
        counts, total = sums.get((name, group), (0, 0))
        sums[name, group] = counts + count, total + given
    return sums


@each_case
def test_collectives(results: Runs, world_size: int, name: str) -> None:
    for found in results[world_size]:
        cost = predicted(name, world_size, found["columns"])
        for direction, collectives in (
            ("sent forward", cost.sent_forward),
            ("sent backward", cost.sent_backward),
        ):
            expected = [(c.name, c.group, c.count, c.given) for c in collectives]
            assert _sums([(n, g, 1, b) for n, g, b in found[name][direction]]) == _sums(expected)


@each_case
def test_memory(results: Runs, world_size: int, name: str) -> None:
    for found in results[world_size]:
        cost = predicted(name, world_size, found["columns"])
        small = costs.STATS_BYTES * TOKENS + SCALARS
        assert 0 <= found[name]["kept"] - cost.kept <= small
        # Gloo copies what it gathers, which no other backend does.
        sent = found[name]["sent forward"]
        copy = world_size * max((given for op, _, given in sent if op == "all_gather"), default=0)
        limit = small if name == "eager" else small + copy
        assert 0 <= found[name]["peak"] - cost.peak <= limit


@pytest.mark.parametrize("world_size", by_size([2, 3, 4]))
def test_notes_are_short_and_need_no_collective(results: Runs, world_size: int) -> None:
    """They go through the store; what test_collectives saw is all that goes through a group."""
    for found in results[world_size]:
        assert len(found["notes"]) == 2
        assert max(found["notes"]) <= costs.NOTE_BYTES


def test_the_page_shows_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "scaling.md"
    page.write_text(cost_model.PAGE.read_text("utf-8"), "utf-8")

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["cost_model.py", "--page", str(page), *options])
        cost_model.main()

    run("--check")
    run()
    assert cost_model.times() in capsys.readouterr().out
    monkeypatch.setattr(cost_model, "SEQUENCE", 2 * cost_model.SEQUENCE)
    with pytest.raises(SystemExit, match="does not show what the model says"):
        run("--check")
    run("--write")
    run("--check")
    page.write_text(page.read_text("utf-8").replace("<!-- scaling-model:times -->", ""), "utf-8")
    with pytest.raises(SystemExit, match="has no block from <!-- scaling-model:times -->"):
        run("--write")
