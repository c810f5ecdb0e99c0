"""Commands with a time limit, whose output goes to a log while they run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# How long a process may take to end after it was interrupted, in seconds.
GRACE = 8.0

_running: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Finished:
    """How a command ended. ``code`` is None if its time was up."""

    code: int | None
    seconds: float
    output: str

    @property
    def outcome(self) -> str:
        """In one word or two."""
        if self.code is None:
            return "timed out"
        return "passed" if self.code == 0 else "failed"


def run(
    command: Sequence[str | Path],
    log: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Finished:
    """Run a command, its output appended to a log, and end it with its children after ``limit``.

    It is interrupted first, so that it can say how far it came.
    """
    begin = time.monotonic()
    with log.open("ab") as out:
        start = out.tell()
        out.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        out.flush()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=None if environment is None else dict(environment),
            cwd=folder,
            start_new_session=True,  # a group, to be ended as a whole
        )
    _running.add(process)
    code: int | None = None
    try:
        code = process.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # its children are its own to end
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
        _running.discard(process)
    with log.open("rb") as written:
        written.seek(start)
        output = written.read().decode(errors="replace")
    return Finished(code, time.monotonic() - begin, output)


def end_all() -> None:
    """End whatever runs."""
    for process in list(_running):
        _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the whole group, which may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
