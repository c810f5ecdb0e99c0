"""Failures that the demo reports in one sentence."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


class ReferenceMismatch(DemoError):
    """The fused loss and the reference disagree on the same logits."""
