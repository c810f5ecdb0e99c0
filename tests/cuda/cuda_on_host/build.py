"""Compiles a C++ file that launches kernels on the host, and loads it."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"

# For the switching between fibers, and for kernels that see one memory as several types.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
# Two libraries in one process have a machine each.
FLAGS += ["-fvisibility=hidden"]
# Of the shim's own code; the kernels' is nvcc's to warn of.
FLAGS += ["-Wall", "-Wextra", "-Werror", "-isystem", str(CSRC), "-I", str(HERE)]

ERROR_BYTES = 2048
DAY = 24 * 60 * 60


@cache
def compiler() -> list[str] | None:
    """The command of the C++ compiler, if there is one."""
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return [found] if found else None


def why_not() -> str | None:
    """Why kernels cannot run on this host, if so."""
    if sys.platform != "linux":
        return "kernels run on the host under Linux alone"
    if compiler() is None:
        return "no C++ compiler: install g++, or set CXX, to run kernels on the host"
    return None


def _cache_folder() -> Path:
    """A folder for compiled files that nobody else can write to."""
    folder = Path(tempfile.gettempdir()) / f"eaft_ext-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="eaft_ext-"))
    return folder


def _key(command: list[str]) -> str:
    """Changes with the command and with every file that may be included."""
    digest = hashlib.sha256("\0".join(command).encode())
    files = [path for pattern in ("*.h", "*.cpp") for path in HERE.glob(pattern)]
    files += [
        path for pattern in ("core/*.h", "cuda/*.h", "cuda/*.cuh") for path in CSRC.glob(pattern)
    ]
    for path in sorted(files):
        digest.update(f"\0{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], library: Path) -> None:
    """Many processes may ask for the same library; one compiles it."""
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return
        unfinished = library.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")
        unfinished.replace(library)
    for old in library.parent.glob(f"{library.stem.split('-')[0]}-*"):
        with suppress(FileNotFoundError):  # another process does the same
            if time.time() - old.stat().st_mtime > DAY:
                old.unlink()


@cache
def load(source: str) -> ctypes.PyDLL:
    """The library of a C++ file of this folder.

    Python's lock is kept during its calls: its kernels run one at a time.
    """
    command = [*(compiler() or []), *FLAGS, str(HERE / source)]
    folder = _cache_folder()
    while True:
        key = _key(command)
        library = folder / f"{Path(source).stem}-{key}.so"
        if library.exists():
            return ctypes.PyDLL(str(library))
        _compile(command, library)
        if _key(command) != key:  # a file was changed meanwhile
            library.unlink(missing_ok=True)


def call(source: str, function: str, *arguments: object) -> None:
    """Calls ``function(*arguments, error, error_size)``; raises what it leaves in ``error``."""
    error = ctypes.create_string_buffer(ERROR_BYTES)
    getattr(load(source), function)(*arguments, error, ctypes.c_int64(ERROR_BYTES))
    if error.value:
        raise RuntimeError(error.value.decode())
