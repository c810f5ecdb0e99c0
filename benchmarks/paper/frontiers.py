"""Forgetting against what was learned, for each loss, rate and seed."""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from harness.device import open_device
from harness.machine import FOLDER, describe

from eaft_ext.cli.model import load

from . import texts
from .measurements import REGIONS, Ruler
from .study import PRESETS, Preset, Run, runs_of
from .training import train

FILE = "paper-frontiers.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="how much (default: %(default)s)")
    add("--data", type=Path, required=True, metavar="DIR", help=f"folder of {', '.join(FILES)}")
    add("--model", help="transformers model folder or hub name (default: SmolLM2-135M-Instruct)")
    add("--output", type=Path, default=FOLDER, metavar="DIR", help=f"folder of {FILE}")
    add("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    add("--minutes", type=float, default=float("inf"), help="begin no run after so many")


FILES = (texts.TRAIN, texts.TARGET, texts.DRIFT)


def run(arguments: argparse.Namespace) -> int:
    """Do the runs that the result file does not have; it is written after each."""
    began = time.monotonic()
    preset = PRESETS[arguments.preset]
    file = arguments.output / FILE
    results = _opened(file, arguments)
    missing = [one for one in runs_of(preset) if one.name not in results["runs"]]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a process begins
    print(f"{len(missing)} of {len(runs_of(preset))} runs to do, {arguments.jobs} at a time")
    with tempfile.TemporaryDirectory() as scratch:
        given = (arguments.model, arguments.data, arguments.preset, Path(scratch), threads)
        with ProcessPoolExecutor(
            arguments.jobs, multiprocessing.get_context("spawn"), _prepare, given
        ) as pool:
            waiting = iter(missing)
            under_way = {pool.submit(_run, one) for one in islice(waiting, arguments.jobs)}
            done = 0
            while under_way:
                finished = next(as_completed(under_way))
                under_way.remove(finished)
                name, found, counts = finished.result()
                results["runs"][name] = found
                results["counts"] = counts
                _write(results, file)
                done += 1
                elapsed = time.monotonic() - began
                left = (len(missing) - done) * elapsed / done
                print(f"{name}: {_told(found, counts)}; {left / 60:.0f} min left", flush=True)
                if elapsed < arguments.minutes * 60:
                    under_way |= {pool.submit(_run, one) for one in islice(waiting, 1)}
    print(f"{file}: {len(results['runs'])} runs")
    return 0


def _opened(file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What was done before, of the same preset, or nothing yet."""
    given = {
        "preset": arguments.preset,
        "settings": json.loads(json.dumps(asdict(PRESETS[arguments.preset]))),
        "model": arguments.model or "SmolLM2-135M-Instruct",
    }
    if not file.exists():
        return {"machine": describe(open_device("cpu")), **given, "counts": {}, "runs": {}}
    results: dict[str, Any] = json.loads(file.read_text())
    for name, value in given.items():
        if results[name] != value:
            sys.exit(f"{file} is of {name} {results[name]}, not {value}: choose another --output")
    return results


def _write(results: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(file)


def _told(found: dict[str, Any], counts: dict[str, Any]) -> str:
    last = found["measured"][-1]
    tokens = sum(sum(counts["target"][region]) for region in REGIONS)
    target = sum(sum(last["target_nll"][region]) for region in REGIONS) / tokens
    kl = sum(last["drift_kl"]) / sum(counts["drift"])
    return f"target {target:.3f}, KL {kl:.4f}, {found['seconds']:.0f} s"


class _Workplace:
    """What a process keeps between its runs."""

    base: Any
    texts: texts.Texts
    preset: Preset
    candidates: list[torch.Tensor]
    rulers: dict[str, Ruler]
    scratch: Path


def _prepare(model: str | None, data: Path, preset: str, scratch: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    _Workplace.base, tokenizer = load(model)
    _Workplace.base.eval()
    _Workplace.preset = PRESETS[preset]
    _Workplace.texts = texts.read(data, tokenizer, _Workplace.preset)
    _Workplace.candidates = texts.plantable(_Workplace.base, _Workplace.texts.train)
    _Workplace.rulers = {}
    _Workplace.scratch = scratch


def _run(run: Run) -> tuple[str, dict[str, Any], dict[str, Any]]:
    here = _Workplace
    if run.precision not in here.rulers:
        file = here.scratch / f"{run.precision}-{os.getpid()}.pt"
        here.rulers[run.precision] = Ruler(here.base, here.texts, run.precision, file)
    ruler = here.rulers[run.precision]
    began = time.perf_counter()
    labels, count = None, 0
    if run.arm == "planted":
        labels, count = texts.planted(here.texts.train, here.candidates, run.seed)
    torch.manual_seed(run.seed)
    batches = texts.steps_of(here.texts.train, labels, here.preset, run.seed)
    measured, steps = train(copy.deepcopy(here.base), batches, ruler, here.preset, run)
    found = {
        **asdict(run),
        "planted": count,
        "seconds": round(time.perf_counter() - began, 1),
        "measured": [_rounded(asdict(one)) for one in measured],
        "steps": _rounded(steps),
    }
    return run.name, found, asdict(ruler.counts)


def _rounded(value: Any) -> Any:
    """Six digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return value
