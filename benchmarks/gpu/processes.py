"""Commands with a time limit, whose output goes to a log while they run."""

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
Command = Sequence[str | Path]

_running: set[int] = set()


@dataclass(frozen=True)
class Finished:
    """How a command ended. ``code`` is None if its time was up."""

    code: int | None
    seconds: float
    output: str

    @property
    def outcome(self) -> str:
        return {None: "timed out", 0: "passed"}.get(self.code, "failed")

    @property
    def crashed(self) -> bool:
        """Whether a signal ended it, not its time."""
        return self.code is not None and self.code < 0


def run(
    command: Command,
    log: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Finished:
    """Run a command, its output appended to a log, and end it with its children after ``limit``.

    It is interrupted first, so that it can say how far it came.
    """
    begin = time.monotonic()
    words = [str(part) for part in command]
    with log.open("ab") as out:
        start = out.tell()
        out.write(f"\n$ {' '.join(words)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,  # a group, to be ended as a whole
        )
    _running.add(process.pid)
    code: int | None = None
    try:
        code = process.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # its children are its own to end
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        _kill(process.pid)
        process.wait()
        _running.discard(process.pid)
    with log.open("rb") as written:
        written.seek(start)
        output = written.read().decode(errors="replace")
    return Finished(code, time.monotonic() - begin, output)


def end_all() -> None:
    for group in list(_running):
        _kill(group)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it may be gone
        os.killpg(group, signal.SIGKILL)
