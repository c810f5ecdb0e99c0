"""The report: one page that holds all it shows, and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import eaft_ext
from eaft_ext._landscape import REGIONS
from eaft_ext.cli.batches import Example
from eaft_ext.cli.palette import LOSSES, REGION_BOUNDS
from eaft_ext.cli.palette import REGIONS as PAINTS
from eaft_ext.cli.written import written_whole

from ..moved import Moved
from ..pieces import Pieces
from ..plot import THEMES, landscape_svg
from ..shares import CARRIED, Columns, carriers, kept, shares
from ..tokens import Token, View
from .safe import safe

MOST_TOKENS = 100_000
"""Of the texts that are shown, those with most muted loss first; the figures are of all."""


@dataclass(frozen=True)
class Report:
    """What a page says at its head."""

    title: str
    facts: dict[str, str]
    gate: eaft_ext.EntropyGate
    models: list[str]

    def safe(self) -> Report:
        """The same, as a page shows it."""
        facts = {name: safe(value) for name, value in self.facts.items()}
        return Report(safe(self.title), facts, self.gate, [safe(name) for name in self.models])


def write_page(
    report: Report,
    columns: Columns,
    moved: Moved | None,
    rows: list[Example],
    spool: Iterable[Token],
    pieces: Pieces,
    path: Path,
) -> None:
    """Write the page. ``spool`` has the tokens row by row, in order, each time it is asked."""
    shown, with_tokens = _shown_rows(spool)
    texts, data = _texts(rows, spool, pieces, shown)
    report = report.safe()
    data["models"] = report.models
    data["ln_k"] = math.log(columns.k)
    script, style = (_file(name) for name in ("page.js", "page.css"))
    html = _template().render(
        report=report,
        shares=shares(columns),
        kept=kept(columns, report.gate),
        carriers=carriers(columns, report.gate),
        carried=CARRIED,
        moved=moved,
        regions=PAINTS,
        bounds=REGION_BOUNDS,
        losses=LOSSES,
        landscapes={theme: landscape_svg(columns, report.gate, theme) for theme in THEMES},
        texts=texts,
        left_out=with_tokens - len(texts),
        largest_gate=float(columns.gate.max()),
        is_finite=bool(columns.nll.isfinite().all()),
        data=_json(data),
        script=script,
        style=style + _colours(),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    with written_whole(path, "--html") as unfinished:
        unfinished.write_text(html, "utf-8", newline="\n")


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("eaft_ext.cli.inspect.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "-" if math.isnan(value) else f"{value:.1%}"
    environment.filters["number"] = lambda value: "-" if math.isnan(value) else f"{value:.3f}"
    return environment.get_template("page.html")


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def _colours() -> str:
    """The palette as custom properties of the style sheet, for each theme."""

    def of(theme: str) -> str:
        paints = {**{f"region-{n}": p for n, p in PAINTS.items()}, **LOSSES}
        colours = {name: getattr(paint, theme) for name, paint in paints.items()}
        tint = bytes.fromhex(colours["eaft"].removeprefix("#"))
        colours["tint"] = ",".join(map(str, tint))
        colours |= {name: THEMES[theme][name] for name in ("ink", "ground")}
        return "".join(f"--{name}:{colour};" for name, colour in colours.items())

    dark = f"@media (prefers-color-scheme: dark){{:root{{{of('dark')}}}}}"
    return f"\n:root{{{of('light')}}}\n{dark}\n"


def _json(data: Any) -> str:
    """JSON that cannot end the element that it is in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\N{LINE SEPARATOR}", "\\u2028")


@dataclass(frozen=True)
class Text:
    """A row: its number, its text, its place among the rows by muted loss, and its conflicts."""

    row: int
    text: str
    rank: int
    conflicts: int


def _shown_rows(spool: Iterable[Token]) -> tuple[dict[int, int], int]:
    """The rows that are shown, with the rank of their muted loss, and how many have tokens."""
    muted: dict[int, float] = {}
    counts: Counter[int] = Counter()
    for token in spool:
        loss = muted.get(token.row, 0.0) + token.view.muted
        muted[token.row] = 0.0 if math.isnan(loss) else loss
        counts[token.row] += 1
    shown: dict[int, int] = {}
    room = MOST_TOKENS
    for row in sorted(muted, key=lambda row: -muted[row]):
        room -= counts[row]
        if room < 0 and shown:
            break
        shown[row] = len(shown)
    return shown, len(muted)


def _texts(
    rows: list[Example], spool: Iterable[Token], pieces: Pieces, shown: dict[int, int]
) -> tuple[list[Text], dict[str, Any]]:
    """The rows that are shown, in order, and what the script knows of their tokens."""
    words = Words()
    texts: list[Text] = []
    data: dict[str, Any] = {"regions": list(REGIONS), "rows": []}
    for row, of_row in groupby(spool, lambda token: token.row):
        if row not in shown:
            continue
        some = list(of_row)
        said = [safe(piece) for piece in pieces.of(rows[row].tokens)]
        conflicts = sum(token.view.is_conflict for token in some)
        texts.append(Text(row, "".join(said), shown[row], conflicts))
        views = [
            [token.view for token in some],
            [token.after for token in some if token.after is not None],
        ]
        data["rows"].append(
            {
                "lengths": [_utf16(piece) for piece in said],
                "positions": [token.position + 1 for token in some],
                "views": [_packed(of_model, words) for of_model in views],
            }
        )
    return texts, {**data, "words": words.all}


class Words:
    """Texts of tokens, each once."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The index of a text."""
        return self._index.setdefault(safe(text), len(self._index))

    @property
    def all(self) -> list[str]:
        """By index."""
        return list(self._index)


def _packed(views: list[View], words: Words) -> dict[str, Any]:
    """The views of a row, a list for each number; of the likeliest, one after another."""
    return {
        "nll": [_digits(view.nll) for view in views],
        "normalized": [_digits(view.normalized_entropy) for view in views],
        "gate": [_digits(view.gate) for view in views],
        "region": "".join(str(REGIONS.index(view.region)) for view in views),
        "words": [words(text) for view in views for text, _ in view.likeliest],
        "chances": [round(1000 * p) for view in views for _, p in view.likeliest],
    }


def _digits(value: float) -> float | None:
    """A number to four decimals; what is not finite, as nothing."""
    return round(value, 4) if math.isfinite(value) else None


def _utf16(text: str) -> int:
    """How long a text is to the script."""
    return len(text.encode("utf-16-le")) // 2
