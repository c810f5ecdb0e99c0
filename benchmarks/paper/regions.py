"""Where the gradient goes: its norm over the plane of probability and entropy, by gate."""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch

from eaft_ext.cli.batches import Batch
from eaft_ext.cli.gates_shown import GATES
from eaft_ext.cli.inspect.tokens import gradient_norm
from eaft_ext.cli.model import load, shown_name

from . import texts
from .files import opened, write
from .measurements import logits_of, stats_of
from .options import add_study
from .study import ARMS, PRESETS, Run
from .texts import K
from .training import train

FILE = "paper-regions.json"
PROBABILITY = (0.0, 0.1, 0.3, 0.6, 0.9, 1.0)
ENTROPY = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
"""Edges of the regions: of p(y), and of H / ln k."""
TRAINED = ("sft", "eaft")
PRECISION = "bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_study(parser, FILE)


def run(arguments: argparse.Namespace) -> int:
    """Train what the result file does not have, and measure at the start and at the end."""
    preset = PRESETS[arguments.preset]
    file = arguments.output / FILE
    given = {"preset": arguments.preset, "model": shown_name(arguments.model)}
    results = opened(file, {**given, "probability": PROBABILITY, "entropy": ENTROPY})
    found = results.setdefault("runs", {})
    base, tokenizer = load(arguments.model)
    base.eval()
    rows = texts.read(arguments.data, tokenizer, preset).train
    candidates = texts.plantable(base, rows)
    for arm in ARMS:
        for loss in TRAINED:
            one = Run(arm, loss, preset.rates[0], 0, PRECISION)
            if one.name in found:
                continue
            batches, wrong = texts.steps_of(rows, candidates, preset, arm, one.seed)
            seen = batches[: math.ceil(len(rows) / preset.rows_a_step)]
            model = copy.deepcopy(base)
            start = plane(model, seen)
            train(model, batches, preset, one, lambda step: None)
            end = plane(model.eval(), seen)
            found[one.name] = {"planted": wrong, "steps": len(batches), "start": start, "end": end}
            write(results, file)
            print(one.name, flush=True)
    print(file)
    return 0


@torch.no_grad()
def plane(model: Any, batches: list[Batch]) -> dict[str, Any]:
    """Tokens of each region, and the sum of their gradient norms under each gate.

    The norm is that of the gradient of a token's loss by its logits, which are detached from the
    gate: g |p - onehot(y)|. Regions: a list for each step of entropy, over the steps of
    probability.
    """
    cells = (len(ENTROPY) - 1, len(PROBABILITY) - 1)
    found: dict[str, torch.Tensor] = {name: torch.zeros(cells) for name in ("tokens", *GATES)}
    for batch in batches:
        logits, labels = logits_of(model, batch, PRECISION)
        stats = stats_of(logits, labels)
        of_label = (-stats.nll).exp()
        norm = gradient_norm(logits.float().log_softmax(-1), of_label)
        row = torch.bucketize(stats.entropy / math.log(K), torch.tensor(ENTROPY[1:-1]))
        column = torch.bucketize(of_label, torch.tensor(PROBABILITY[1:-1]))
        found["tokens"].index_put_((row, column), torch.ones_like(norm), accumulate=True)
        for name, gate in GATES.items():
            weight = gate.for_k(K)(stats.nll, stats.entropy)
            found[name].index_put_((row, column), weight * norm, accumulate=True)
    return {name: cells.tolist() for name, cells in found.items()}
