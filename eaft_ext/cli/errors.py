"""Failures that a command reports in one sentence, and how it ends."""

from __future__ import annotations

SUCCESS, FAILURE = 0, 1
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it (128 + SIGINT)."""


class CommandError(Exception):
    """The command cannot go on; the message says why and what to do."""
