"""Builds, tests, sanitises and measures on a GPU, in one unattended call of less than ten minutes.

The steps, each within its own time limit; one that fails does not stop those after it:

    build       pip install into build/gpu_check/site, for this GPU alone
    suite       pytest, but for what has nothing to do with a GPU
    sanitize    sanitize.py under compute-sanitizer: what watches.py lists
    bench       run.py --device cuda, with the peers that are installed
    linear      linear_loss.py --device cuda, likewise
    use         use.py: the commands and a short fine-tuning run; only with --only, as in
                --only build,use,scaling
    scaling     scaling.py --device cuda, like bench; only with --only

Writes gpu_check.json and gpu_check.log, and the benchmarks <gpu>.json, .csv and .md,
<gpu>-linear.json and .md, and <gpu>-scaling.json and .md. Ends with 0 if all steps passed, with 1
if one did not, and with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from contenders import peers
from gpu import outcomes, processes
from gpu.processes import Finished
from gpu.watches import FIRST_PORT, WATCHES

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
WORK = ROOT / "build" / "gpu_check"

# There is no time for all of them in one call.
DEFAULT_STEPS = ("build", "suite", "sanitize", "bench", "linear")
STEPS = (*DEFAULT_STEPS, "use", "scaling")
# The most seconds that a step gets, and those that it finds left when its turn comes.
LIMITS = {
    "build": 270.0,
    "suite": 150.0,
    "sanitize": 110.0,
    "bench": 600.0,
    "linear": 600.0,
    "use": 120.0,
    "scaling": 600.0,
}
RESERVED = {
    "build": 0.0,
    "suite": 50.0,
    "sanitize": 50.0,
    "bench": 100.0,
    "linear": 75.0,
    "use": 60.0,
    "scaling": 75.0,
}
FEWEST_SECONDS = 15.0
ENVIRONMENT_SECONDS = 120.0
REPORT_SECONDS = 5.0
BENCHMARKS = {"bench": "run.py", "linear": "linear_loss.py", "scaling": "scaling.py"}
# They take so long to begin and, at most, to end their last case after their time.
BENCH_MARGIN_SECONDS = 25.0

# The commands are tried by use.py, and their tests are of the CPU; the compiler's report is in the
# log of the build; what runs on the device need not run on the host.
LEFT_OUT = (
    "tests/test_demo.py",
    "tests/test_demo_data.py",
    "tests/test_demo_fused_linear.py",
    "tests/test_demo_model.py",
    "tests/test_inspect.py",
    "tests/test_bench_command.py",
    "tests/test_benchmarks_scaling.py",
    "tests/test_build.py",
    "tests/test_cuda_on_host.py",
    "tests/test_kernels_on_host.py",
    "tests/test_topk_on_host.py",
)
MOST_WORKERS = 12
BENCH_RUNS = 5
DEVICE_LOST = 3

# Prints how the package was built, and which operators have no CUDA kernel in it. Those that are
# written in Python have one for all devices.
IMPORT_CHECK = """
import json, torch, eaft_ext
has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
missing = sorted(name.removeprefix("eaft_ext::")
                 for name in torch._C._dispatch_get_all_op_names()
                 if name.startswith("eaft_ext::") and not has_kernel(name, "CUDA"))
print(json.dumps({"build_info": eaft_ext.build_info(), "missing": missing}))
"""

# Python reads .pth files, as some wheels bring them, only in folders that it takes for its own.
SITE_CUSTOMIZE = "from site import addsitedir as add\n"


class Check:
    """One call: its options, its clock, and what is known so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.steps: tuple[str, ...] = arguments.only
        self.wheels: Path | None = arguments.wheels
        self.output: Path = arguments.output
        self._end: float = time.monotonic() + 60 * arguments.minutes
        self.record: dict[str, Any] = {"steps": {}}
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if arguments.commit:
            self.environment["EAFT_EXT_COMMIT"] = arguments.commit
        # The tools of this Python's environment, ninja above all, and of the toolkit.
        tools = [str(WORK / "site" / "bin"), sysconfig.get_path("scripts")]
        home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
        toolkit = [f"{home}/bin", f"{home}/compute-sanitizer"]
        path = [*tools, os.environ.get("PATH", os.defpath), *toolkit]
        self.environment["PATH"] = os.pathsep.join(path)

    @property
    def log(self) -> Path:
        """Where all output goes."""
        return self.output / "gpu_check.log"

    def left(self) -> float:
        """Seconds until the end, but for those of the report."""
        return self._end - time.monotonic() - REPORT_SECONDS

    def limit(self, step: str) -> float:
        """Seconds for a step, so that those after it get theirs."""
        later = self.steps[self.steps.index(step) + 1 :]
        reserved = sum(RESERVED[each] for each in later)
        return min(LIMITS[step], self.left() - reserved)

    def run(self, command: Sequence[str | Path], limit: float, **options: Any) -> Finished:
        """Run a command of a step."""
        options.setdefault("log", self.log)
        return processes.run(command, limit=limit, environment=self.environment, **options)

    def save(self) -> None:
        """Write what is known."""
        self.output.mkdir(parents=True, exist_ok=True)
        partial = WORK / "gpu_check.part"
        partial.write_text(json.dumps(self.record, indent=2) + "\n")
        shutil.move(partial, self.output / "gpu_check.json")

    # -- before the steps ------------------------------------------------------------------------

    def look_around(self) -> None:
        """Describe the machine; without a GPU, say so and exit."""
        WORK.mkdir(parents=True, exist_ok=True)
        log = WORK / "environment.log"
        log.write_bytes(b"")
        done = self.run([sys.executable, FOLDER / "environment.py"], ENVIRONMENT_SECONDS, log=log)
        text = done.output.partition("\n{")
        if done.code != 0 or not text[1]:
            lines = done.output.strip().splitlines() or ["it printed nothing"]
            print(lines[-1], file=sys.stderr)
            sys.exit(2 if done.code == 2 else 1)
        self.output.mkdir(parents=True, exist_ok=True)
        self.log.write_text(done.output)
        self.record["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.record["environment"], _ = json.JSONDecoder().raw_decode("{" + text[2])
        environment = self.environment
        environment.setdefault("MAX_JOBS", str(self.record["environment"]["cores"]))
        capability = self.record["environment"]["capability"]
        if not environment.get("TORCH_CUDA_ARCH_LIST"):
            environment["TORCH_CUDA_ARCH_LIST"] = capability

    def take_over(self) -> None:
        """Keep what earlier calls found out about the steps that this one leaves out."""
        path = self.output / "gpu_check.json"
        if not path.exists():
            return
        earlier = json.loads(path.read_text())
        if earlier.get("environment", {}).get("gpu") == self.record["environment"]["gpu"]:
            for step, found in earlier["steps"].items():
                if step not in self.steps:
                    self.record["steps"][step] = {**found, "date": earlier["date"]}

    def add_wheels(self) -> None:
        """Install peers into folders of their own, all at once or, if one will not, one by one."""
        self.use_folders()
        if self.wheels is None:
            return
        folder = WORK / "peers"
        shutil.rmtree(folder, ignore_errors=True)
        wheels = sorted(self.wheels.glob("*.whl"))
        print(f"installing {len(wheels)} wheels", flush=True)
        if wheels and self.install(wheels, folder / "all").code != 0:
            shutil.rmtree(folder / "all", ignore_errors=True)
            for index, wheel in enumerate(wheels):
                if self.install([wheel], folder / str(index)).code != 0:
                    print(f"  without {wheel.name}: the log says why", flush=True)
        self.use_folders()

    def install(self, what: Sequence[Path], folder: Path) -> Finished:
        """Install wheels, or the package, into a folder; nothing is fetched."""
        options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--no-input"]
        options += ["--no-compile", "--target", str(folder)]
        if what == [ROOT]:
            options += ["--no-build-isolation", "-v"]
        command: list[str | Path] = [sys.executable, "-m", "pip", "install", *options, *what]
        return self.run(command, self.limit("build") if what == [ROOT] else 60.0)

    def use_folders(self) -> None:
        """Put what is installed in our folders first, and see which peers there are."""
        installed = [WORK / "site", *sorted((WORK / "peers").glob("*"))]
        folders = [str(folder) for folder in installed]
        sys.path[1:1] = [folder for folder in folders if folder not in sys.path]
        if any(file for folder in installed for file in folder.glob("*.pth")):
            start = WORK / "start"
            start.mkdir(exist_ok=True)
            (start / "sitecustomize.py").write_text(f"{SITE_CUSTOMIZE}for f in {folders}: add(f)\n")
            folders.insert(0, str(start))
        folders += filter(None, [os.environ.get("PYTHONPATH")])
        self.environment["PYTHONPATH"] = os.pathsep.join(folders)
        importlib.invalidate_caches()
        self.record["peers"] = peers.versions()

    # -- the steps -------------------------------------------------------------------------------

    def build(self) -> dict[str, Any]:
        """Build and install, and look at what came out."""
        site = WORK / "site"
        shutil.rmtree(site, ignore_errors=True)
        self.environment["EAFT_EXT_CUDA"] = "1"
        done = self.install([ROOT], site)
        self.use_folders()
        found: dict[str, Any] = {
            "outcome": done.outcome,
            "arch_list": self.environment["TORCH_CUDA_ARCH_LIST"],
            # What ptxas warns of.
            "spills": sum(map(done.output.count, ("Registers are spilled", "Local memory used"))),
        }
        if done.code == 0:
            looked = self.run([sys.executable, "-c", IMPORT_CHECK], 60.0, folder=WORK)
            found["outcome"] = looked.outcome
            if looked.code == 0:
                found |= json.loads(looked.output.strip().splitlines()[-1])
        found["usable"] = found["outcome"] == "passed"
        if found.get("missing"):
            found["outcome"] = f"failed: no CUDA kernels for {', '.join(found['missing'])}"
        return found

    def suite(self) -> dict[str, Any]:
        """The tests, from another folder: the checkout shall not stand in for the package."""
        limit = self.limit("suite")
        command: list[str | Path] = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml"]
        command += ["--rootdir", ROOT, ROOT / "tests", "-v", "--tb=short", "--color=no"]
        command += ["-p", "no:cacheprovider", "-p", "gpu.instant_failures", "--maxfail=100"]
        command += [f"--ignore={ROOT / path}" for path in LEFT_OUT]
        if importlib.util.find_spec("xdist"):
            workers = min(self.record["environment"]["cores"], MOST_WORKERS)
            command += ["-n", str(workers)]
        if importlib.util.find_spec("pytest_timeout"):
            # Of a kernel that hangs, only the end of its process is the end.
            command += [f"--timeout={max(limit / 2, 20):.0f}", "--timeout-method=thread"]
        before = dict(self.environment)
        self.environment["PYTHONPATH"] += f"{os.pathsep}{FOLDER}"
        # Each worker may compile in torch.compile's own pool of processes, of all cores by default.
        self.environment["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
        done = self.run(command, limit, folder=WORK)
        self.environment = before
        found = {"outcome": done.outcome, "left_out": list(LEFT_OUT)}
        found |= outcomes.suite(done.output)
        if done.code == 0 and not found["passed_on_cuda"]:
            found["outcome"] = "failed: no test ran on the GPU"
        return found

    def sanitize(self) -> dict[str, Any]:
        """All tools at once."""
        # A wheel of it goes before the toolkit's: the release notes of newer ones list races that
        # they no longer report, and that were none.
        folders = [str(folder) for folder in (WORK / "peers").glob("*/nvidia/*/bin")]
        search = os.pathsep.join([*folders, self.environment["PATH"]])
        program = shutil.which("compute-sanitizer", path=search)
        if program is None:
            return {"outcome": "failed: there is no compute-sanitizer"}
        # Each tensor gets memory of its own, so that what is read beyond it is not another's.
        self.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        limit = self.limit("sanitize")
        logs = {name: WORK / f"{name.replace(' ', '_')}.log" for name in WATCHES}

        def run(name: str) -> dict[str, Any]:
            watch = WATCHES[name]
            # Each tool may try some ports.
            port = FIRST_PORT + 100 * list(WATCHES).index(name)
            command: list[str | Path] = [*watch.command(program, port)]
            logs[name].write_bytes(b"")
            command += [sys.executable, FOLDER / "sanitize.py"]
            done = self.run(command, limit, log=logs[name], folder=WORK)
            found = {"outcome": done.outcome, "seconds": round(done.seconds, 1)}
            found |= outcomes.sanitizer(done.output)
            if found["outcome"] == "passed" and found["errors"] is None:
                found["outcome"] = "failed: no summary"
            return found | {"counts": watch.counts}

        with ThreadPoolExecutor(len(WATCHES)) as pool:
            tools = dict(zip(WATCHES, pool.map(run, WATCHES), strict=True))
        del self.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"]
        with self.log.open("ab") as log:
            for path in logs.values():
                log.write(path.read_bytes())
        bad = [
            found["outcome"]
            for found in tools.values()
            if found["counts"] and found["outcome"] != "passed"
        ]
        return {"outcome": bad[0] if bad else "passed", "program": program, "tools": tools}

    def bench(self) -> dict[str, Any]:
        """The loss of logits, beside copies and peers."""
        return self.measure("bench")

    def linear(self) -> dict[str, Any]:
        """The loss with the output layer, beside bare products and peers."""
        return self.measure("linear")

    def use(self) -> dict[str, Any]:
        """What a user does first."""
        done = self.run([sys.executable, FOLDER / "use.py"], self.limit("use"), folder=WORK)
        return {"outcome": done.outcome}

    def scaling(self) -> dict[str, Any]:
        """The loss of logits of many sizes."""
        return self.measure("scaling")

    def measure(self, step: str) -> dict[str, Any]:
        """A benchmark, in a new process where one is lost with its device."""
        done, runs = None, 0
        while runs < BENCH_RUNS and (done is None or done.code == DEVICE_LOST or _crashed(done)):
            limit = self.limit(step)
            if limit < FEWEST_SECONDS + BENCH_MARGIN_SECONDS:
                break
            minutes = (limit - BENCH_MARGIN_SECONDS) / 60
            command: list[str | Path] = [sys.executable, FOLDER / BENCHMARKS[step]]
            command += ["--device", "cuda", "--output", self.output, "--minutes", f"{minutes:.2f}"]
            command += ["--checks", self.output / "gpu_check.json"]
            command += ["--resume"] if runs else []
            done = self.run(command, limit)
            runs += 1
        return {"outcome": done.outcome if done else "not run: too little time", "runs": runs}

    def run_step(self, step: str) -> None:
        """Run a step and take down how it went."""
        begin = time.monotonic()
        log_begin = self.log.stat().st_size
        needed = FEWEST_SECONDS + (BENCH_MARGIN_SECONDS if step in BENCHMARKS else 0)
        found: dict[str, Any]
        usable = self.record["steps"].get("build", {}).get("usable", True)
        if self.limit(step) < needed:
            found = {"outcome": "not run: too little time"}
        elif step != "build" and not usable:
            found = {"outcome": "not run: the build failed"}
        else:
            print(f"{step} (at most {self.limit(step):.0f} s) ...", flush=True)
            try:
                found = getattr(self, step)()
            except Exception as error:  # of this script: the other steps shall run all the same
                found = {"outcome": f"failed: {type(error).__name__}: {error}"}
        found["seconds"] = round(time.monotonic() - begin, 1)
        self.record["steps"][step] = found
        self.save()
        print(f"  {found['outcome']} after {found['seconds']} s", flush=True)
        if found["outcome"] != "passed":
            self.show_end_of_log(log_begin)

    def show_end_of_log(self, begin: int, lines: int = 25) -> None:
        """Why a step failed is most likely there. What was skipped is not why."""
        text = self.log.read_bytes()[begin:].decode(errors="replace").splitlines()
        shown = [line[:200] for line in text if not line.startswith("SKIPPED")][-lines:]
        print("\n".join(f"  | {line}" for line in shown), flush=True)


def _crashed(done: Finished) -> bool:
    """Whether a signal ended a process, not its time."""
    return done.code is not None and done.code < 0


def results_of(check: Check) -> list[Path]:
    """The benchmarks' reports of this call."""
    begin = datetime.fromisoformat(check.record["date"]).timestamp()
    reports = [file for file in check.output.glob("cuda-*.md") if file.stat().st_mtime >= begin]
    return sorted(reports, key=lambda file: file.stat().st_mtime)


def describe_step(step: str, found: dict[str, Any]) -> str:
    """One line, or a few."""
    line = f"{step:<9} {found['outcome']}, {found['seconds']} s"
    if step == "suite" and "passed" in found:
        line += (
            f": {found['passed']} passed ({found['passed_on_cuda']} on CUDA), {found['failed']} "
            f"failed, {found['errors']} errors, {found['skipped']} skipped"
        )
        line += "".join(f"\n          {name}" for name in found["failed_tests"][:10])
    for tool, tool_found in found.get("tools", {}).items():
        line += (
            f"\n          {tool}: {tool_found['outcome']}, {tool_found['errors']} errors, "
            f"{tool_found['warnings']} warnings, {tool_found['wrong_results']} wrong results"
            f"{'' if tool_found['counts'] else ' (does not count)'}"
        )
    return line


def report(check: Check) -> None:
    """The benchmarks in short, and last of all how each step went."""
    record = check.record
    paths = results_of(check)
    texts = [path.read_text().partition("## In short\n")[2] for path in paths]
    short = "\n\n".join(text.partition("\n## ")[0].strip() for text in texts)
    if short:
        print(f"\n{short}\n")
    environment = record["environment"]
    print(
        f"\n{environment['gpu']}, driver {environment['driver']}, CUDA {environment['cuda']}, "
        f"torch {environment['torch']}; a copy moves "
        f"{environment['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    )
    print(f"peers: {', '.join(f'{k} {v}' for k, v in record['peers'].items()) or 'none'}")
    for step in STEPS:
        if step in record["steps"]:
            print(describe_step(step, record["steps"][step]))
    if short:
        print(f"bounds    {short.count('| held |')} held, {short.count('| missed |')} missed")
    for path in paths or [check.output / "gpu_check"]:
        print(f"results   {path.with_suffix('.json')}")


def steps(text: str) -> tuple[str, ...]:
    """Names of steps, separated by commas, in their order."""
    names = set(text.split(","))
    if unknown := names - set(STEPS):
        raise argparse.ArgumentTypeError(f"{sorted(unknown)} are not among {', '.join(STEPS)}")
    return tuple(step for step in STEPS if step in names)


def folder(text: str) -> Path:
    """An absolute path: commands run elsewhere."""
    return Path(text).resolve()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=steps, default=DEFAULT_STEPS, metavar="STEP,...")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default 9.5)")
    parser.add_argument("--wheels", type=folder, metavar="DIR", help="peers to install from there")
    parser.add_argument(
        "--output",
        type=folder,
        default=FOLDER / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    parser.add_argument("--commit", default="", metavar="ID", help="where this is no git checkout")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps and report."""
    check = Check(parse(arguments))

    def stop(number: int, _: object) -> None:
        processes.end_all()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    check.look_around()
    check.take_over()
    check.add_wheels()
    check.save()
    try:
        for step in check.steps:
            check.run_step(step)
    finally:
        report(check)
    passed = all(found["outcome"] == "passed" for found in check.record["steps"].values())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
