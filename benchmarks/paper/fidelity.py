"""How near the entropy of the k largest logits is to that of all, and what each k costs."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from harness.device import MALLOC_ENVIRONMENT, Cpu
from harness.fresh_processes import measure_in

import eaft_ext
import eaft_ext.reference
from eaft_ext.cli.batches import Batch, batched, evaluation_rows
from eaft_ext.cli.model import load, shown_name
from eaft_ext.cli.records import read_records

from . import texts
from .files import opened, write
from .measurements import logits_of
from .options import add_data, add_model

FILE = "paper-fidelity.json"
KS: tuple[int | None, ...] = (2, 3, 5, 10, 20, 50, 128, None)
TEXTS = {"answers": texts.TARGET, "prose": texts.DRIFT}
LENGTH = 256
WAYS = {"gated_ce": eaft_ext.gated_ce, "eager": eaft_ext.reference.gated_ce}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_data(parser, TEXTS.values())
    add_model(parser, FILE)
    add = parser.add_argument
    add("--tokens", type=int, default=8192, help="of each text, prompts too (default: %(default)s)")
    add("--rows", type=int, default=512, help="of logits that are timed (default: %(default)s)")
    add("--rounds", type=int, default=7, help="of each timed call (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measure what the result file does not have."""
    file = arguments.output / FILE
    named = {name: getattr(arguments, name) for name in ("tokens", "rows", "rounds")}
    results = opened(file, {**named, "model": shown_name(arguments.model)})
    model, tokenizer = load(arguments.model)
    model.eval()
    for name, data in TEXTS.items():
        if name in results:
            continue
        rows = evaluation_rows(
            read_records(arguments.data / data),
            tokenizer,
            length=LENGTH,
            max_tokens=arguments.tokens,
        )
        results[name] = fidelity(entropies(model, batched(rows, 1)))
        write(results, file)
        print(f"{name}: {results[name]['tokens']} tokens")
    if "costs" not in results:
        vocab_size = model.get_output_embeddings().weight.shape[0]
        results["costs"] = costs(arguments.rows, vocab_size, arguments.rounds)
        write(results, file)
    print(file)
    return 0


@torch.no_grad()
def entropies(model: Any, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The entropy of each token by each k, in nats; of all by "all"."""
    found: dict[str, list[torch.Tensor]] = {name_of(k): [] for k in KS}
    for batch in batches:
        logits, labels = logits_of(model, batch, "float32")
        for k in KS:
            _, stats = eaft_ext.gated_ce(logits, labels, k, return_stats=True)
            found[name_of(k)].append(stats.entropy.double())
    return {name: torch.cat(of_k) for name, of_k in found.items()}


def fidelity(by_k: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Of each k, against the entropy of all: correlations and the largest error.

    ``gate_error`` is that of H / ln k, the gate, if H were exact.
    """
    exact = by_k["all"].numpy()
    found: dict[str, Any] = {"tokens": len(exact), "mean_entropy": float(exact.mean()), "k": {}}
    for k in KS:
        if k is None:
            continue
        entropy = by_k[name_of(k)].numpy()
        error = np.abs(entropy - exact)
        found["k"][name_of(k)] = {
            "pearson": float(np.corrcoef(entropy, exact)[0, 1]),
            "spearman": float(np.corrcoef(_ranks(entropy), _ranks(exact))[0, 1]),
            "mean_error": float(error.mean()),
            "largest_error": float(error.max()),
            "gate_error": float(error.max() / math.log(k)),
        }
    return found


def costs(rows: int, vocab_size: int, rounds: int) -> dict[str, Any]:
    """Seconds and peak bytes of forward and backward of each k, by our kernels and eagerly."""
    logits = torch.randn(rows, vocab_size).requires_grad_()
    labels = torch.randint(vocab_size, (rows,))
    pairs = [(way, k) for way in WAYS for k in KS]
    seconds: dict[tuple[str, int | None], list[float]] = {pair: [] for pair in pairs}
    for index in range(rounds + 1):
        for way, k in pairs:
            began = time.perf_counter()
            _once(way, k, logits, labels)
            if index:  # the first is a warm-up
                seconds[way, k].append(time.perf_counter() - began)
    (peaks,), reason = measure_in(1, MALLOC_ENVIRONMENT, _peaks, (rows, vocab_size), None)
    assert not reason, reason
    found: dict[str, Any] = {way: {} for way in WAYS}
    for (way, k), peak in zip(pairs, peaks, strict=True):
        times = seconds[way, k]
        found[way][name_of(k)] = {
            "seconds": times,
            "median": statistics.median(times),
            "peak_bytes": peak,
        }
    return found


def name_of(k: int | None) -> str:
    """As it stands in files and tables."""
    return "all" if k is None else str(k)


def _once(way: str, k: int | None, logits: torch.Tensor, labels: torch.Tensor) -> None:
    loss: Any = WAYS[way](logits, labels, k)
    loss.backward()
    logits.grad = None


def _peaks(_: int, shape: tuple[int, int], request: None) -> Any:
    """Bytes beyond the logits, the gradient among them."""
    device = Cpu()
    rows, vocab_size = shape
    logits = torch.randn(rows, vocab_size).requires_grad_()
    labels = torch.randint(vocab_size, (rows,))
    for way in WAYS:
        for k in KS:
            _once(way, k, logits, labels)
            before = device.reset_peak() or 0
            _once(way, k, logits, labels)
            yield device.peak_bytes() - before


def _ranks(values: Any) -> Any:
    return np.argsort(np.argsort(values))
