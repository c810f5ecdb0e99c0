"""Fine-tuning without the tokens that teach least, beside one with all of them."""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eaft_ext.cli.batches import Batch
from eaft_ext.cli.model import load, shown_name
from eaft_ext.integrations.transformers import LinearGatedLoss, use_linear_gated_ce

from . import pool, study, texts
from .files import opened
from .measurements import logits_of, stats_of
from .options import add_data, add_model
from .study import Preset, Run
from .texts import K
from .training import train

FILE = "paper-muted.json"
SHARES = (0.0, 1e-3)
"""Values of ``drop_below``."""
PRESETS = {
    "tiny": study.PRESETS["tiny"],
    # Some 15 minutes of two CPU cores.
    "small": replace(
        study.PRESETS["small"],
        rows=360,
        rows_a_step=1,
        length=128,
        measured_at=(50, 100, 150, 200),
        rates=(1e-4,),
        seeds=3,
    ),
}


@dataclass(frozen=True)
class Muted:
    """One fine-tuning on EAFT, with a value of ``drop_below``."""

    run: Run
    share: float

    @property
    def name(self) -> str:
        """Unlike that of every other one."""
        return f"seed{self.run.seed}-{self.share:g}"


def runs_of(preset: Preset, precision: str) -> list[Muted]:
    """One seed after the other, each with every share."""
    return [
        Muted(Run("natural", "eaft", preset.rates[0], seed, precision), share)
        for seed, share in itertools.product(range(preset.seeds), SHARES)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_data(parser, (texts.TRAIN, texts.TARGET, texts.DRIFT))
    add_model(parser, FILE)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="how much (default: %(default)s)")
    precisions = ("bfloat16", "float32")
    add("--precision", choices=precisions, default="bfloat16", help="(default: %(default)s)")
    pool.add_arguments(add)


def run(arguments: argparse.Namespace) -> int:
    """Do the runs that the result file does not have; it is written after each."""
    preset = PRESETS[arguments.preset]
    file = arguments.output / FILE
    named = {name: getattr(arguments, name) for name in ("preset", "precision")}
    settings = {**named, "settings": asdict(preset), "model": shown_name(arguments.model)}
    results = opened(file, settings)
    runs = {one.name: one for one in runs_of(preset, arguments.precision)}
    given = (arguments.model, arguments.data, preset)
    ended = pool.do_missing(_run, runs, arguments, results, file, _prepare, given)
    for name, of_run, left in ended:
        told = f"{of_run['measured'][-1]['nll']:.4f} nats, {of_run['seconds']:.0f} s"
        print(f"{name}: {told}; {left:.0f} min left", flush=True)
    return 0


class _Workplace:
    """What a process keeps between its runs."""

    base: Any
    texts: texts.Texts
    preset: Preset


def _prepare(model: str | None, data: Path, preset: Preset, threads: int) -> None:
    torch.set_num_threads(threads)
    _Workplace.base, tokenizer = load(model)
    _Workplace.preset = preset
    _Workplace.texts = texts.read(data, tokenizer, preset)


def _run(muted: Muted) -> tuple[str, dict[str, Any], dict[str, Any]]:
    here, one = _Workplace, muted.run
    began = time.perf_counter()
    batches, _ = texts.steps_of(here.texts.train, [], here.preset, one.arm, one.seed)
    model = copy.deepcopy(here.base)
    measured = [{"step": 0, "nll": held_out(model, here.texts.target, one.precision)}]
    with use_linear_gated_ce(model, K, drop_below=muted.share) as gated:
        curves = Curves(gated, one.precision)

        def after_step(step: int) -> None:
            if step in here.preset.measured_at:
                nll = held_out(model, here.texts.target, one.precision)
                measured.append({"step": step, "nll": nll})

        steps = train(model, batches, here.preset, one, after_step, curves.loss_of)
    found = {
        "seed": one.seed,
        "drop_below": muted.share,
        "seconds": round(time.perf_counter() - began, 1),
        "measured": measured,
        "steps": {**steps, "loss": curves.losses, "dropped": curves.dropped},
    }
    return muted.name, found, {}


class Curves:
    """Losses that the model computes itself, and the share of rows that each one left out."""

    def __init__(self, gated: LinearGatedLoss, precision: str) -> None:
        self.losses: list[float] = []
        self.dropped: list[float] = []
        self._gated, self._precision = gated, precision

    def loss_of(self, model: Any, batch: Batch, number: int) -> Any:
        """The loss of a step, and the stats of its tokens."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bfloat16"):
            labels = {"labels": batch.labels, "shift_labels": batch.labels}
            loss = model(input_ids=batch.input_ids, use_cache=False, **labels).loss
        stats = self._gated.stats
        assert stats is not None, "it is of this call"
        gone = stats.gate == 0 if stats.dropped is None else stats.dropped
        self.losses.append(float(loss.detach()))
        self.dropped.append(float(gone[stats.valid].float().mean()))
        return loss, stats


@torch.no_grad()
def held_out(model: Any, batches: list[Batch], precision: str) -> float:
    """The mean cross-entropy of the labels, in nats a token, ungated."""
    was_training = model.training
    model.eval()
    nll = [stats_of(*logits_of(model, batch, precision)).nll for batch in batches]
    model.train(was_training)
    return float(torch.cat(nll).double().mean())
