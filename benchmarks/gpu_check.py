"""Builds, tests, sanitises and measures on a GPU, in one unattended call of less than ten minutes.

The steps, each within its own time limit; one that fails does not stop those after it:

    build       pip install into build/gpu_check/site, for this GPU alone
    suite       pytest, but for what has nothing to do with a GPU
    sanitize    sanitize.py under compute-sanitizer: the tools that gpu/outcomes.py lists
    bench       run.py --device cuda, with the peers that are installed
    linear      linear_loss.py --device cuda, likewise
    use         use.py: the commands and a short fine-tuning run; only with --only, as in
                --only build,use,scaling
    scaling     scaling.py --device cuda, like bench; only with --only

Writes gpu_check.json and gpu_check.log, and the benchmarks <gpu>.json and .md,
<gpu>-linear.json and .md, and <gpu>-scaling.json and .md. Ends with 0 if all steps passed, with 1
if one did not, and with 2 where there is no GPU.
"""

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
from typing import Any, NamedTuple

from contenders import peers
from gpu import outcomes, processes
from gpu.outcomes import WATCHES
from gpu.processes import Command, Finished

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
WORK = ROOT / "build" / "gpu_check"


class Step(NamedTuple):
    """The most seconds that it gets, and those that it finds left when its turn comes."""

    limit: float
    reserved: float
    benchmark: str = ""
    by_default: bool = True


STEPS = {
    "build": Step(270.0, 0.0),
    "suite": Step(150.0, 50.0),
    "sanitize": Step(110.0, 50.0),
    "bench": Step(600.0, 100.0, "run.py"),
    "linear": Step(600.0, 75.0, "linear_loss.py"),
    # There is no time for all of them in one call.
    "use": Step(120.0, 60.0, by_default=False),
    "scaling": Step(600.0, 75.0, "scaling.py", by_default=False),
}
DEFAULT_STEPS = tuple(name for name, step in STEPS.items() if step.by_default)
FEWEST_SECONDS = 15.0
ENVIRONMENT_SECONDS = 120.0
REPORT_SECONDS = 5.0
# Benchmarks take so long to begin and, at most, to end their last case after their time.
BENCH_MARGIN_SECONDS = 25.0

# The commands are tried by use.py, and their tests are of the CPU; the compiler's report is in the
# log of the build; what runs on the device need not run on the host, where the sweep runs.
LEFT_OUT = (
    *("test_demo*.py", "test_inspect.py", "test_bench_command.py", "test_benchmarks_scaling.py"),
    *("test_build.py", "test_registers.py", "test_*_on_host.py", "test_ptx_*.py"),
    "test_transformers_sweep.py",
)
MOST_WORKERS = 12
BENCH_RUNS = 5
DEVICE_LOST = 3
FIRST_PORT = 49152
TOO_LITTLE_TIME = "not run: too little time"

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
        # Commands run elsewhere.
        self.wheels: Path | None = arguments.wheels and arguments.wheels.resolve()
        self.output: Path = arguments.output.resolve()
        self.log = self.output / "gpu_check.log"
        self._end: float = time.monotonic() + 60 * arguments.minutes
        self.record: dict[str, Any] = {"steps": {}}
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if arguments.commit:
            self.environment["EAFT_EXT_COMMIT"] = arguments.commit
        # The tools of this Python's environment, ninja above all, and of the toolkit.
        home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
        path = [f"{WORK}/site/bin", sysconfig.get_path("scripts"), os.environ["PATH"]]
        path += [f"{home}/bin", f"{home}/compute-sanitizer"]
        self.environment["PATH"] = os.pathsep.join(path)

    def limit(self, step: str) -> float:
        """Seconds for a step, so that those after it get theirs."""
        later = self.steps[self.steps.index(step) + 1 :]
        # The report has its time, too.
        left = self._end - time.monotonic() - REPORT_SECONDS
        return min(STEPS[step].limit, left - sum(STEPS[each].reserved for each in later))

    def run(
        self, command: Command, limit: float, *, log: Path | None = None, **more: str
    ) -> Finished:
        """Run a command with more in its environment, where the checkout is not imported from."""
        environment = {**self.environment, **more}
        return processes.run(command, log or self.log, limit, environment=environment, folder=WORK)

    def save(self) -> None:
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
        _, begin, text = done.output.partition("\n{")
        if done.code != 0 or not begin:
            print((done.output.strip() or "it printed nothing").splitlines()[-1], file=sys.stderr)
            sys.exit(2 if done.code == 2 else 1)
        self.output.mkdir(parents=True, exist_ok=True)
        self.log.write_text(done.output)
        self.record["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.record["environment"], _ = json.JSONDecoder().raw_decode("{" + text)
        found = self.record["environment"]
        self.environment.setdefault("MAX_JOBS", str(found["cores"]))
        if not self.environment.get("TORCH_CUDA_ARCH_LIST"):
            self.environment["TORCH_CUDA_ARCH_LIST"] = found["capability"]

    def take_over(self) -> None:
        """Keep what earlier calls found out about the steps that this one leaves out."""
        path = self.output / "gpu_check.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        if earlier.get("environment", {}).get("gpu") == self.record["environment"]["gpu"]:
            for step, found in earlier["steps"].items():
                if step not in self.steps:
                    self.record["steps"][step] = {**found, "date": earlier["date"]}

    def add_wheels(self) -> None:
        """Install peers into folders of their own, all at once or, if one will not, one by one."""
        self.use_folders()
        if self.wheels is None:
            return
        peers_folder = WORK / "peers"
        shutil.rmtree(peers_folder, ignore_errors=True)
        wheels = sorted(self.wheels.glob("*.whl"))
        print(f"installing {len(wheels)} wheels", flush=True)
        if wheels and self.install(wheels, peers_folder / "all").code != 0:
            shutil.rmtree(peers_folder / "all", ignore_errors=True)
            for wheel in wheels:
                if self.install([wheel], peers_folder / wheel.stem).code != 0:
                    print(f"  without {wheel.name}: the log says why", flush=True)
        self.use_folders()

    def install(self, what: Sequence[Path], folder: Path) -> Finished:
        """Install wheels, or the package, into a folder; nothing is fetched."""
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-input"]
        command += ["--disable-pip-version-check", "--no-compile", "--target", folder, *what]
        if what == [ROOT]:
            return self.run([*command, "--no-build-isolation", "-v"], self.limit("build"))
        return self.run(command, 60.0)

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
            looked = self.run([sys.executable, "-c", IMPORT_CHECK], 60.0)
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
        command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
        command += [ROOT / "tests", "--slow", "-v", "--tb=short", "--color=no", "--maxfail=100"]
        command += ["-p", "no:cacheprovider", *(f"--ignore-glob=*/{name}" for name in LEFT_OUT)]
        if importlib.util.find_spec("xdist"):
            workers = min(self.record["environment"]["cores"], MOST_WORKERS)
            command += ["-n", str(workers)]
        if importlib.util.find_spec("pytest_timeout"):
            # Of a kernel that hangs, only the end of its process is the end.
            command += [f"--timeout={max(limit / 2, 20):.0f}", "--timeout-method=thread"]
        # Each worker may compile in torch.compile's own pool of processes, of all cores by default.
        done = self.run(command, limit, TORCHINDUCTOR_COMPILE_THREADS="2")
        found = {"outcome": done.outcome, "left_out": list(LEFT_OUT)}
        found |= outcomes.suite(done.output)
        if done.code == 0 and not found["passed_on_cuda"]:
            found["outcome"] = "failed: no test ran on the GPU"
        return found

    def sanitize(self) -> dict[str, Any]:
        # A wheel of it goes before the toolkit's: the release notes of newer ones list races that
        # they no longer report, and that were none.
        folders = [str(folder) for folder in (WORK / "peers").glob("*/nvidia/*/bin")]
        search = os.pathsep.join([*folders, self.environment["PATH"]])
        program = shutil.which("compute-sanitizer", path=search)
        if program is None:
            return {"outcome": "failed: there is no compute-sanitizer"}
        limit = self.limit("sanitize")
        logs = {name: WORK / f"{name.replace(' ', '_')}.log" for name in WATCHES}

        def run(name: str, port: int) -> dict[str, Any]:
            watch = WATCHES[name]
            command = [*watch.command(program, port), sys.executable, FOLDER / "sanitize.py"]
            logs[name].write_bytes(b"")
            # Each tensor gets memory of its own, so that what is read beyond it is not another's.
            done = self.run(command, limit, log=logs[name], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            found = {"outcome": done.outcome, "seconds": round(done.seconds, 1)}
            found |= outcomes.sanitizer(done.output)
            if found["outcome"] == "passed" and found["errors"] is None:
                found["outcome"] = "failed: no summary"
            return found | {"counts": watch.counts}

        with ThreadPoolExecutor(len(WATCHES)) as pool:
            # Each tool may try some ports.
            ports = range(FIRST_PORT, 2**16, 100)
            tools = dict(zip(WATCHES, pool.map(run, WATCHES, ports), strict=True))
        with self.log.open("ab") as log:
            log.writelines(path.read_bytes() for path in logs.values())
        counted = [found["outcome"] for found in tools.values() if found["counts"]]
        bad = [outcome for outcome in counted if outcome != "passed"]
        return {"outcome": bad[0] if bad else "passed", "program": program, "tools": tools}

    def use(self) -> dict[str, Any]:
        return {"outcome": self.run([sys.executable, FOLDER / "use.py"], self.limit("use")).outcome}

    def measure(self, step: str) -> dict[str, Any]:
        """A benchmark, in a new process where one is lost with its device."""
        done, runs = None, 0
        while runs < BENCH_RUNS and (done is None or done.code == DEVICE_LOST or done.crashed):
            limit = self.limit(step)
            if limit < FEWEST_SECONDS + BENCH_MARGIN_SECONDS:
                break
            minutes = (limit - BENCH_MARGIN_SECONDS) / 60
            command = [sys.executable, FOLDER / STEPS[step].benchmark, "--device", "cuda"]
            command += ["--output", self.output, "--minutes", f"{minutes:.2f}"]
            command += ["--checks", self.output / "gpu_check.json", *(["--resume"] if runs else [])]
            done = self.run(command, limit)
            runs += 1
        return {"outcome": done.outcome if done else TOO_LITTLE_TIME, "runs": runs}

    def run_step(self, step: str) -> None:
        begin, log_begin = time.monotonic(), self.log.stat().st_size
        is_benchmark = bool(STEPS[step].benchmark)
        found: dict[str, Any]
        usable = self.record["steps"].get("build", {}).get("usable", True)
        if self.limit(step) < FEWEST_SECONDS + BENCH_MARGIN_SECONDS * is_benchmark:
            found = {"outcome": TOO_LITTLE_TIME}
        elif step != "build" and not usable:
            found = {"outcome": "not run: the build failed"}
        else:
            print(f"{step} (at most {self.limit(step):.0f} s) ...", flush=True)
            try:
                found = self.measure(step) if is_benchmark else getattr(self, step)()
            except Exception as error:  # of this script: the other steps shall run all the same
                found = {"outcome": f"failed: {type(error).__name__}: {error}"}
        found["seconds"] = round(time.monotonic() - begin, 1)
        self.record["steps"][step] = found
        self.save()
        print(f"  {found['outcome']} after {found['seconds']} s", flush=True)
        if found["outcome"] != "passed":
            # Why is most likely at the end of the log; what was skipped is not why.
            text = self.log.read_bytes()[log_begin:].decode(errors="replace").splitlines()
            shown = [line[:200] for line in text if not line.startswith("SKIPPED")][-25:]
            print("\n".join(f"  | {line}" for line in shown), flush=True)


def describe_step(step: str, found: dict[str, Any]) -> str:
    line = f"{step:<9} {found['outcome']}, {found['seconds']} s"
    if "passed_on_cuda" in found:
        line += ": {passed} passed ({passed_on_cuda} on CUDA), {failed} failed, {errors} errors, "
        line = f"{line}{{skipped}} skipped".format(**found)
    lines = [line, *found.get("failed_tests", [])[:10]]
    for tool, of_tool in found.get("tools", {}).items():
        line = "{outcome}, {errors} errors, {warnings} warnings, {wrong_results} wrong results"
        does_count = "" if of_tool["counts"] else " (does not count)"
        lines.append(f"{tool}: {line.format(**of_tool)}{does_count}")
    return "\n          ".join(lines)


def report(check: Check) -> None:
    """The benchmarks in short, and last of all how each step went."""
    record = check.record
    times = {file: file.stat().st_mtime for file in check.output.glob("cuda-*.md")}
    begin = datetime.fromisoformat(record["date"]).timestamp()  # of this call
    paths = [file for file in sorted(times, key=times.__getitem__) if times[file] >= begin]
    texts = [path.read_text().partition("## In short\n")[2] for path in paths]
    short = "\n\n".join(text.partition("\n## ")[0].strip() for text in texts)
    if short:
        print(f"\n{short}\n")
    environment = record["environment"]
    print("\n{gpu}, driver {driver}, CUDA {cuda}, torch {torch}".format(**environment), end="; ")
    print(f"a copy moves {environment['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    print(f"peers: {', '.join(f'{k} {v}' for k, v in record['peers'].items()) or 'none'}")
    for step in STEPS:
        if step in record["steps"]:
            print(describe_step(step, record["steps"][step]))
    if short:
        print(f"bounds    {short.count('| held |')} held, {short.count('| missed |')} missed")
    for path in paths or [check.output / "gpu_check"]:
        print(f"results   {path.with_suffix('.json')}")


def steps(text: str) -> tuple[str, ...]:
    """Names, separated by commas, in the order of the steps."""
    names = set(text.split(","))
    if unknown := names - STEPS.keys():
        raise argparse.ArgumentTypeError(f"{sorted(unknown)} are not among {', '.join(STEPS)}")
    return tuple(step for step in STEPS if step in names)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu_check.sh", None, summary, details, formatter_class=raw)
    results = FOLDER / "results"
    add = parser.add_argument
    add("--only", type=steps, default=DEFAULT_STEPS, metavar="STEP,...")
    add("--minutes", type=float, default=9.5, help="for everything (default 9.5)")
    add("--wheels", type=Path, metavar="DIR", help="peers to install from there")
    add("--output", type=Path, default=results, metavar="DIR", help="default: benchmarks/results")
    add("--commit", default="", metavar="ID", help="where this is no git checkout")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
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
