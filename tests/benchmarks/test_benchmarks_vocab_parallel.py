"""The benchmark of shards of the vocabulary: a run in small, and what is made of its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import readme_tables
import torch
import vocab_parallel
from contenders.cases import TIMES, Case
from contenders.shards import CONTENDERS, INPLACE, MEGATRON, NO_GATE, OURS
from harness.timing import HELD
from reports.bounds import evaluate
from reports.results import Result

import eaft_ext

BENCHMARKS = Path(vocab_parallel.__file__).parent
TIMEOUT = 120
SHAPE = (16, 256)
NAME = "cpu-a-cpu-vocab-parallel.json"

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch was built without torch.distributed or without gloo",
)


def _python(*command: object) -> subprocess.CompletedProcess[str]:
    """A process that ends those that it started, also if its time is up."""
    path = os.pathsep.join(map(str, (Path(eaft_ext.__file__).parents[1], BENCHMARKS)))
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=BENCHMARKS,  # where there is no eaft_ext beside the one under test
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.terminate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    shape = "x".join(map(str, SHAPE))
    options = ["--quick", "--shapes", shape, "--dtypes", "bfloat16", "--output", tmp_path]
    done = _python(BENCHMARKS / "vocab_parallel.py", *options)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("cpu-") and path.name.endswith("-vocab-parallel.json")
    raw = json.loads(path.read_text())
    machine = raw["machine"]
    assert {"date", "torch", "eaft_ext", "commit", "compiler"} <= set(machine)
    assert machine["processes"] == 2 and machine["threads"] == 2

    names = [OURS, INPLACE, NO_GATE]
    if machine["megatron_core"]:
        names.append(MEGATRON)
    else:
        assert "pip install 'megatron-core'" in done.stderr
    (case,) = raw["cases"]
    assert case["case"] == {"num_rows": 16, "vocab_size": 256, "dtype": "bfloat16"}
    assert case["failed"] == {}
    assert len(case["ranks"]) == 2
    for rank in case["ranks"]:
        assert list(rank["seconds"]) == names
        for phases in rank["seconds"].values():
            assert list(phases) == ["forward", "backward", "total"]
            assert all(len(times) == 3 and min(times) > 0 for times in phases.values())
        assert rank["agreement"][INPLACE] == {"loss": 0, "gradient": 0}
        if MEGATRON in names:
            assert rank["agreement"][MEGATRON]["loss"] < 1e-4
            assert rank["kept"][MEGATRON] == ["float32 beside the logits"]
        assert rank["kept"][OURS] == rank["kept"][INPLACE] == ["the logits"]
        if sys.platform.startswith("linux"):
            assert set(rank["peak_bytes"][OURS]) == {"forward", HELD, "total"}
    assert f"| {Case(*SHAPE, 'bfloat16')} |" in done.stdout


FAILING = """
import time

def measure(rank, *_):
    if rank == 1:
        raise RuntimeError("no luck")
    time.sleep(600)
    yield
"""


def test_one_that_fails_ends_all(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    program = (
        "import sys; sys.path.append(sys.argv.pop(1)); import failing, vocab_parallel; "
        "vocab_parallel.lockstep.measure = failing.measure; vocab_parallel.main()"
    )
    begin = time.monotonic()
    done = _python("-c", program, tmp_path, "--quick", "--output", tmp_path / "results")
    assert done.returncode == 1
    assert time.monotonic() - begin < TIMEOUT
    assert "no luck" in done.stderr
    assert not (tmp_path / "results").exists()


CASE = {"num_rows": 512, "vocab_size": 151_936, "dtype": "bfloat16"}
SHARD_BYTES = 512 * 151_936


def _phases(*totals: float) -> dict[str, list[float]]:
    """A forward that takes three quarters of the time."""
    return {
        "forward": [0.75 * t for t in totals],
        "backward": [0.25 * t for t in totals],
        "total": list(totals),
    }


def _raw() -> dict[str, Any]:
    """Ours takes 10 ms, 20 in place; Megatron-Core 40, and keeps a softmax in float32."""

    def rank(*ours: float) -> dict[str, Any]:
        return {
            "seconds": {
                OURS: _phases(*ours),
                INPLACE: _phases(0.02, 0.02, 0.02),
                MEGATRON: _phases(0.5, 0.04, 0.03),
            },
            "peak_bytes": {
                OURS: {"forward": 0, HELD: 0, "total": SHARD_BYTES},
                INPLACE: {"forward": 0, HELD: 2 * SHARD_BYTES // 100, "total": 0},
                MEGATRON: {"forward": 0, HELD: 2 * SHARD_BYTES, "total": 3 * SHARD_BYTES},
            },
            "kept": {OURS: ["the logits"], MEGATRON: ["float32 beside the logits"]},
            "agreement": {},
        }

    machine = {"device": "cpu", "model": "A CPU", "threads": 2, "cores": 2, "torch": "2",
               "cpu_capability": "AVX512", "eaft_ext": "0", "commit": "1234-dirty",
               "date": "2026-01-02T00", "processes": 2, "megatron_core": "0.16.1"}  # fmt: skip
    # The slower of both takes 10, 9 and 80 ms.
    ranks = [rank(0.01, 0.001, 0.08), rank(0.002, 0.009, 0.001)]
    case = {"case": dict(CASE), "failed": {"megatron_fused": "no compiler"}, "ranks": ranks}
    return {"machine": machine, "cases": [case]}


def test_the_slowest_process_counts() -> None:
    (case,) = Result(_raw()).cases
    assert case.seconds[OURS]["total"] == [0.01, 0.009, 0.08]
    assert case.ratio(MEGATRON, OURS) == pytest.approx(4)


def test_promises() -> None:
    rows = {
        bound.promise: (round(value, 3), bound.holds(value))
        for bound, value in evaluate(Result(_raw()))
    }
    assert rows == {
        f"Megatron-Core / `{OURS}`, forward and backward": (4.0, True),
        "Megatron-Core / the same in place, forward and backward": (2.0, False),
        f"kept by `{OURS}` for the backward / logits": (0.0, True),
        "kept by the same in place for the backward / logits": (0.02, False),
    }


def test_nothing_is_promised_of_small_cases() -> None:
    raw = _raw()
    raw["cases"][0]["case"]["num_rows"] = 64
    assert evaluate(Result(raw)) == []


def test_promises_without_megatron() -> None:
    raw = _raw()
    raw["machine"]["megatron_core"] = ""
    for rank in raw["cases"][0]["ranks"]:
        for figures in rank.values():
            figures.pop(MEGATRON, None)
    result = Result(raw)
    assert all("kept by" in bound.promise for bound, _ in evaluate(result))
    assert "Megatron-Core did not take part" in vocab_parallel.summary(result)


def test_the_page_takes_it_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    begin, end = "<!-- benchmark:vocab_parallel -->", "<!-- /benchmark:vocab_parallel -->"
    page.write_text(f"a\n{begin}\n{end}\nb\n")
    (tmp_path / NAME).write_text(json.dumps(_raw()))
    older = _raw()
    older["machine"].update(date="2025-01-01T00", model="An older CPU")
    (tmp_path / "cpu-an-older-cpu-vocab-parallel.json").write_text(json.dumps(older))
    options = ["--results", str(tmp_path), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", *options, "--check"])
    with pytest.raises(SystemExit, match="does not show"):
        readme_tables.main()
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", *options])
    readme_tables.main()
    text = page.read_text()
    assert text.startswith(f"a\n{begin}\nA CPU, 2 threads") and text.endswith(f"{end}\nb\n")
    case = Case(**CASE)
    for line in (
        f"| {case} | 10.0 | 20.0 | 40.0 |",
        f"| {case} | 7.50 + 2.50 | 15.0 + 5.00 | 30.0 + 10.0 |",
        f"| {case} | 74.2 | 0.00 | 223 |",
        f"| {case} | 0.00 (the logits) | 1.48 | 148 (float32 beside the logits) |",
        f"| {case}: Megatron-Core / `{OURS}`, forward and backward "
        f"| ≥ 3{TIMES} | 4.00{TIMES} | held |",
        f"| {case}: Megatron-Core / the same in place, forward and backward "
        f"| ≥ 3{TIMES} | 2.00{TIMES} | missed |",
    ):
        assert line in text
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", *options, "--check"])
    readme_tables.main()


def test_it_is_not_taken_for_the_other_benchmark(tmp_path: Path) -> None:
    """Their files lie side by side."""
    raw = {"machine": {**_raw()["machine"], "date": "2025-01-01T00"}, "cases": []}
    del raw["machine"]["processes"]
    (tmp_path / "cpu-a-cpu.json").write_text(json.dumps(raw))
    assert list(readme_tables.newest(tmp_path)) == ["cpu"]
    (tmp_path / NAME).write_text(json.dumps(_raw()))
    found = readme_tables.newest(tmp_path)
    assert set(found) == {"cpu", vocab_parallel.BLOCK}
    assert found["cpu"].machine["date"] == "2025-01-01T00"


def test_names() -> None:
    names = [contender.name for contender in CONTENDERS]
    assert len(names) == len(set(names))
    assert all(vocab_size % 2 == 0 for _, vocab_size in vocab_parallel.SHAPES)
