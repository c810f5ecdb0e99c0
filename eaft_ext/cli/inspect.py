"""``eaft-ext inspect``: which tokens of a text EAFT mutes, as a model sees them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import eaft_ext
from eaft_ext._conflicts import CONFLICT_ENTROPY, CONFLICT_PROBABILITY, confident_conflicts

from .batches import Batch, batched, count_tokens, evaluation_rows
from .console import make_console
from .demo.corpus import language_reference
from .errors import CommandError
from .model import check_length, forward, load, shown_name
from .options import add_reading, default_device, positive_float, positive_int, require_extras
from .records import read_records

REQUIRED = ("transformers", "rich")
ENTROPIES = (0.0, 0.1, 0.3, 0.6, math.inf)
"""Bounds of the table's rows, of the entropy over ln k."""

CONTEXT_TOKENS = 12
"""Tokens before a muted one that are shown."""


@dataclass(frozen=True)
class Token:
    """A token of the text, and what the model thought of it. Entropies and losses are in nats.

    ``likeliest`` is what the model would have said. ``row`` and ``position`` are those of the token
    that it was to follow. ``normalized_entropy`` is the entropy over ln k, where k is at most the
    vocabulary.
    """

    row: int
    position: int
    before: str
    token: str
    probability: float
    likeliest: str
    likeliest_probability: float
    nll: float
    entropy: float
    normalized_entropy: float
    gate: float
    is_conflict: bool

    @property
    def muted(self) -> float:
        """The part of its cross-entropy that is not learned from."""
        return (1 - self.gate) * self.nll


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eaft-ext inspect``."""
    add = parser.add_argument
    default = " (default: %(default)s)"
    add_reading(parser, data="plain text", rows="rows at a time")
    add(
        "--tokens",
        type=positive_int,
        default=4096,
        metavar="N",
        help="tokens to read, with those of prompts, spread evenly over the data" + default,
    )
    add("--show", type=positive_int, default=12, metavar="N", help="muted tokens shown" + default)
    add("--output", type=Path, metavar="FILE", help="write every token to this JSONL file")
    add("--alpha", type=positive_float, default=1.0, help="exponent of the gate" + default)
    add(
        "--normalizer",
        type=positive_float,
        help="what the entropy is divided by (default: ln k, as in the paper)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Read the text with the model, and print what the gate does."""
    require_extras(REQUIRED)
    output: Path | None = arguments.output
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise CommandError(f"cannot write --output {output}: not a file in a folder that exists")
    console = make_console()
    records = read_records(arguments.data) if arguments.data else language_reference().train
    with console.status("loading the model"):
        model, tokenizer = load(arguments.model)
    on = arguments.device or default_device()
    model.to(on).eval()
    check_length(arguments.sequence_length, model)
    rows = evaluation_rows(
        records,
        tokenizer,
        length=arguments.sequence_length,
        max_tokens=arguments.tokens,
        turns=arguments.turns,
    )
    batches = [batch.to(on) for batch in batched(rows, arguments.batch_size)]
    gate = eaft_ext.EntropyGate(arguments.alpha, arguments.normalizer)
    with console.status("reading"):
        tokens = list(inspect(model, tokenizer, batches, arguments.k, gate))
    read = count_tokens(rows)
    if not tokens:
        raise CommandError(
            f"the {read} tokens that were read are all of a prompt: pass more --tokens"
        )
    if output is not None:
        write_jsonl(tokens, output)
    name = shown_name(arguments.model)
    source = arguments.data or "the Python language reference"
    all_of_it = f", all that rows of {arguments.sequence_length} have"
    title = (
        f"{name}, {len(tokens)} tokens of {source}, {gate}\n"
        f"{read} tokens were read{all_of_it if read < arguments.tokens else ''}; "
        f"{read - len(tokens)} are of prompts, or begin a row, and are not predicted."
    )
    print_report(console, title, tokens, arguments)
    return 0


@torch.no_grad()
def inspect(
    model: Any, tokenizer: Any, batches: Iterable[Batch], k: int, gate: eaft_ext.Gate
) -> Iterator[Token]:
    """Yield the tokens that are to be predicted, in the order of the batches."""
    first_row = 0
    for batch in batches:
        logits = forward(model, batch)
        _, stats = eaft_ext.gated_ce(logits, batch.labels, k, gate=gate, return_stats=True)
        likeliest = eaft_ext.topk(logits, 1)[1].squeeze(-1)
        _, of_likeliest = eaft_ext.gated_ce(logits, likeliest, k, return_stats=True)
        within = min(k, logits.size(-1))
        conflicts = confident_conflicts(stats.nll, stats.entropy, within)
        columns = [
            tensor[stats.valid].tolist()
            for tensor in (
                batch.labels,
                (-stats.nll).exp(),
                likeliest,
                (-of_likeliest.nll).exp(),
                stats.nll,
                stats.entropy,
                stats.entropy / math.log(within),
                stats.gate,
                conflicts,
            )
        ]
        rows = batch.input_ids.tolist()
        for (row, position), of_token in zip(
            stats.valid.nonzero().tolist(), zip(*columns, strict=True), strict=True
        ):
            label, probability, said, its_probability, *losses = of_token
            nll, entropy, normalized, weight, is_conflict = losses
            context = rows[row][max(0, position + 1 - CONTEXT_TOKENS) : position + 1]
            yield Token(
                row=first_row + row,
                position=position,
                before=tokenizer.decode(context),
                token=tokenizer.decode([label]),
                probability=probability,
                likeliest=tokenizer.decode([said]),
                likeliest_probability=its_probability,
                nll=nll,
                entropy=entropy,
                normalized_entropy=normalized,
                gate=weight,
                is_conflict=is_conflict,
            )
        first_row += len(rows)


def write_jsonl(tokens: Iterable[Token], path: Path) -> None:
    """Write a line for each token; what is not finite, as nothing."""
    try:
        with path.open("w", encoding="utf-8") as stream:
            for token in tokens:
                fields = {
                    name: None if isinstance(value, float) and not math.isfinite(value) else value
                    for name, value in asdict(token).items()
                }
                stream.write(json.dumps(fields, ensure_ascii=False) + "\n")
    except OSError as error:
        raise CommandError(f"cannot write --output {path}: {error.strerror}") from None


def summary(tokens: list[Token]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table: what the gate does, by entropy."""
    total = sum(token.nll for token in tokens)
    gated = sum(token.gate * token.nll for token in tokens)

    def row(label: str, some: list[Token]) -> list[str]:
        if not some:
            return [label, "0", *["-"] * 4]
        nll = sum(token.nll for token in some)
        learned = sum(token.gate * token.nll for token in some)
        return [
            label,
            f"{len(some) / len(tokens):.1%}",
            f"{nll / len(some):.3f}",
            f"{sum(token.gate for token in some) / len(some):.3f}",
            f"{nll / total:.1%}" if 0 < total < math.inf else "-",
            f"{learned / gated:.1%}" if 0 < gated < math.inf else "-",
        ]

    def within(low: float, high: float) -> list[Token]:
        return [token for token in tokens if low <= token.normalized_entropy < high]

    rows = []
    for low, high in pairwise(ENTROPIES):
        label = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} and above"
        rows.append(row(label, within(low, high)))
    rows.append(row("confident conflicts", [token for token in tokens if token.is_conflict]))
    rows.append(row("all", tokens))
    head = ["H / ln k", "tokens", "mean nll", "mean gate", "share of CE", "share of EAFT"]
    return head, rows


def print_report(
    console: Any, title: str, tokens: list[Token], arguments: argparse.Namespace
) -> None:
    """Print the table, and the tokens of which the most is muted."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(title, highlight=False, markup=False)
    head, rows = summary(tokens)
    view = Table(*head, box=SIMPLE_HEAD)
    for column in view.columns[1:]:
        column.justify = "right"
    for row in rows:
        view.add_row(*row)
    console.print(view)
    console.print(
        f"Confident conflicts: p(y) < {CONFLICT_PROBABILITY} and H < {CONFLICT_ENTROPY} ln k. The "
        f"shares are of the sum of nll and of gate * nll.",
        highlight=False,
    )
    console.print("Most muted, by (1 - gate) * nll:", highlight=False)
    view = Table("text", "token", "p", "likeliest", "p", "H / ln k", "gate", box=SIMPLE_HEAD)
    view.columns[0].justify = "right"
    is_unicode = (console.encoding or "").lower().startswith("utf")
    for token in sorted(tokens, key=lambda token: -token.muted)[: arguments.show]:
        view.add_row(
            _shown(token.before, is_unicode, last=36),
            _shown(token.token, is_unicode),
            f"{token.probability:.1e}",
            _shown(token.likeliest, is_unicode),
            f"{token.likeliest_probability:.3f}",
            f"{token.normalized_entropy:.3f}",
            f"{token.gate:.3f}",
        )
    console.print(view)


def _shown(text: str, is_unicode: bool = True, last: int = 16) -> Any:
    """Text on one line with its end, in which spaces and line breaks are seen."""
    from rich.text import Text

    shown = (repr(text) if is_unicode else ascii(text))[1:-1]
    return Text(shown if len(shown) <= last else "..." + shown[-last:], no_wrap=True)
