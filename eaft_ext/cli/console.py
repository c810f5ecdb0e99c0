"""Where tables and progress are printed."""

from __future__ import annotations

from typing import Any


def make_console() -> Any:
    """A console of rich, which must be installed; of 120 columns where there is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)
