"""What muted tokens cost: rows in the products of the linear loss, their time and their errors."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch

import eaft_ext
from eaft_ext.cli.batches import Batch
from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.gates_shown import GATES
from eaft_ext.cli.model import load, shown_name
from eaft_ext.linear._chunks import default_chunk_size

from . import texts
from .files import opened, write
from .options import add_data, add_model
from .study import PRESETS
from .texts import K

FILE = "paper-dropping.json"
SHARES = (0.0, 1e-3, 1e-2)
"""Values of ``drop_below``."""
PERCENTILES = (15, 50, 90)
"""Of the tokens' entropies, below which a hard gate mutes."""
PRODUCTS = "the three products"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_data(parser, (texts.TRAIN, texts.TARGET, texts.DRIFT))
    add_model(parser, FILE)
    add = parser.add_argument
    add("--tokens", type=int, default=1024, help="of each text (default: %(default)s)")
    add("--rounds", type=int, default=5, help="calls of each loss (default: %(default)s)")
    add("--preset", choices=PRESETS, default="medium", help="of the texts (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Measure the texts that the result file does not have."""
    file = arguments.output / FILE
    named = {name: getattr(arguments, name) for name in ("tokens", "rounds", "preset")}
    results = opened(file, {**named, "model": shown_name(arguments.model)})
    found = results.setdefault("texts", {})
    model, tokenizer = load(arguments.model)
    read = texts.read(arguments.data, tokenizer, PRESETS[arguments.preset])
    for name, batches in (("answers", read.target), ("prose", read.drift)):
        if name not in found:
            found[name] = measure(model.eval(), batches, arguments.tokens, arguments.rounds)
            write(results, file)
            print(name, flush=True)
    print(file)
    return 0


@torch.no_grad()
def head_inputs(
    model: Any, batches: list[Batch], tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the output layer is given at the first tokens that are predicted, its weight, labels."""
    hidden, labels = [], []
    for batch in batches:
        predicted = batch.labels >= 0
        states = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden.append(states[predicted])
        labels.append(batch.labels[predicted])
    found = torch.cat(labels)
    if len(found) < tokens:
        raise CommandError(f"--tokens {tokens}, and a text has {len(found)}")
    weight = model.get_output_embeddings().weight.detach()
    return torch.cat(hidden)[:tokens].clone(), weight.clone(), found[:tokens]


def gates_of(entropy: torch.Tensor) -> dict[str, eaft_ext.Gate]:
    """The gates that are timed, by what they are called in the results."""
    found = {name: GATES[name] for name in ("sft", "eaft", "eaft3")}
    for percent in PERCENTILES:
        at = float(entropy.quantile(percent / 100)) / math.log(K)
        found[f"hard{percent}"] = eaft_ext.HardGate(at)
    return found


def measure(model: Any, batches: list[Batch], tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of each call, one gate and share after the other, and the errors of the gradients."""
    hidden, weight, labels = head_inputs(model, batches, tokens)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    chunk = default_chunk_size(tokens, weight.size(0) * weight.element_size(), weight.device)

    def call(gate: eaft_ext.Gate, share: float) -> tuple[Any, tuple[torch.Tensor, ...]]:
        loss, stats = eaft_ext.linear_gated_ce(
            *leaves, labels, k=K, gate=gate, drop_below=share, return_stats=True
        )
        return stats, torch.autograd.grad(loss, leaves)

    entropy = call(GATES["sft"], 0.0)[0].entropy
    gates = gates_of(entropy)
    seconds: dict[tuple[str, float], list[float]] = {}
    for _ in range(rounds):
        began = time.perf_counter()
        products(*(leaf.detach() for leaf in leaves), chunk)
        seconds.setdefault((PRODUCTS, 0.0), []).append(time.perf_counter() - began)
        for name, gate in gates.items():
            for share in SHARES:
                began = time.perf_counter()
                call(gate, share)
                seconds.setdefault((name, share), []).append(time.perf_counter() - began)
    found: dict[str, Any] = {PRODUCTS: seconds[PRODUCTS, 0.0], "gates": {}}
    for name, gate in gates.items():
        of_gate = found["gates"][name] = {"shares": {}}
        exact = call(gate, 0.0)[1]
        of_gate["rounding"] = [error(one.bfloat16().float(), one) for one in exact]
        for share in SHARES:
            stats, gradients = call(gate, share)
            gone = stats.gate == 0 if share == 0 else stats.dropped
            of_gate["shares"][f"{share:g}"] = {
                "rows": 1 - float(gone.float().mean()),
                "errors": [error(*pair) for pair in zip(gradients, exact, strict=True)],
                "seconds": seconds[name, share],
                "over products": statistics.median(seconds[name, share])
                / statistics.median(found[PRODUCTS]),
            }
    return found


@torch.no_grad()
def products(hidden: torch.Tensor, weight: torch.Tensor, chunk: int) -> None:
    """Logits, and both gradients if the logits were theirs, chunk by chunk."""
    logits = hidden.new_empty(chunk, weight.size(0))
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
    for begin in range(0, len(hidden), chunk):
        rows = hidden[begin : begin + chunk]
        some = logits[: len(rows)]
        torch.mm(rows, weight.t(), out=some)
        torch.mm(some, weight, out=of_hidden[begin : begin + chunk])
        of_weight.addmm_(some.t(), rows, beta=1 if begin else 0)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """How far a gradient is off, relative to its norm."""
    return float((found - exact).norm() / exact.norm())
