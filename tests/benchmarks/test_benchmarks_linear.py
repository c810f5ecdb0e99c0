"""The benchmark of the linear loss: a run in small, and what is made of its numbers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import linear_loss
import pytest
import readme_tables
import torch
from contenders import linear
from contenders.cases import TIMES, Case, LinearBatch, LinearCase, Rotation
from contenders.linear import (
    CHUNKED,
    COMPILED,
    CUT,
    EAGER,
    FLOAT32,
    HALF,
    LIGER,
    LINEAR_CONTENDERS,
    NO_GATE,
    OURS,
    PRODUCTS,
    SAME,
    TENTH,
    UNFUSED,
    UNFUSED_INPLACE,
)
from contenders.logits import CONTENDERS
from harness import benchmark, measure
from harness.device import Cpu
from harness.timing import HELD
from reports import results
from reports.bounds import LINEAR_BOUNDS, evaluate, unmeasured
from torch import Tensor

import eaft_ext
from eaft_ext.cli.bench import eager_eaft

SHAPE = (48, 16, 256)
CASE = LinearCase(48, 256, "bfloat16", 16)
ON_A_CPU = {PRODUCTS, OURS, FLOAT32, UNFUSED, UNFUSED_INPLACE, EAGER, CHUNKED}


def _contender(name: str) -> Any:
    return next(c for c in LINEAR_CONTENDERS if c.name == name)


def _run(
    monkeypatch: pytest.MonkeyPatch, output: Path, *options: str, dtype: str = "bfloat16"
) -> tuple[int, Any]:
    """The command line, with its result file."""
    shape = "x".join(map(str, SHAPE))
    arguments = ["linear_loss.py", "--shapes", shape, "--dtypes", dtype, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--quick", *options])
    code = linear_loss.main()
    (path,) = output.glob("*-linear.json")
    return code, json.loads(path.read_text())


@pytest.mark.slow
def test_a_quick_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, raw = _run(monkeypatch, tmp_path)
    assert code == 0
    assert {"date", "torch", "eaft_ext", "commit", "compiler"} <= set(raw["machine"])
    (case,) = raw["cases"]
    assert case["case"] == dataclasses.asdict(CASE)
    assert case["failed"] == {}
    assert set(case["seconds"]) == ON_A_CPU
    for name, phases in case["seconds"].items():
        expected = ["total"] if name == PRODUCTS else ["forward", "backward", "total"]
        assert list(phases) == expected
        assert all(len(times) == 3 and min(times) > 0 for times in phases.values())
    assert set(case["agreement"]) == ON_A_CPU - {PRODUCTS, CHUNKED}
    for differences in case["agreement"].values():
        assert set(differences) == {"loss", "hidden_gradient", "weight_gradient"}
        assert 0 <= max(differences.values()) < 0.02
    if sys.platform.startswith("linux"):
        assert set(case["peak_bytes"]) == ON_A_CPU
        assert set(case["peak_bytes"][OURS]) == {"forward", HELD, "total"}
    # Of so small a case nothing is promised.
    assert {bound["held"] for bound in raw["bounds"]} == {None}
    report = next(tmp_path.glob("*-linear.md")).read_text()
    assert f"| 48 {TIMES} 16 {TIMES} 256 bfloat16 |" in report
    assert report in capsys.readouterr().out


def test_who_takes_part() -> None:
    names = [c.name for c in LINEAR_CONTENDERS]
    assert len(names) == len(set(names))
    # Of losses without muted tokens; tests/linear/test_dropped.py compares those.
    assert set(SAME) | set(SAME.values()) | {PRODUCTS} == set(names) - {HALF, TENTH}
    taking_part = {
        (device, dtype): {
            c.name
            for c in LINEAR_CONTENDERS
            if c.takes_part(dataclasses.replace(CASE, dtype=dtype), device)
        }
        for device in ("cpu", "cuda")
        for dtype in ("float32", "bfloat16")
    }
    assert taking_part["cpu", "bfloat16"] == ON_A_CPU
    assert taking_part["cpu", "float32"] == ON_A_CPU - {FLOAT32}
    assert taking_part["cuda", "bfloat16"] == ON_A_CPU | {
        NO_GATE, HALF, TENTH, COMPILED, LIGER, CUT,
    }  # fmt: skip
    assert {c.name for c in LINEAR_CONTENDERS if c.is_ours} == {
        OURS, FLOAT32, NO_GATE, HALF, TENTH, UNFUSED, UNFUSED_INPLACE,
    }  # fmt: skip
    assert linear.contenders_of(CASE) == LINEAR_CONTENDERS
    assert linear.contenders_of(Case(1, 2, "float32")) == CONTENDERS


@pytest.mark.parametrize("name", sorted(ON_A_CPU - {PRODUCTS}))
def test_contenders_compute_the_loss_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(linear, "default_chunk_size", lambda *_: 7)
    case = dataclasses.replace(CASE, dtype="float32")
    batch: LinearBatch = Rotation(case, 0, "cpu", ignore_every=5).next()
    found = _contender(name).make_runner().outcome(batch)
    leaves = [batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
    loss = eager_eaft(leaves[0] @ leaves[1].t(), batch.labels)
    expected = (loss.detach(), *torch.autograd.grad(loss, leaves))
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-6)


def test_the_products_are_those_of_a_linear_layer() -> None:
    batch: LinearBatch = Rotation(dataclasses.replace(CASE, dtype="float32"), 0, "cpu").next()
    runner = _contender(PRODUCTS).make_runner()
    of_hidden, of_weight = runner.forward(runner.prepare(batch))
    logits = batch.hidden @ batch.weight.t()
    torch.testing.assert_close(of_hidden, logits @ batch.weight)
    torch.testing.assert_close(of_weight, logits.t() @ batch.hidden)
    # Standard deviation 3, as logits have it elsewhere.
    assert 2.5 < logits.std() < 3.5


def _other_gate(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eaft_ext.linear_gated_ce(hidden, weight, labels, alpha=2.0)


def _other_gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Whose loss is right."""
    loss = eaft_ext.linear_gated_ce(hidden, weight, labels)
    return loss + 0.5 * (loss - loss.detach())


def _not_a_number(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eaft_ext.linear_gated_ce(hidden, weight, labels) * torch.nan


@pytest.mark.parametrize("wrong", [_other_gate, _other_gradient, _not_a_number])
def test_what_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(measure, "measure_peaks", lambda case, names: {})
    broken = dataclasses.replace(_contender(OURS), build=lambda: wrong)
    kept = [_contender(PRODUCTS), broken, _contender(CHUNKED)]
    monkeypatch.setattr(linear_loss, "LINEAR_CONTENDERS", kept)
    code, raw = _run(monkeypatch, tmp_path, dtype="float32")
    assert code == 1
    (case,) = raw["cases"]
    assert set(case["seconds"]) == {PRODUCTS, CHUNKED}
    assert case["failed"][OURS].startswith(f"off from {CHUNKED}: loss ")
    assert f"- without {OURS}: off" in next(tmp_path.glob("*.md")).read_text()


class FakeGpu(Cpu):
    """Says that it is a GPU, and computes on the CPU."""

    type = "cuda"

    def model(self) -> str:
        return "Fake GPU 1"

    def facts(self) -> dict[str, str | int]:
        return {"driver": "1.2", "cuda": "13.0", "capability": "9.0"}

    def reset_peak(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return 10**6


def test_a_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "open_device", lambda name: FakeGpu())
    monkeypatch.setattr(
        measure,
        "Rotation",
        lambda case, cache, device, **options: Rotation(case, cache, "cpu", **options),
    )
    peer = dataclasses.replace(_contender(LIGER), build=lambda: _other_gate, module="")
    absent = dataclasses.replace(_contender(CUT), module="no_such_module")
    others = [c for c in LINEAR_CONTENDERS if c.name not in (LIGER, CUT)]
    monkeypatch.setattr(linear_loss, "LINEAR_CONTENDERS", [*others, peer, absent])
    code, raw = _run(monkeypatch, tmp_path, "--device", "cuda", "--minutes", "2")
    assert code == 0  # a peer's failure is a result
    (case,) = raw["cases"]
    assert set(case["seconds"]) == ON_A_CPU | {NO_GATE, HALF, TENTH}
    assert list(case["failed"]) == [LIGER]
    assert case["peak_bytes"][OURS] == {"forward": 10**6, HELD: 0, "total": 10**6}
    assert [path.name for path in tmp_path.glob("*.json")] == ["cuda-fake-gpu-1-linear.json"]
    text = (tmp_path / "cuda-fake-gpu-1-linear.md").read_text()
    assert "## In short" in text and f"- without {LIGER}: off from {NO_GATE}" in text


def test_shapes_have_three_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for shape in ("512x1024", "0x1x2", "1x2x3x4"):
        options = ["--shapes", shape, "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["linear_loss.py", *options])
        with pytest.raises(SystemExit, match="2"):
            linear_loss.main()


HEAD = LinearCase(4096, 49_152, "float32", 576)
LARGE = LinearCase(8192, 151_936, "bfloat16", 4096)


def _phases(total: float) -> dict[str, list[float]]:
    return {"forward": [0.75 * total], "backward": [0.25 * total], "total": [total]}


def _raw(case: LinearCase, **seconds: float) -> dict[str, Any]:
    """Ours needs a chunk beyond the gradients, all others all logits."""
    device = "cpu" if case is HEAD else "cuda"
    chunk = linear.chunk_tokens(case, device) * case.logits_bytes // case.num_rows
    peaks = {
        name: {"total": case.input_bytes + (chunk if name == OURS else case.logits_bytes)}
        for name in seconds
    }
    machine = {"device": device, "model": "A machine", "threads": 2, "cores": 2, "torch": "2",
               "cpu_capability": "AVX512", "eaft_ext": "0", "commit": "1234", "driver": "1",
               "cuda": "13.0", "date": "2026-01-02T00"}  # fmt: skip
    measured = {
        "case": dataclasses.asdict(case),
        "seconds": {name: _phases(total) for name, total in seconds.items()},
        "peak_bytes": peaks,
        "failed": {},
    }
    measured["seconds"][PRODUCTS] = {"total": [1.0]}
    return {"machine": machine, "cases": [measured]}


def _held(raw: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    return {
        bound.promise: (round(value, 3), bound.holds(value))
        for bound, value in evaluate(results.Result(raw))
    }


TIME = f"`{OURS}` / `gated_ce` of all logits"
PEAK = "peak beyond inputs and gradients / that of `gated_ce` of all logits"
CHUNK = "peak beyond inputs and gradients / a chunk's logits"


def test_promises_on_a_cpu() -> None:
    raw = _raw(HEAD, **{OURS: 1.1, UNFUSED: 1.25})
    chunk = linear.chunk_tokens(HEAD, "cpu") / HEAD.num_rows
    assert _held(raw) == {
        TIME: (0.88, True),
        PEAK: (round(chunk, 3), True),
        CHUNK: (1.0, True),
    }
    slower = _raw(HEAD, **{OURS: 1.5, UNFUSED: 1.25})
    slower["cases"][0]["peak_bytes"][OURS]["total"] += HEAD.logits_bytes // 4
    assert [holds for _, holds in _held(slower).values()] == [False, False, False]


def test_promises_on_a_gpu() -> None:
    held = _held(_raw(LARGE, **{OURS: 1.1, LIGER: 2.2, CHUNKED: 3.3}))
    assert held == {
        f"`{OURS}` / three bare products": (1.1, True),
        f"Liger-Kernel without a gate / `{OURS}`": (2.0, True),
        f"eager EAFT in chunks / `{OURS}`": (3.0, True),
        CHUNK: (1.0, True),
    }
    slower = _held(_raw(LARGE, **{OURS: 1.2, LIGER: 1.1, CHUNKED: 1.1}))
    assert [holds for _, holds in slower.values()] == [False, False, False, True]
    alone = results.Result(_raw(LARGE, **{OURS: 1.1, CHUNKED: 2.0}))
    (missing,) = unmeasured(alone)
    assert missing.promise.startswith("Liger-Kernel")
    assert "Not measured: Liger-Kernel" in linear_loss.summary(alone)


def test_the_promises_are_about_what_is_measured() -> None:
    for device, bounds in LINEAR_BOUNDS.items():
        for bound in bounds:
            if isinstance(bound.case, LinearCase):
                case = bound.case
                shape = (case.num_rows, case.hidden_size, case.vocab_size)
                assert shape in linear_loss.SHAPES[device]
                assert case.dtype in linear_loss.DTYPES[device]
            else:
                assert bound.case is None


def test_the_page_takes_it_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    begin, end = "<!-- benchmark:linear -->", "<!-- /benchmark:linear -->"
    on_gpu = "<!-- benchmark:linear_cuda -->\n<!-- /benchmark:linear_cuda -->\n"
    page.write_text(f"a\n{begin}\n{end}\nb\n{on_gpu}c\n")
    raw = _raw(HEAD, **{OURS: 1.1, UNFUSED: 1.0})
    older = _raw(HEAD, **{OURS: 1.1})
    older["machine"].update(date="2025-01-01T00", model="An older machine")
    (tmp_path / "cpu-a-machine-linear.json").write_text(json.dumps(raw))
    (tmp_path / "cpu-an-older-machine-linear.json").write_text(json.dumps(older))
    options = ["--results", str(tmp_path), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", *options, "--check"])
    with pytest.raises(SystemExit, match="does not show"):
        readme_tables.main()
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", *options])
    readme_tables.main()
    text = page.read_text()
    assert text.startswith(f"a\n{begin}\nA machine, 2 threads")
    assert text.endswith(f"{end}\nb\n{on_gpu}c\n")
    for line in (
        f"| {HEAD} | 768 | 320 | 60.0 | 117 |",
        f"| {HEAD} | 1,000 | 1,100 | 1,000 |",
        f"| {HEAD} | 1.00 | 1.10 | 1.00 |",
        f"| {HEAD} | - | 825 + 275 | 750 + 250 |",
        f"| {HEAD} | - | 177 | 885 |",
        f"| {HEAD} | - | 60.0 | 768 |",
        f"| {HEAD}: {TIME} | ≤ 1{TIMES} | 1.10{TIMES} | missed |",
        f"| {HEAD}: {PEAK} | ≤ 0.15{TIMES} | 0.08{TIMES} | held |",
        f"| all cases: {CHUNK} | ≤ 1.2{TIMES} | 1.00{TIMES} | held |",
    ):
        assert line in text
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", *options, "--check"])
    readme_tables.main()


def test_it_is_not_taken_for_another_benchmark(tmp_path: Path) -> None:
    """Their files lie side by side."""
    other = {"machine": {"device": "cuda", "date": "2025-01-01T00"}, "cases": []}
    (tmp_path / "cuda-a-machine.json").write_text(json.dumps(other))
    (tmp_path / "cuda-a-machine-linear.json").write_text(json.dumps(_raw(LARGE, **{OURS: 1.0})))
    found = readme_tables.newest(tmp_path)
    assert list(found) == ["cuda", "linear_cuda"]
    assert found["cuda"].machine["date"] == "2025-01-01T00"
