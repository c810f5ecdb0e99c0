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
from collections.abc import Callable, Iterable, Sequence
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


def cache_folder() -> Path:
    """A folder for compiled files that nobody else can write to."""
    folder = Path(tempfile.gettempdir()) / f"eaft_ext-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="eaft_ext-"))
    return folder


def kernel_files() -> list[Path]:
    """Every file that a C++ file of this folder may include, and itself."""
    files = [path for pattern in ("*.h", "*.cpp") for path in HERE.glob(pattern)]
    files += [
        path for pattern in ("core/*.h", "cuda/*.h", "cuda/*.cuh") for path in CSRC.glob(pattern)
    ]
    return files


def digest(words: Iterable[str], files: Iterable[Path]) -> str:
    """Changes with the words and with every file."""
    found = hashlib.sha256("\0".join(words).encode())
    for path in sorted(files):
        found.update(f"\0{path}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{result.stderr}")


def once(file: Path, make: Callable[[Path], None]) -> None:
    """Many processes may ask for the same file; one makes it, and it is there when it is whole.

    Files of the same stem up to its last hyphen that are older than a day are removed.
    """
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            return
        unfinished = file.with_suffix(f".{os.getpid()}")
        make(unfinished)
        unfinished.replace(file)
    for old in file.parent.glob(f"{file.stem.rpartition('-')[0]}-*"):
        with suppress(FileNotFoundError):  # another process does the same
            if time.time() - old.stat().st_mtime > DAY:
                old.unlink()


@cache
def load(source: str) -> ctypes.PyDLL:
    """The library of a C++ file of this folder.

    Python's lock is kept during its calls: its kernels run one at a time.
    """
    command = [*(compiler() or []), *FLAGS, str(HERE / source)]
    while True:
        key = digest(command, kernel_files())
        library = cache_folder() / f"{Path(source).stem}-{key}.so"
        if not library.exists():
            once(library, lambda unfinished: run([*command, "-o", unfinished]))
        if digest(command, kernel_files()) == key:
            return ctypes.PyDLL(str(library))
        library.unlink(missing_ok=True)  # a file was changed meanwhile


def call(source: str, function: str, *arguments: object) -> None:
    """:func:`call_of` a library of this folder."""
    call_of(load(source), function, *arguments)


def call_of(library: ctypes.PyDLL, function: str, *arguments: object) -> None:
    """Calls ``function(*arguments, error, error_size)``; raises what it leaves in ``error``."""
    error = ctypes.create_string_buffer(ERROR_BYTES)
    getattr(library, function)(*arguments, error, ctypes.c_int64(ERROR_BYTES))
    if error.value:
        raise RuntimeError(error.value.decode())
