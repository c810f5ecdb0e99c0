"""gpu_check.py on commands that only say that they ran, and what it reads of their logs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu import outcomes, processes
from gpu.outcomes import ERROR_STATUS, WATCHES, Watch

import eaft_ext
from eaft_ext._library import has_kernel

PLAIN_LOG = """
tests/test_a.py::test_x[cpu-float32] PASSED                              [ 10%]
tests/test_a.py::test_x[cuda-float32] PASSED                             [ 20%]
tests/test_a.py::test_y[cuda] FAILED                                     [ 30%]
tests/test_b.py::test_z SKIPPED (there is no such thing [here])          [ 40%]
"""
DISTRIBUTED_LOG = """
[gw0] [  1%] PASSED tests/test_a.py::test_x[cpu-float32]\x20
[gw11] [ 20%] PASSED tests/test_a.py::test_x[bfloat16-cuda]\x20
[gw1] [100%] FAILED tests/test_a.py::test_y[cuda]\x20
[gw1] [100%] SKIPPED tests/test_b.py::test_z\x20
"""
LAST_LINE = "==== 1 failed, 2 passed, 1 skipped, 5 warnings in 62.10s (0:01:02) ====\n"


@pytest.mark.parametrize("log", [PLAIN_LOG, DISTRIBUTED_LOG], ids=["plain", "distributed"])
@pytest.mark.parametrize("end", ["", LAST_LINE], ids=["cut_short", "complete"])
def test_reading_the_log_of_the_suite(log: str, end: str) -> None:
    assert outcomes.suite(log + end) == {
        "passed": 2,
        "failed": 1,
        "errors": 0,
        "skipped": 1,
        "passed_on_cuda": 1,
        "failed_tests": ["tests/test_a.py::test_y[cuda]"],
        "complete": bool(end),
    }


def test_reading_the_log_of_a_sanitizer() -> None:
    races = "9 cases, 1 wrong results\n=== RACECHECK SUMMARY: 3 hazards displayed "
    races += "(2 errors, 1 warning)"
    assert outcomes.sanitizer(races) == {"errors": 2, "warnings": 1, "wrong_results": 1}
    assert outcomes.sanitizer("========= ERROR SUMMARY: 0 errors\n")["errors"] == 0
    assert outcomes.sanitizer("killed")["errors"] is None


def test_a_process_is_ended_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["bash", "-c", "echo begun; sleep 60 & echo $!; wait"]
    done = processes.run(command, log, 0.5)
    assert done.code is None and done.outcome == "timed out" and done.seconds < 20
    child = Path(f"/proc/{done.output.split()[-1]}/stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rsplit(")")[-1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child of an ended process goes on"
        time.sleep(0.05)
    assert processes.run(["false"], log, 20).outcome == "failed"
    assert log.read_text().count("$ ") == 2


def test_what_has_no_cuda_kernel(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", gpu_check.IMPORT_CHECK],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(eaft_ext.__file__).parents[1])},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kernels = ("topk", "gated_ce_forward", "gated_ce_partial")
    built = has_kernel("topk", "cuda")
    assert [name in found["missing"] for name in kernels] == [not built] * 3
    assert not any(name.startswith("linear_") for name in found["missing"])


RACES = "RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"


class TestGpuCheck:
    """The steps, on commands that only say that they ran."""

    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
        ran: list[list[str]] = []
        environment = {
            "gpu": "Fake GPU", "capability": "9.0", "driver": "1", "cuda": "13.0",
            "torch": "2", "cores": 4, "copy_bytes_per_second": 3e12,
        }  # fmt: skip
        self.answers = {
            "environment.py": (0, "a warning\n" + json.dumps(environment, indent=2) + "\nbye"),
            "pip": (0, "ptxas warning : Registers are spilled to local memory"),
            "-c": (0, '{"build_info": {}, "missing": []}'),
            "pytest": (0, DISTRIBUTED_LOG),
            "sanitize.py": (0, "9 cases, 0 wrong results\n===== ERROR SUMMARY: 0 errors"),
            "run.py": (0, ""),
            "linear_loss.py": (0, ""),
            "use.py": (0, "all passed"),
            "scaling.py": (0, ""),
        }

        def fake(command: Any, log: Path, limit: float, **_: Any) -> processes.Finished:
            words = [str(word) for word in command]
            ran.append(words)
            assert limit > 0
            for key in reversed(self.answers):
                if any(word == key or word.endswith(f"/{key}") for word in words):
                    code, text = self.answers[key]
                    with log.open("a") as out:
                        out.write(text)
                    return processes.Finished(code, 1.0, f"$ {words}\n{text}\n")
            raise AssertionError(words)

        monkeypatch.setattr(processes, "run", fake)
        monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
        monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "compute-sanitizer").touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tools), prepend=":")
        return ran

    def record(self, tmp_path: Path) -> Any:
        return json.loads((tmp_path / "out" / "gpu_check.json").read_text())

    def test_all_steps(self, commands: list[list[str]], tmp_path: Path) -> None:
        assert gpu_check.main(["--output", str(tmp_path / "out"), "--commit", "abc"]) == 0
        steps = self.record(tmp_path)["steps"]
        assert list(steps) == list(gpu_check.DEFAULT_STEPS)
        assert {found["outcome"] for found in steps.values()} == {"passed"}
        assert steps["build"]["spills"] == 1 and steps["build"]["arch_list"]
        assert steps["suite"]["passed_on_cuda"] == 1
        assert set(steps["sanitize"]["tools"]) == set(WATCHES)
        benches = [words for words in commands if words[1].endswith(("run.py", "linear_loss.py"))]
        minutes = [float(words[words.index("--minutes") + 1]) for words in benches]
        assert minutes[0] > 7 and minutes[1] > 8  # what the first does not use is the second's
        assert all(words[words.index("--device") + 1] == "cuda" for words in benches)

    def test_a_failed_step_does_not_stop_the_others(
        self, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.answers["pytest"] = (1, DISTRIBUTED_LOG + LAST_LINE)
        self.answers["sanitize.py"] = (9, "===== ERROR SUMMARY: 4 errors")
        assert gpu_check.main(["--output", str(tmp_path / "out")]) == 1
        steps = self.record(tmp_path)["steps"]
        assert steps["suite"]["outcome"] == steps["sanitize"]["outcome"] == "failed"
        assert steps["bench"]["outcome"] == "passed"
        out = capsys.readouterr().out
        assert "tests/test_a.py::test_y[cuda]" in out and "memcheck: failed, 4 errors" in out

    def test_a_watch_that_does_not_count(
        self,
        commands: list[list[str]],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        both = {"one": Watch("memcheck"), "other": Watch("racecheck", ("--other",), False)}
        monkeypatch.setattr(gpu_check, "WATCHES", both)
        self.answers["--other"] = (ERROR_STATUS, RACES)
        options = ["--output", str(tmp_path / "out"), "--only", "build,sanitize"]
        assert gpu_check.main(options) == 0
        assert "other: failed, 3 errors" in capsys.readouterr().out
        self.answers["memcheck"] = (ERROR_STATUS, "ERROR SUMMARY: 1 error")
        assert gpu_check.main(options) == 1

    def test_a_wheel_of_the_sanitizer_goes_first(
        self, commands: list[list[str]], tmp_path: Path
    ) -> None:
        folder = tmp_path / "work/peers/all/nvidia/cu13/bin"
        folder.mkdir(parents=True)
        (folder / "compute-sanitizer").touch(mode=0o755)
        assert gpu_check.main(["--output", str(tmp_path / "out"), "--only", "sanitize"]) == 0
        programs = {words[0] for words in commands if "--tool" in words}
        assert programs == {str(folder / "compute-sanitizer")}
        ports = [words[words.index("--port") + 1] for words in commands if "--tool" in words]
        assert len(set(ports)) == len(WATCHES)

    def test_a_failed_build_does(self, commands: list[list[str]], tmp_path: Path) -> None:
        self.answers["pip"] = (1, "error")
        assert gpu_check.main(["--output", str(tmp_path / "out")]) == 1
        steps = self.record(tmp_path)["steps"]
        for step in ("bench", "linear"):
            assert steps[step]["outcome"] == "not run: the build failed"

    def test_a_missing_kernel_does_not(self, commands: list[list[str]], tmp_path: Path) -> None:
        self.answers["-c"] = (0, '{"build_info": {}, "missing": ["topk"]}')
        assert gpu_check.main(["--output", str(tmp_path / "out")]) == 1
        steps = self.record(tmp_path)["steps"]
        assert "topk" in steps["build"]["outcome"] and steps["bench"]["outcome"] == "passed"

    def test_single_steps_in_several_calls(self, commands: list[list[str]], tmp_path: Path) -> None:
        out = ["--output", str(tmp_path / "out")]
        assert gpu_check.main([*out, "--only", "sanitize,build"]) == 0
        assert list(self.record(tmp_path)["steps"]) == ["build", "sanitize"]
        del commands[:]
        assert gpu_check.main([*out, "--only", "bench"]) == 0
        assert [Path(words[1]).name for words in commands] == ["environment.py", "run.py"]
        assert set(self.record(tmp_path)["steps"]) == {"build", "sanitize", "bench"}

    def test_what_a_user_does_first(self, commands: list[list[str]], tmp_path: Path) -> None:
        options = ["--output", str(tmp_path / "out"), "--only", "use"]
        assert gpu_check.main(options) == 0
        self.answers["use.py"] = (1, "failed: demo")
        assert gpu_check.main(options) == 1
        assert [Path(words[1]).name for words in commands] == ["environment.py", "use.py"] * 2

    def test_without_time_nothing_begins(self, commands: list[list[str]], tmp_path: Path) -> None:
        assert gpu_check.main(["--output", str(tmp_path / "out"), "--minutes", "0.3"]) == 1
        assert all(
            found["outcome"] == "not run: too little time"
            for found in self.record(tmp_path)["steps"].values()
        )

    @pytest.mark.parametrize("step", ["bench", "linear", "scaling"])
    def test_a_lost_device_is_tried_again(
        self, commands: list[list[str]], tmp_path: Path, step: str
    ) -> None:
        script = gpu_check.STEPS[step].benchmark
        self.answers[script] = (gpu_check.DEVICE_LOST, "")
        assert gpu_check.main(["--output", str(tmp_path / "out"), "--only", step]) == 1
        runs = [words for words in commands if words[1].endswith(script)]
        assert len(runs) == gpu_check.BENCH_RUNS
        assert ["--resume" in words for words in runs] == [False, *[True] * (len(runs) - 1)]

    def test_both_reports_are_shown(
        self, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        for name, verdict in (("cuda-a", "missed"), ("cuda-a-linear", "held")):
            text = f"# A report\n\n## In short\n\nof {name} | {verdict} |\n\n## More\n\nmore\n"
            (out / f"{name}.md").write_text(text)
            os.utime(out / f"{name}.md", (time.time() + 60,) * 2)
        gpu_check.main(["--output", str(out), "--only", "linear"])
        text = capsys.readouterr().out
        assert "of cuda-a | missed" in text and "of cuda-a-linear | held" in text
        assert "1 held, 1 missed" in text and "more" not in text
        assert f"{out / 'cuda-a.json'}\n" in text and f"{out / 'cuda-a-linear.json'}\n" in text

    def test_without_a_gpu(
        self, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.answers["environment.py"] = (2, "There is no GPU.")
        with pytest.raises(SystemExit, match="2"):
            gpu_check.main(["--output", str(tmp_path / "out")])
        assert capsys.readouterr().err == "There is no GPU.\n"
        assert not (tmp_path / "out").exists()

    def test_wheels_and_what_they_run_at_start(
        self, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wheels = tmp_path / "wheels"
        wheels.mkdir()
        (wheels / "peer-1-py3-none-any.whl").touch()
        monkeypatch.setattr(sys, "path", list(sys.path))
        options = ["--output", str(tmp_path), "--wheels", str(wheels), "--only", "bench"]
        check = gpu_check.Check(gpu_check.parse(options))
        folder = gpu_check.WORK / "peers" / "all"

        def install(what: Any, target: Path) -> processes.Finished:
            assert target == folder and [wheel.parent for wheel in what] == [wheels]
            folder.mkdir(parents=True)
            (folder / "peer.pth").write_text("import sys; sys.found_peer = True\n")
            return processes.Finished(0, 0.0, "")

        monkeypatch.setattr(check, "install", install)
        check.add_wheels()
        code = "import sys; print(sys.found_peer, sys.path[:4])"
        done = subprocess.run(
            [sys.executable, "-c", code], env=check.environment, capture_output=True, text=True
        )
        assert done.stdout.startswith("True") and str(folder) in done.stdout, done.stderr

    def test_steps_by_name(self) -> None:
        assert gpu_check.steps("bench,build") == ("build", "bench")
        with pytest.raises(argparse.ArgumentTypeError, match="fly"):
            gpu_check.steps("fly")
