"""The README and docs/, and the blocks of Python in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import eaft_ext

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A Python block of a page, and why it is not run, if so."""

    page: Path
    line: int
    code: str
    reason: str | None


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text("utf-8")
        found = list(BLOCK.finditer(text))
        assert len(found) == len(re.findall("^ *```py", text, re.MULTILINE)), page
        for match in found:
            line = text.count("\n", 0, match.start("code"))
            yield Block(page, line, match["code"], match["reason"])


BLOCKS = list(_blocks())


def on_page(page: str, name: str, **given: Any) -> Any:
    """What a block of that page defines by that name, where it imports what the rest has not."""
    (block,) = (b for b in BLOCKS if b.page.name == page and f" {name}(" in b.code)
    namespace = {"torch": torch, "eaft_ext": eaft_ext} | given
    source = "\n" * block.line + block.code
    exec(compile(source, str(block.page), "exec", dont_inherit=True), namespace)
    return namespace[name]
