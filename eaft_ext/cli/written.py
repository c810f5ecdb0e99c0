"""Files that are there whole, or as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .errors import CommandError


@contextlib.contextmanager
def written_whole(path: Path, option: str) -> Iterator[Path]:
    """Give a path beside a file, with its suffix, and put what is written there in its place.

    Raises:
        CommandError: it cannot be written, for the option that names it; what was there stays.
    """
    unfinished = path.with_name(f"{path.stem}.new{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise CommandError(f"cannot write {option} {path}: {error.strerror}") from None
