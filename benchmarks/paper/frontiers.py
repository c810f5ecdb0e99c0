"""Forgetting against what was learned, for each loss, rate and seed."""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eaft_ext.cli.model import load, shown_name

from . import pool, texts
from .files import opened
from .measurements import REGIONS, Ruler
from .options import add_study
from .study import PRESETS, Preset, Run, runs_of
from .training import train

FILE = "paper-frontiers.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_study(parser, FILE)
    pool.add_arguments(parser.add_argument)


def run(arguments: argparse.Namespace) -> int:
    """Do the runs that the result file does not have; it is written after each."""
    preset = PRESETS[arguments.preset]
    file = arguments.output / FILE
    settings = {
        "preset": arguments.preset,
        "settings": asdict(preset),
        "model": shown_name(arguments.model),
    }
    results = opened(file, settings)
    runs = {one.name: one for one in runs_of(preset)}
    with tempfile.TemporaryDirectory() as scratch:
        given = (arguments.model, arguments.data, arguments.preset, Path(scratch))
        ended = pool.do_missing(_run, runs, arguments, results, file, _prepare, given)
        for name, found, left in ended:
            told = _told(found, results["counts"])
            print(f"{name}: {told}; {left:.0f} min left", flush=True)
    return 0


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
        words = texts.edits(here.texts.train, here.candidates)
        here.rulers[run.precision] = Ruler(here.base, here.texts, words, run.precision, file)
    ruler = here.rulers[run.precision]
    began = time.perf_counter()
    batches, wrong = texts.steps_of(
        here.texts.train, here.candidates, here.preset, run.arm, run.seed
    )
    model = copy.deepcopy(here.base)
    measured = [ruler.base]

    def after_step(step: int) -> None:
        if step in here.preset.measured_at:
            measured.append(ruler.measure(model, step))

    steps = train(model, batches, here.preset, run, after_step)
    found = {
        **asdict(run),
        "planted": wrong,
        "seconds": round(time.perf_counter() - began, 1),
        "measured": [asdict(one) for one in measured],
        "steps": steps,
    }
    return run.name, found, {"counts": asdict(ruler.counts)}
