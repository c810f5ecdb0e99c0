"""Types of command-line options, which refuse a value in one sentence; what they default to."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path

import torch

import eaft_ext

from .conversations import TURNS
from .errors import CommandError
from .model import DEFAULT_NAME


def require_extras(names: Iterable[str], extra: str = "demo") -> None:
    """Check that packages are installed, which an extra of this one brings.

    Raises:
        CommandError: some are not.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"{', '.join(missing)} not installed: "
            f"pip install 'eaft_ext[{extra}]' brings what it needs"
        )


def add_k_and_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--k`` and ``--device``."""
    help_of_k = "largest logits that give the entropy (default: %(default)s)"
    parser.add_argument("--k", type=top_k, default=20, help=help_of_k)
    parser.add_argument(
        "--device", type=device, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )


def add_reading(parser: argparse.ArgumentParser, data: str, rows: str) -> None:
    """Add the options of what reads text with a model, and those above.

    ``data`` says what plain text is for, and ``rows`` how many ``--batch-size`` are.
    """
    add = parser.add_argument
    default = " (default: %(default)s)"
    add(
        "--model",
        metavar="NAME",
        help=f"transformers model folder or hub name (default: {DEFAULT_NAME})",
    )
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSONL, JSON, CSV, TSV or Parquet (text, messages, conversations, prompt/completion, "
        f"instruction/output or question/answer), {data}, or a data set of a hub or folder, "
        "NAME:SPLIT (default: the language reference inside Python)",
    )
    add(
        "--turns",
        choices=TURNS,
        default=TURNS[0],
        help="answers of a conversation that are learned" + default,
    )
    add("--batch-size", type=positive_int, default=2, metavar="N", help=rows + default)
    add(
        "--sequence-length",
        type=sequence_length,
        default=256,
        metavar="N",
        help="tokens in a row, at most, to which conversations are cut" + default,
    )
    add_k_and_device(parser)


def default_device() -> str:
    """A GPU if there is one that torch can use, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def positive_int(text: str) -> int:
    """A whole number from 1."""
    return number_from(1, text)


def sequence_length(text: str) -> int:
    """A whole number from 2: a token, and the next one to be predicted."""
    return number_from(2, text)


def number_from(smallest: int, text: str) -> int:
    """A whole number from ``smallest``."""
    value = int(text) if text.lstrip("+-").isdigit() else None
    if value is None or value < smallest:
        raise argparse.ArgumentTypeError(f"expected a whole number from {smallest}, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def top_k(text: str) -> int:
    """A k that the loss takes."""
    value = number_from(1, text)
    try:  # the library knows its limits
        eaft_ext.gated_ce(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def device(text: str) -> str:
    """A device that torch can use here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    if torch.device(text).type == "meta":
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: it computes nothing")
    return text
