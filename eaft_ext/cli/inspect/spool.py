"""The tokens that were read, in a JSONL file, from which a run that was stopped goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eaft_ext.cli.errors import CommandError

from .tokens import Token, View

STATE = ".state"
"""Beside the tokens while they are not complete: how far they are, and of what run."""


class Spool:
    """Tokens in a file, written batch by batch.

    A state file beside it says how many rows are complete. Where it is of the same ``settings``,
    what is complete is kept and ``rows`` says how much that is; else the file begins anew.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._state = path.with_name(path.name + STATE)
        self._settings = settings
        self.rows, size = self._earlier()
        try:
            self._stream = path.open("r+b" if size else "wb")
            self._stream.truncate(size)
            self._stream.seek(size)
        except OSError as error:
            raise CommandError(f"cannot write {path}: {error.strerror}") from None

    def _earlier(self) -> tuple[int, int]:
        try:
            state = json.loads(self._state.read_text("utf-8"))
            known = (
                state["settings"] == self._settings and self.path.stat().st_size >= state["size"]
            )
            return (int(state["rows"]), int(state["size"])) if known else (0, 0)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0, 0

    def append(self, tokens: Iterable[Token], rows: int) -> None:
        """Add the tokens of the next ``rows`` rows."""
        try:
            for token in tokens:
                line = json.dumps(_fields(token), ensure_ascii=False) + "\n"
                self._stream.write(line.encode())
            self._stream.flush()
            self.rows += rows
            state = {"settings": self._settings, "rows": self.rows, "size": self._stream.tell()}
            new = self._state.with_name(self._state.name + ".new")
            new.write_text(json.dumps(state), "utf-8")
            new.replace(self._state)
        except OSError as error:
            raise CommandError(f"cannot write {self.path}: {error.strerror}") from None

    def complete(self) -> None:
        """All tokens are there."""
        self._stream.close()
        self._state.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Token]:
        """The tokens, in the order in which they were added."""
        with self.path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield _token(json.loads(line))


def _fields(token: Token) -> dict[str, Any]:
    """What is written of a token; what is not finite, as nothing."""
    fields = {name: getattr(token, name) for name in ("row", "position", "before", "token")}
    fields |= _fields_of_view(token.view)
    if token.after is not None:
        fields["after"] = _fields_of_view(token.after)
    return fields


def _fields_of_view(view: View) -> dict[str, Any]:
    fields = asdict(view)
    likeliest = fields.pop("likeliest")
    fields["likeliest"], fields["likeliest_probability"] = likeliest[0]
    fields["is_conflict"] = view.is_conflict
    fields["alternatives"] = likeliest
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }


def _token(fields: dict[str, Any]) -> Token:
    after = fields.get("after")
    return Token(
        fields["row"],
        fields["position"],
        fields["before"],
        fields["token"],
        _view(fields),
        None if after is None else _view(after),
    )


def _view(fields: dict[str, Any]) -> View:
    def number(name: str) -> float:  # of these, nll alone can be infinite
        return math.inf if fields[name] is None else float(fields[name])

    return View(
        probability=number("probability"),
        nll=number("nll"),
        entropy=number("entropy"),
        normalized_entropy=number("normalized_entropy"),
        gate=number("gate"),
        gradient=number("gradient"),
        region=fields["region"],
        likeliest=[(text, probability) for text, probability in fields["alternatives"]],
    )
