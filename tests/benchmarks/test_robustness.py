"""The page of what was tried: it shows the result file, and names every kind of fault."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import robustness


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, arguments)])
    return robustness.main()


def test_the_page_shows_the_result_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _main(monkeypatch, "--check") == 0
    page = tmp_path / "robustness.md"
    page.write_text(robustness.PAGE.read_text().replace("property examples", "proofs"))
    with pytest.raises(SystemExit, match="does not show the result file"):
        _main(monkeypatch, "--check", "--page", page)
    assert _main(monkeypatch, "--write", "--page", page) == 0
    assert page.read_text() == robustness.PAGE.read_text()


def test_what_the_sanitizers_found_is_told() -> None:
    raw = json.loads(robustness.RESULT.read_text())
    parts = [
        {"part": "rows", "what": "inputs", "count": 1234, "edges": 77, "reports": 1},
        {"part": "threads", "what": "program", "count": 1, "reports": 0},
    ]
    part = {"count": 1234, "of_each": parts, "failed": ["rows"]}
    part |= {"seconds": 90, "date": "2026-01-01", "commit": "abc"}
    shown = robustness.summary(raw | {"sanitizers": part})
    assert "| 1,234 | 1 | 1.50 | abc, 2026-01-01 | rows: 1,234 inputs, 77 edges covered; " in shown
    assert "; threads: 1 program |" in shown


def test_every_kind_of_fault_is_named() -> None:
    files = {path.stem for path in (robustness.SOAK.parent).glob("test_*.py")}
    assert files - {"test_soak"} == set(robustness.KINDS)
