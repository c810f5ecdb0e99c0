"""What is printed: what the gate does by entropy and region, and the tokens it mutes most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import Tensor

import eaft_ext
from eaft_ext._landscape import REGIONS
from eaft_ext.cli.palette import REGION_BOUNDS
from eaft_ext.cli.palette import REGIONS as PAINTS

from .shares import CARRIED, Columns, carriers
from .tokens import Token

ENTROPIES = (0.0, 0.1, 0.3, 0.6, math.inf)
"""Bounds of the table's rows, of the entropy over ln k."""


def most_muted(tokens: Iterable[Token], count: int) -> list[Token]:
    """Return the tokens of which the most loss is muted, the most first."""
    return heapq.nlargest(count, tokens, key=lambda token: token.view.muted)


def summary(columns: Columns) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table: what the gate does, by entropy and region."""
    total = float(columns.nll.sum())
    gated = float((columns.gate * columns.nll).sum())

    def row(label: str, mask: Tensor) -> list[str]:
        count = int(mask.sum())
        if not count:
            return [label, "0", *["-"] * 4]
        nll = float(columns.nll[mask].sum())
        learned = float((columns.gate * columns.nll)[mask].sum())
        return [
            label,
            f"{count / len(columns):.1%}",
            f"{nll / count:.3f}",
            f"{float(columns.gate[mask].mean()):.3f}",
            f"{nll / total:.1%}" if 0 < total < math.inf else "-",
            f"{learned / gated:.1%}" if 0 < gated < math.inf else "-",
        ]

    rows = []
    entropy = columns.normalized_entropy
    for low, high in pairwise(ENTROPIES):
        label = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} and above"
        rows.append(row(label, (low <= entropy) & (entropy < high)))
    for index, region in enumerate(REGIONS):
        rows.append(row(PAINTS[region].title, columns.region == index))
    rows.append(row("all", columns.region >= 0))
    head = ["H / ln k", "tokens", "mean nll", "mean gate", "share of SFT", "share of EAFT"]
    return head, rows


def print_report(
    console: Any, title: str, columns: Columns, gate: eaft_ext.EntropyGate, muted: list[Token]
) -> None:
    """Print the table, and the tokens of which the most is muted."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(title, highlight=False, markup=False)
    head, rows = summary(columns)
    view = Table(*head, box=SIMPLE_HEAD)
    for column in view.columns[1:]:
        column.justify = "right"
    for index, row in enumerate(rows):
        ends = index in (len(ENTROPIES) - 2, len(rows) - 2)
        view.add_row(*row, end_section=ends)
    console.print(view)
    bounds = "; ".join(f"{PAINTS[name].title}: {REGION_BOUNDS[name]}" for name in REGIONS)
    console.print(f"{bounds}. The shares are of the sum of nll and of gate * nll.", highlight=False)
    view = Table("loss", *(f"{100 * part:g} %" for part in CARRIED), box=SIMPLE_HEAD)
    for column in view.columns[1:]:
        column.justify = "right"
    for name, some in carriers(columns, gate).values():
        view.add_row(name, *("-" if math.isnan(one) else f"{one:.1%}" for one in some))
    console.print("Tokens with so much of what is learned, the sum of gate * (1 - p):")
    console.print(view)
    console.print("Most muted, by (1 - gate) * nll:", highlight=False)
    view = Table("text", "token", "p", "likeliest", "p", "H / ln k", "gate", box=SIMPLE_HEAD)
    view.columns[0].justify = "right"
    is_unicode = (console.encoding or "").lower().startswith("utf")
    for token in muted:
        likeliest, its_probability = token.view.likeliest[0]
        view.add_row(
            _shown(token.before, is_unicode, last=36),
            _shown(token.token, is_unicode),
            f"{token.view.probability:.1e}",
            _shown(likeliest, is_unicode),
            f"{its_probability:.3f}",
            f"{token.view.normalized_entropy:.3f}",
            f"{token.view.gate:.3f}",
        )
    console.print(view)


def _shown(text: str, is_unicode: bool = True, last: int = 16) -> Any:
    """Text on one line with its end, in which spaces and line breaks are seen."""
    from rich.text import Text

    shown = (repr(text) if is_unicode else ascii(text))[1:-1]
    return Text(shown if len(shown) <= last else "..." + shown[-last:], no_wrap=True)
