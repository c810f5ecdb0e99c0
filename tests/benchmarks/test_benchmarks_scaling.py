"""The benchmark of many sizes, what is made of its numbers, and the picture of them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import readme_tables
import scaling
from contenders.cases import TIMES, Case
from harness.timing import FORWARD, TOTAL
from reports.results import Result

MACHINE = {
    "device": "cpu", "model": "A CPU", "threads": 2, "cores": 2, "cpu_capability": "AVX2",
    "torch": "2", "eaft_ext": "0", "commit": "abc", "date": "2026-01-01T00:00:00",
}  # fmt: skip
ON_A_GPU = MACHINE | {"device": "cuda", "model": "A GPU", "driver": "1", "cuda": "13"}
TIMES_OF = {
    "copy": {"total": [1e-3]},
    "gated_ce": {"forward": [1e-3, 2e-3, 9e-3], "backward": [3e-3], "total": [4e-3]},
    "gated_ce_fused_inplace": {"forward": [3e-3], "backward": [1e-3], "total": [4e-3]},
}


def _raw(cases: Iterable[Case], machine: dict[str, Any] = MACHINE) -> dict[str, Any]:
    """A result file in which every case took the same time."""
    entries = [
        {
            "case": dataclasses.asdict(case),
            "seconds": TIMES_OF,
            "peak_bytes": {name: {"total": 2**20} for name in TIMES_OF},
        }
        for case in cases
    ]
    return {"machine": machine, "cases": entries}


def _all_cases(device: str = "cpu") -> list[Case]:
    return [Case(rows, words, "float32") for rows, words in scaling.SHAPES[device]]


def _write(folder: Path, raw: dict[str, Any], stem: str = "cpu-a-scaling") -> None:
    (folder / f"{stem}.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes(device: str) -> None:
    """One size and any vocabulary, or one vocabulary and any number of rows; none twice."""
    shapes = scaling.SHAPES[device]
    assert len(shapes) == len(set(shapes))
    result = Result(_raw(_all_cases(device), MACHINE | {"device": device}))
    of_one_size = [r.case for r in scaling.by_vocabulary(result)]
    of_one_vocabulary = [r.case for r in scaling.by_rows(result)]
    assert [case.vocab_size for case in of_one_size] == sorted(scaling.VOCABULARIES)
    assert {case.num_rows for case in of_one_vocabulary} >= set(scaling.ROWS[device])
    assert set(of_one_size) | set(of_one_vocabulary) == {r.case for r in result.cases}
    elements = [case.num_rows * case.vocab_size for case in of_one_size]
    assert min(elements) > 0.99 * max(elements)


def test_bandwidth() -> None:
    (of_case,) = Result(_raw([Case(500, 1000, "float32")])).cases
    assert scaling.bandwidth(of_case, "copy", FORWARD) == pytest.approx(2 * 2e6 / 1e-3)
    assert scaling.bandwidth(of_case, "copy", TOTAL) == pytest.approx(2 * 2e6 / 1e-3)
    assert scaling.bandwidth(of_case, "gated_ce", FORWARD) == pytest.approx(2e6 / 2e-3)
    assert scaling.bandwidth(of_case, "gated_ce", TOTAL) == pytest.approx(3 * 2e6 / 4e-3)
    # Its forward writes the gradient.
    assert scaling.bandwidth(of_case, "gated_ce_fused_inplace", FORWARD) is None
    assert scaling.bandwidth(of_case, "gated_ce_fused_inplace", TOTAL) is not None
    assert scaling.bandwidth(of_case, "eager", TOTAL) is None


@pytest.mark.slow
def test_a_quick_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick", "--output", str(tmp_path)])
    assert scaling.main() == 0
    (path,) = tmp_path.glob("*-scaling.json")
    cases = json.loads(path.read_text())["cases"]
    assert [case["case"]["vocab_size"] for case in cases] == [8_192, scaling.VOCABULARY]
    on_a_cpu = {"copy", "gated_ce", "gated_ce_inplace", "cross_entropy", "eager"}
    assert all(set(case["seconds"]) == on_a_cpu and not case["failed"] for case in cases)
    report = path.with_suffix(".md").read_text()
    assert f"| 16 {TIMES} 151,936 float32 |" in report and report in capsys.readouterr().out


def test_the_report() -> None:
    raw = _raw(_all_cases())
    raw["cases"][0]["failed"] = {"eager": "out of memory"}
    report = scaling.markdown(Result(raw))
    assert f"| 8,192 {TIMES} 4,096 float32 | 268 | 67.1 | - |" in report
    assert f"| 512 {TIMES} 151,936 float32 | 1.00 | 4.00 | 4.00 |" in report
    assert "- without eager: out of memory" in report


def test_other_shapes_are_no_error() -> None:
    """Asked for by hand, they are in no table."""
    result = Result(_raw([Case(4, 1000, "float32")]))
    assert "A CPU" in scaling.summary(result) and "A CPU" in scaling.markdown(result)


def test_the_page_takes_it_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    blocks = [f"<!-- benchmark:{name} -->\n<!-- /benchmark:{name} -->" for name in (
        "scaling", "scaling_cuda")]  # fmt: skip
    page.write_text("\n".join(blocks))
    _write(tmp_path, _raw(_all_cases()))
    _write(tmp_path, _raw(_all_cases("cuda"), ON_A_GPU), "cuda-a-scaling")
    options = ["--results", str(tmp_path), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", *options])
    readme_tables.main()
    text = page.read_text()
    assert "A CPU, 2 threads" in text and "(scaling-cpu.png)" in text
    assert "A GPU, driver 1" in text and "(scaling-cuda.png)" in text
    assert "logits of 128 MiB" in text and "logits of 4,096 MiB" in text


class TestPicture:
    @pytest.fixture(autouse=True)
    def plots(self) -> Any:
        pytest.importorskip("matplotlib", reason="needs matplotlib, of the demo extra")
        import plots

        return plots

    def test_lines(self, plots: Any) -> None:
        figure = plots.draw(Result(_raw(_all_cases())))
        forward, both, time, memory = figure.axes
        lines = {
            panel: {line.get_label(): line for line in panel.get_lines()} for panel in figure.axes
        }
        ours = lines[forward]["gated_ce"]
        assert list(ours.get_xdata()) == sorted(scaling.VOCABULARIES)
        result = Result(_raw(_all_cases()))
        expected = [
            scaling.bandwidth(r, "gated_ce", FORWARD) for r in scaling.by_vocabulary(result)
        ]
        assert list(ours.get_ydata()) == [rate / 1e9 for rate in expected if rate]
        assert set(lines[forward]) == {"copy", "gated_ce"}
        (copy,) = {scaling.bandwidth(r, "copy", FORWARD) for r in scaling.by_vocabulary(result)[:1]}
        assert copy is not None
        assert lines[forward]["copy"].get_ydata()[0] == pytest.approx(copy / 1e9, rel=0.01)
        assert len(lines[both]) == len(lines[time]) == 3
        assert list(lines[time]["gated_ce"].get_ydata()) == [4] * len(
            lines[time]["gated_ce"].get_xdata()
        )
        assert set(lines[memory]["gated_ce"].get_ydata()) == {1}
        assert "copy into existing memory" not in lines[memory]

    def test_every_contender_has_a_style(self, plots: Any) -> None:
        assert (
            {c.name for c in scaling.SCALING_CONTENDERS} == set(scaling.NAMES) == set(plots.STYLES)
        )

    def test_the_check_sees_what_is_out_of_date(
        self, plots: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        options = ["plots.py", "--results", str(tmp_path), "--root", str(tmp_path)]

        def run(*more: str) -> None:
            monkeypatch.setattr(sys, "argv", [*options, *more])
            plots.main()

        with pytest.raises(SystemExit, match="no result of scaling"):
            run()
        _write(tmp_path, _raw(_all_cases()))
        with pytest.raises(SystemExit, match="does not show the newest result"):
            run("--check")
        run()
        run("--check")
        _write(tmp_path, _raw(_all_cases(), MACHINE | {"date": "2026-02-01T00:00:00"}))
        with pytest.raises(SystemExit, match="does not show the newest result"):
            run("--check")
