"""What a model still knows after a fine-tuning: PIQA, the likelier of two answers."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eaft_ext.cli.batches import IGNORE_INDEX, Example, batched
from eaft_ext.cli.model import load, shown_name

from . import pool, study, texts
from .files import opened
from .measurements import logits_of, stats_of
from .options import add_data, add_model
from .study import ARMS, Preset, Run
from .training import train

FILE = "paper-knowledge.json"
QUESTIONS, RIGHT = "piqa_valid.jsonl", "piqa_valid_labels.lst"
# The runs are some of those of the frontiers, tuned again.
LOSSES = ("sft", "eaft")
PRESETS = ("tiny", "medium")
ROWS_AT_ONCE = 16


def runs_of(preset: Preset) -> list[Run]:
    """One seed after the other, each with both losses in both arms."""
    return [
        Run(arm, loss, preset.rates[0], seed)
        for seed, loss, arm in itertools.product(range(preset.seeds), LOSSES, ARMS)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_data(parser, (texts.TRAIN, texts.TARGET, texts.DRIFT, QUESTIONS, RIGHT))
    add_model(parser, FILE)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="medium", help="how much (default: %(default)s)")
    pool.add_arguments(add)


def run(arguments: argparse.Namespace) -> int:
    """Do the runs that the result file does not have; it is written after each."""
    preset = study.PRESETS[arguments.preset]
    file = arguments.output / FILE
    questions, right = read(arguments.data)
    settings = {"preset": arguments.preset, "settings": asdict(preset), "right": right}
    results = opened(file, {**settings, "model": shown_name(arguments.model)})
    runs = {_name(one): one for one in (None, *runs_of(preset))}
    given = (arguments.model, arguments.data, preset, questions)
    ended = pool.do_missing(_run, runs, arguments, results, file, _prepare, given)
    for name, of_run, left in ended:
        share = sum(map(str.__eq__, of_run["chosen"], right)) / len(right)
        told = f"{100 * share:.1f} % right, {of_run['seconds']:.0f} s"
        print(f"{name}: {told}; {left:.0f} min left", flush=True)
    return 0


def _name(run: Run | None) -> str:
    return "base" if run is None else run.name


class _Workplace:
    """What a process keeps between its runs."""

    base: Any
    texts: texts.Texts
    preset: Preset
    candidates: list[torch.Tensor]
    answers: list[list[Example]]


def _prepare(
    model: str | None, data: Path, preset: Preset, questions: list[dict[str, str]], threads: int
) -> None:
    torch.set_num_threads(threads)
    _Workplace.base, tokenizer = load(model)
    _Workplace.base.eval()
    _Workplace.preset = preset
    _Workplace.texts = texts.read(data, tokenizer, preset)
    _Workplace.candidates = texts.plantable(_Workplace.base, _Workplace.texts.train)
    _Workplace.answers = answers_to(questions, tokenizer)


def read(folder: Path) -> tuple[list[dict[str, str]], str]:
    """The questions of PIQA, and which answer to each is right, as digits 0 and 1."""
    lines = (folder / QUESTIONS).read_text(encoding="utf-8").splitlines()
    right = (folder / RIGHT).read_text().split()
    if len(lines) != len(right) or not set(right) <= {"0", "1"}:
        needed = f"a 0 or a 1 for each of the {len(lines)} questions of {QUESTIONS}"
        sys.exit(f"{folder / RIGHT}: {needed} is needed, and there are {len(right)} labels")
    return [json.loads(line) for line in lines], "".join(right)


def answers_to(questions: list[dict[str, str]], tokenizer: Any) -> list[list[Example]]:
    """The first and the second answer to each question, asked as evaluation harnesses do."""
    answers: list[list[Example]] = [[], []]
    for asked in questions:
        prompt = f"Question: {asked['goal']}\nAnswer:"
        length = len(tokenizer(prompt)["input_ids"])
        for rows, name in zip(answers, ("sol1", "sol2"), strict=True):
            rows.append(Example(tokenizer(f"{prompt} {asked[name]}")["input_ids"], length))
    return answers


def _run(run: Run | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The answers that a run chooses, or that the base model does."""
    here = _Workplace
    began = time.perf_counter()
    model = copy.deepcopy(here.base)
    precision = "bfloat16"
    if run is not None:
        of_arm = (here.candidates, here.preset, run.arm, run.seed)
        batches, _ = texts.steps_of(here.texts.train, *of_arm)
        train(model, batches, here.preset, run, lambda _: None)
        precision = run.precision
    first, second = (nll_of(model, rows, precision) for rows in here.answers)
    chosen = "".join(str(int(one)) for one in second < first)
    found = {
        **({} if run is None else asdict(run)),
        "chosen": chosen,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return _name(run), found, {}


@torch.no_grad()
def nll_of(model: Any, rows: list[Example], precision: str) -> torch.Tensor:
    """The negative log-likelihood of each answer, in nats: [rows]."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    sums = []
    for batch in batched([rows[index] for index in order], ROWS_AT_ONCE):
        logits, labels = logits_of(model, batch, precision)
        of_row = (batch.labels != IGNORE_INDEX).nonzero()[:, 0]
        nll = stats_of(logits, labels).nll.double()
        sums.append(nll.new_zeros(len(batch.labels)).index_add_(0, of_row, nll))
    found = torch.cat(sums)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)
