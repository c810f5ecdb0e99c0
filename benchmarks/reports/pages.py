"""Blocks of a page that a script writes, each between two comments that name it."""

from __future__ import annotations

import sys


def fill(text: str, name: str, block: str, page: str) -> str:
    """The text of a page with its block of a name replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        sys.exit(f"{page} has no block from {begin} to {end}")
    return f"{before}{begin}\n{block}\n{end}{after}"
