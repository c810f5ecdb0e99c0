"""``eaft-ext demo``: options, the two runs, and what is left behind when they end."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import eaft_ext
from eaft_ext.cli.batches import IGNORE_INDEX, Batch, evaluation_batches, training_batches
from eaft_ext.cli.console import make_console
from eaft_ext.cli.errors import FAILURE, INTERRUPTED, SUCCESS, CommandError
from eaft_ext.cli.model import check_length, load, shown_name
from eaft_ext.cli.options import (
    add_reading,
    default_device,
    positive_float,
    positive_int,
    require_extras,
)
from eaft_ext.cli.records import Record, read_records

from . import corpus
from .evaluation import Evaluator
from .losses import check_output_layer, of_hidden, of_logits
from .memory import measure
from .planted import PLANTED_SHARE, plant, sure_and_right
from .precision import forward
from .progress import Progress
from .results import Results, explanation, table, write_csv, write_json
from .settings import Settings
from .training import ReferenceMismatch, Run, train

EVALUATION_TOKENS = 1536
"""Tokens of held-out text, and of drift text, that a measurement reads, at most."""

PLAIN, EAFT = "SFT", "EAFT"
REQUIRED = ("transformers", "matplotlib", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eaft-ext demo``."""
    add = parser.add_argument
    default = " (default: %(default)s)"
    add("--steps", type=positive_int, default=24, help="training steps of each run" + default)
    add("--seed", type=int, default=0, help="chooses the training text and its order" + default)
    add(
        "--output",
        type=Path,
        default=Path("eaft-demo"),
        metavar="DIR",
        help="folder for the plot and the numbers" + default,
    )
    add_reading(parser, data="plain text to tune on", rows="rows a step")
    add(
        "--drift-data",
        type=Path,
        metavar="FILE",
        help="data to measure drift on, as for --data (default: public-domain prose)",
    )
    add(
        "--learning-rate",
        type=positive_float,
        default=1e-4,
        metavar="RATE",
        help="of AdamW, after a warm-up" + default,
    )
    add(
        "--natural",
        action="store_true",
        help="train on the labels as they are: by default some are wrong, where the model is sure",
    )
    add(
        "--fused-linear",
        action="store_true",
        help="train on linear_gated_ce, which never holds all logits, and measure the memory saved",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and return the exit status."""
    options = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    options["device"] = arguments.device or default_device()
    settings = Settings(**options)
    require_extras(REQUIRED)
    with _deterministic(settings.device):
        return _run(settings)


def _run(settings: Settings) -> int:
    console = make_console()
    started = time.perf_counter()
    _make_folder(settings.output)
    tuning = corpus.read_corpus(settings.data) if settings.data else corpus.language_reference()
    drift = read_records(settings.drift_data) if settings.drift_data else corpus.prose()
    with console.status("loading the model"):
        model, tokenizer = load(settings.model)
    model.to(settings.device).eval()
    check_length(settings.sequence_length, model)

    def measured_on(records: Sequence[Record]) -> list[Batch]:
        return evaluation_batches(
            records,
            tokenizer,
            batch_size=settings.batch_size,
            length=settings.sequence_length,
            max_tokens=EVALUATION_TOKENS,
            turns=settings.turns,
        )

    batches = training_batches(
        tuning.train,
        tokenizer,
        steps=settings.steps,
        batch_size=settings.batch_size,
        length=settings.sequence_length,
        seed=settings.seed,
        turns=settings.turns,
    )
    words = "the labels as they are"
    if not settings.natural:
        with console.status("planting wrong labels"):
            batches, words = _planted(model, batches, settings)
    target_batches, drift_batches = measured_on(tuning.held_out), measured_on(drift)
    texts = {
        "model": shown_name(settings.model),
        "target": tuning.name,
        "labels": words,
        "training": _described(tuning.name, batches),
        "held-out": _described(f"held-out part of {tuning.name}", target_batches),
        "drift": _described(
            settings.drift_data.name if settings.drift_data else "public-domain prose",
            drift_batches,
        ),
    }
    console.print(
        f"{texts['model']} on {settings.device}; {settings.steps} steps of each loss over "
        f"{texts['training']}, {texts['labels']}",
        highlight=False,
    )
    memory = None
    if settings.fused_linear:
        first = batches[0].to(settings.device)
        check_output_layer(model, first)
        with console.status("measuring the memory of output layer and loss"):
            memory = measure(model, first, settings.k)
    with console.status("measuring the base model"):
        evaluator = Evaluator(
            model,
            [batch.to(settings.device) for batch in target_batches],
            [batch.to(settings.device) for batch in drift_batches],
            settings.k,
        )
    results = Results(
        settings,
        _environment(settings),
        texts,
        evaluator.base,
        held_out_conflicts=evaluator.conflicts(),
        runs=[],
        memory=memory,
    )
    status = SUCCESS
    try:
        with Progress(console, settings.steps) as progress:
            for name, gate in ((PLAIN, eaft_ext.NoGate()), (EAFT, eaft_ext.EntropyGate())):
                results.runs.append(Run(name))
                train(
                    results.runs[-1],
                    model,
                    [batch.to(settings.device) for batch in batches],
                    evaluator,
                    gate=gate,
                    k=settings.k,
                    learning_rate=settings.learning_rate,
                    seed=settings.seed,
                    on_change=progress.update,
                    loss_of=of_hidden if settings.fused_linear else of_logits,
                )
    except KeyboardInterrupt:
        results.interrupted = True
        status = INTERRUPTED
    except ReferenceMismatch as error:
        print(f"eaft-ext demo: {error}", file=sys.stderr)
        status = FAILURE
    results.seconds = time.perf_counter() - started
    _conclude(results, console)
    return status


def _conclude(results: Results, console: Any) -> None:
    """Write the files and print the table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from .plot import write_plot

    output = results.settings.output
    write_json(results, output / "results.json")
    write_csv(results, output / "steps.csv")
    write_plot(results, output / "plot.png")
    header, rows = table(results)
    view = Table(*header, box=SIMPLE_HEAD)
    for column in view.columns[1:]:
        column.justify = "right"
    for row in rows:
        view.add_row(*row)
    if results.interrupted:
        console.print("Interrupted: this is what was done until then.")
    console.print(view)
    for sentence in explanation(results):
        console.print(sentence, highlight=False, markup=False)
    console.print(
        f"{results.seconds:.0f} seconds. Plot: {output / 'plot.png'}  Numbers: "
        f"{output / 'results.json'}, {output / 'steps.csv'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make --output {folder}: {error.strerror}") from None


def _planted(model: Any, batches: list[Batch], settings: Settings) -> tuple[list[Batch], str]:
    """Return the batches with wrong labels where the model is sure and right, and how many."""
    words = torch.cat([batch.labels[batch.labels != IGNORE_INDEX] for batch in batches])
    generator = torch.Generator().manual_seed(settings.seed)
    found, count, candidates = [], 0, 0
    for batch in batches:
        logits = forward(model, batch.to(settings.device))
        known = sure_and_right(logits, batch.labels.to(settings.device), settings.k).cpu()
        labels = plant(batch.labels, known, words, PLANTED_SHARE, generator)
        found.append(Batch(batch.input_ids, labels))
        count += int((labels != batch.labels).sum())
        candidates += int(known.sum())
    return found, (
        f"wrong labels on {count} of the {candidates} tokens that the base model is sure of and "
        f"right about, of {len(words)}"
    )


def _described(name: str, batches: list[Batch]) -> str:
    tokens = sum(int((batch.labels >= 0).sum()) for batch in batches)
    return f"{name}, {tokens} tokens"


def _environment(settings: Settings) -> dict[str, str]:
    on_gpu = torch.device(settings.device).type == "cuda"
    return {
        "eaft_ext": eaft_ext.__version__,
        "torch": str(torch.__version__),
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(settings.device) if on_gpu else settings.device,
        "threads": str(torch.get_num_threads()),
    }


@contextlib.contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """Make equal seeds give equal numbers on CUDA, where some kernels would add in any order."""
    if torch.device(device).type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
