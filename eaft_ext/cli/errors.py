"""Failures that a command reports in one sentence."""

from __future__ import annotations


class CommandError(Exception):
    """The command cannot go on; the message says why and what to do."""
