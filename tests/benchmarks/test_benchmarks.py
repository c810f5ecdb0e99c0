"""The benchmarks' machinery, on a device that stands in for a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import readme_tables
import run
import sanitize
import torch
from contenders.cases import IGNORED, TIMES, Case, Rotation
from contenders.contender import Contender, Runner
from contenders.logits import CONTENDERS, SHAPES, SWEEP_SHAPE
from harness import benchmark, launches, machine, measure, progress, timing
from harness.device import Cpu
from harness.schedule import Schedule
from reports import logits, results, tables
from reports.bounds import BOUNDS, evaluate, unmeasured
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = (9, 61)


class FakeGpu(Cpu):
    """Says that it is a GPU, and computes on the CPU."""

    type = "cuda"
    alive = True

    def model(self) -> str:
        return "Fake GPU 1"

    def cache_bytes(self) -> int:
        return 4096

    def facts(self) -> dict[str, str | int]:
        return {"driver": "1.2", "cuda": "13.0", "capability": "9.0"}

    def reset_peak(self) -> int:
        return 0

    def peak_bytes(self) -> int:
        return SHAPE[0] * SHAPE[1] * 2

    def is_alive(self) -> bool:
        return self.alive


def _raising(error: Exception) -> Callable[..., Any]:
    def function(*_: object) -> Any:
        raise error

    return function


def _out_of_memory() -> Callable[..., Any]:
    return _raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A GPU on which the sweep is at a small shape, and graphs are made of repeated calls."""
    gpu = FakeGpu()
    monkeypatch.setattr(benchmark, "open_device", lambda name: gpu)
    monkeypatch.setattr(
        measure,
        "Rotation",
        lambda case, cache, device, **options: Rotation(case, cache, "cpu", **options),
    )
    monkeypatch.setitem(benchmark.MIN_SECONDS, "cuda", 0.0)
    small = [
        dataclasses.replace(c, shape=c.shape and SHAPE)
        for c in CONTENDERS
        if not (c.module or c.compiles)
    ]
    monkeypatch.setattr(run, "CONTENDERS", small)

    def capture(runner: Any, rotation: Rotation) -> SimpleNamespace:
        arguments = [runner.prepare(batch) for batch in rotation.full_turn()]
        return SimpleNamespace(replay=lambda: [launches.call(runner, a) for a in arguments[:1]])

    monkeypatch.setattr(launches, "capture", capture)
    monkeypatch.setattr(
        launches,
        "synchronises",
        lambda runner, rotation: "a copy" if runner.name == "eager" else "",
    )
    return gpu


def _run(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> tuple[int, Any]:
    """The command line, with its result file."""
    shape = "x".join(map(str, SHAPE))
    arguments = ["run.py", "--device", "cuda", "--shapes", shape, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--repeats", "2", *options])
    code = run.main()
    return code, json.loads((output / "cuda-fake-gpu-1.json").read_text())


def test_a_run_on_a_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks = tmp_path / "gpu_check.json"
    checks.write_text('{"steps": {"suite": {"outcome": "passed"}}}')
    code, raw = _run(monkeypatch, tmp_path, "--checks", str(checks), "--minutes", "2")
    assert code == 0
    assert raw["checks"]["steps"]["suite"]["outcome"] == "passed"
    assert raw["machine"]["driver"] == "1.2" and "peers" in raw["machine"]
    assert [case["case"]["dtype"] for case in raw["cases"]] == ["bfloat16", "float32"]
    for case in raw["cases"]:
        seconds = case["seconds"]
        assert {"copy", "gated_ce", "single_pass", "eager", "operators_k128"} <= set(seconds)
        assert "clone" not in seconds
        assert set(seconds["gated_ce"]) == {"forward", "backward", "total", "latency", "graph"}
        assert set(seconds["single_pass"]) == {"total", "latency", "graph"}
        assert len(seconds["gated_ce"]["total"]) == 2
        assert case["failed"] == {"graph of eager": "it synchronises: a copy"}
        assert case["copy_bytes_per_second"] > 0
        assert case["peak_bytes"]["gated_ce"]["total"] == SHAPE[0] * SHAPE[1] * 2
    assert [bound["held"] for bound in raw["bounds"] if bound["case"] == "all cases"] == [True]
    result = results.Result(raw)
    for case in result.cases:
        for name in ("gated_ce", "gated_ce_inplace", "single_pass"):
            assert max(case.agreement[name].values()) < 0.01
    text = (tmp_path / "cuda-fake-gpu-1.md").read_text()
    short = text.partition("## In short\n")[2].partition("\n## ")[0]
    for words in ("Forward, microseconds", "What K costs at 9", "in a CUDA graph", "| held |"):
        assert words in short
    assert "- without graph of eager: it synchronises" in text
    assert "Fake GPU 1, driver 1.2, CUDA 13.0, torch" in text


@pytest.mark.slow
def test_what_fails_is_taken_down(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failing = [
        Contender("peer", "a peer", _out_of_memory, Runner, devices=("cuda",)),
        Contender("absent", "an absent peer", _out_of_memory, Runner, module="no_such_module"),
    ]
    monkeypatch.setattr(run, "CONTENDERS", [*run.CONTENDERS, *failing])
    code, raw = _run(monkeypatch, tmp_path)
    assert code == 0  # a peer's failure is a result
    assert raw["cases"][0]["failed"]["peer"] == "out of memory"
    assert "absent" not in raw["cases"][0]["failed"]

    broken = Contender("gated_ce", "ours", lambda: _raising(RuntimeError("no\nkernel")), Runner)
    monkeypatch.setattr(run, "CONTENDERS", [broken, *run.CONTENDERS[1:]])
    code, raw = _run(monkeypatch, tmp_path)
    assert code == 1
    assert raw["cases"][0]["failed"]["gated_ce"] == "RuntimeError: no"


def test_a_lost_device_costs_what_lost_it(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crash(*_: object) -> Any:
        gpu.alive = False
        raise RuntimeError("an illegal memory access")

    def leave(code: int) -> None:
        raise SystemExit(code)

    bad = Contender("bad", "a bad one", lambda: crash, Runner)
    monkeypatch.setattr(run, "CONTENDERS", [run.CONTENDERS[0], bad, *run.CONTENDERS[1:]])
    monkeypatch.setattr(benchmark.os, "_exit", leave)
    with pytest.raises(SystemExit, match="3"):
        _run(monkeypatch, tmp_path)
    gpu.alive = True
    code, raw = _run(monkeypatch, tmp_path, "--resume")
    assert code == 0
    for case in raw["cases"]:
        assert "gated_ce" in case["seconds"] and "bad" not in case["seconds"]
    reasons = [case["failed"]["bad"].split(":")[0] for case in raw["cases"]]
    assert reasons == [progress.LOST, "left out"]


def test_an_attempt_that_ends_the_process_is_blamed(tmp_path: Path) -> None:
    case = Case(*SHAPE, "float32")
    path = tmp_path / "result.json"
    entry = progress.Progress(path, {}).entry(case)
    assert entry.begin()
    entry.attempt("good")
    entry.forgive("good")
    entry.attempt("bad")
    for attempt in (2, 3):
        later = progress.Progress(path, {}, resume=True).entry(case)
        assert later.failed == {"bad": progress.ENDED}
        assert later.begin() and later.attempts == attempt
    last = progress.Progress(path, {}, resume=True)
    assert not last.entry(case).begin() and not last.is_complete(case)
    assert last.entry(case).failed["all"] == progress.ENDED


def test_time_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("harness.schedule.time.monotonic", lambda: now)
    large, small = Case(8192, 10, "float32"), Case(1, 10, "float32")
    schedule = Schedule(2)
    schedule.begin(large, [large, small, small, small])
    assert schedule.seconds_for_rounds() == pytest.approx(120 * 3 / 9)
    assert schedule.can_compile()
    schedule.has_compiled(50)
    assert not schedule.can_compile()
    now += 118
    assert not schedule.has_time()
    assert schedule.seconds_for_rounds() > 0
    unlimited = Schedule(None)
    unlimited.begin(large, [])
    assert unlimited.seconds_for_rounds() == math.inf and unlimited.can_compile()


def test_rounds_end_in_time_but_not_before_three(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeGpu()
    rotation = Rotation(Case(*SHAPE, "float32"), 0, "cpu")
    runner = CONTENDERS[0].make_runner()
    times = timing.time_side_by_side(
        [runner], rotation, device, 100, 0.0, 0.0, drop=_raising(AssertionError())
    )
    assert len(times["copy"]["total"]) == timing.FEWEST_ROUNDS


def test_a_few_labels_are_ignored_on_a_gpu() -> None:
    batch = Rotation(Case(2048, 3, "float32"), 0, "cpu", ignore_every=1024).next()
    assert (batch.labels == IGNORED).sum() == 2
    assert (Rotation(Case(2048, 3, "float32"), 0, "cpu").next().labels != IGNORED).all()


def test_the_bounds_are_about_what_is_measured() -> None:
    assert SHAPES["cuda"][0] == SWEEP_SHAPE
    for device, bounds in BOUNDS.items():
        for bound in bounds:
            assert (
                bound.case is None
                or (bound.case.num_rows, bound.case.vocab_size) in (SHAPES[device])
            )
    names = [c.name for c in CONTENDERS]
    assert len(names) == len(set(names))


def _synthetic(copy: float = 2e-3, ours: float = 1e-3) -> results.Result:
    """A result in which a forward takes 1 ms, a backward and a copy 2 ms."""
    case = {"num_rows": 8192, "vocab_size": 151_936, "dtype": "bfloat16"}
    loss = {"forward": [ours], "backward": [2e-3], "total": [ours + 2e-3]}
    slow = {"forward": [2e-2], "backward": [2e-2], "total": [4e-2]}
    names = ["gated_ce", *(c.name for c in CONTENDERS if c.shape)]
    size = Case(**case).logits_bytes
    raw = {
        "machine": {"device": "cuda", "model": "A GPU", "driver": "1", "cuda": "13.0",
                    "torch": "2", "eaft_ext": "0", "commit": "", "date": "2026-01-01T00",
                    "peers": {"liger_kernel": "0.8"}},
        "cases": [
            {
                "case": case,
                "seconds": {"copy": {"total": [copy]}, "eager": slow, **dict.fromkeys(names, loss)},
                "peak_bytes": {"gated_ce": {"total": size + 1000}},
                "agreement": {"gated_ce": {"loss": 0.0, "gradient": math.nan}},
            }
        ],
    }  # fmt: skip
    return results.Result(raw)


def test_bounds_of_a_gpu() -> None:
    held = {
        bound.promise: (round(value, 3), bound.holds(value))
        for bound, value in evaluate(_synthetic())
    }
    assert held["operator, forward / reading"] == (1.0, True)
    assert held["`gated_ce`, backward / copy"] == (1.0, True)
    assert held["K = 20 / K = 2, forward"] == (1.0, True)
    assert held["eager EAFT / `gated_ce`"] == (13.333, True)
    assert held["peak of `gated_ce` / logits"] == (1.0, True)
    assert held["loss and gradient, off from eager EAFT"] == (math.inf, False)
    slower = {b.promise: b.holds(v) for b, v in evaluate(_synthetic(ours=1.1e-3))}
    assert not slower["operator, forward / reading"] and slower["`gated_ce`, backward / copy"]
    missing = [bound.promise for bound in unmeasured(_synthetic())]
    assert "Liger-Kernel without a gate / `gated_ce`" in missing
    assert "liger-kernel 0.8" in tables.machine_line(_synthetic())


@pytest.mark.parametrize("stale", readme_tables.PAGES)
def test_the_pages_take_in_a_gpu_once_there_is_one(
    stale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty = "a\n<!-- benchmark:cuda -->\n<!-- /benchmark:cuda -->\nb\n"
    pages = {page: tmp_path / page for page in readme_tables.PAGES}
    for path in pages.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text(empty)
    (tmp_path / "cuda-a-gpu.json").write_text(json.dumps(_synthetic().raw))
    command = ["readme_tables.py", "--results", str(tmp_path), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    readme_tables.main()
    for path in pages.values():
        text = path.read_text()
        assert "A GPU, driver 1" in text and text.startswith("a\n") and text.endswith("-->\nb\n")
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    readme_tables.main()
    pages[stale].write_text(empty)
    with pytest.raises(SystemExit, match=f"{stale} does not show"):
        readme_tables.main()
    pages[stale].write_text("no block")
    with pytest.raises(SystemExit, match=f"{stale} has no block from <!-- benchmark:cuda -->"):
        readme_tables.main()


def test_in_short_it_is_about_the_largest_vocabulary() -> None:
    raw = _synthetic().raw
    (case,) = raw["cases"]
    smaller = {"num_rows": 10**6, "vocab_size": 50_257, "dtype": "bfloat16"}
    fewer = case["case"] | {"num_rows": 4}
    raw["cases"] = [case | {"case": smaller}, case, case | {"case": fewer}]
    text = logits.in_short(results.Result(raw))
    assert f"| 8,192 {TIMES} 151,936 bfloat16, microseconds |" in text
    assert "| `gated_ce` | 3,000 | 2,374 |" in text and "50,257" not in text
    assert "copy" not in text and "K = " not in text


class CalledOperators(TorchDispatchMode):
    """Which of our operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op.namespace == "eaft_ext":
            self.names.add(op._schema.name.removeprefix("eaft_ext::"))
        return op(*args, **(kwargs or {}))


def test_every_operator_is_watched_by_the_sanitizers() -> None:
    logits, labels, upstream = sanitize.inputs(5, 37, torch.float16)
    watched = {op for op, _, _ in sanitize.results(logits, labels, upstream, 20)} | {"topk"}
    with CalledOperators() as called:
        for sizes in sanitize.LINEAR_SHAPES:
            assert sanitize.check_linear("cpu", *sizes, 20) == 0
    # Others are called within them.
    watched |= {name for name in called.names if name.startswith("linear_")}
    names = torch._C._dispatch_get_all_op_names()
    assert watched == {
        name.removeprefix("eaft_ext::") for name in names if name.startswith("eaft_ext::")
    }
    assert sanitize.check_losses("cpu", 5, 37, torch.float16, 20) == 0
    assert sanitize.check_topk("cpu", 5, 37, torch.bfloat16, 20) == 0


def test_the_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results that were written leave it clean; a change of code does not."""
    monkeypatch.delenv("EAFT_EXT_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == ""
    result, code = tmp_path / "benchmarks" / "results" / "a.json", tmp_path / "code.py"
    result.parent.mkdir(parents=True)

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    for file in (result, code):
        file.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "--no-verify", "-m", "first")
    name = machine.commit()
    assert re.fullmatch("[0-9a-f]{12}", name)
    result.write_text("2")
    assert machine.commit() == name
    code.write_text("2")
    assert machine.commit() == f"{name}-dirty"
    monkeypatch.setenv("EAFT_EXT_COMMIT", "told")
    assert machine.commit() == "told"
