"""The kernels of csrc/cuda as nvcc compiles them to PTX, and libraries that run it on the host."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from cuda_on_host import build
from nvcc import nvcc
from ptx_on_host.ptx import Function, Module, parse
from ptx_on_host.translate import entries, translate

HERE = Path(__file__).resolve().parent

# Those whose PTX differs; test_ptx_architectures.py holds the others to that.
ARCHITECTURES = ("sm_90", "sm_100")

# The translator knows better which registers are unwritten. The CPU's own FMA is several times as
# fast as the C library's.
FLAGS = ["-std=c++17", "-Og", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
FLAGS += ["-fvisibility=hidden", "-fwrapv", "-ffp-contract=off", "-march=native"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unused-label", "-Wno-unused-but-set-variable"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
FLAGS += ["-DCUDA_ON_HOST_COMPILED"]
FLAGS += ["-isystem", str(build.CSRC), "-I", str(build.HERE), "-I", str(HERE)]

NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-I{build.CSRC}"]

KERNELS = build.HERE / "kernels.cpp"
LAUNCH = HERE / "launch.cpp"
STATEMENTS = 5000  # of a C++ file: g++ takes the files side by side


def _files() -> list[Path]:
    """All that a library depends on."""
    own = [path for pattern in ("*.h", "*.cpp", "*.py") for path in HERE.glob(pattern)]
    return [*own, *build.kernel_files(), *(build.CSRC / "cuda").glob("*.cu")]


@cache
def ptx(architecture: str) -> Mapping[str, str]:
    """The PTX of each .cu file, by its name without the suffix, for an architecture as sm_90."""
    command = [str(nvcc()), *NVCC_FLAGS, "-ptx", f"-arch={architecture.replace('sm', 'compute')}"]
    sources = sorted((build.CSRC / "cuda").glob("*.cu"))
    headers = [path for path in build.CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu")]
    # Of another release, behind the same path, it is another PTX.
    release = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    added = [os.environ.get(f"NVCC_{place}_FLAGS", "") for place in ("PREPEND", "APPEND")]
    key = build.digest([*command, release, *added], headers)

    def compile(source: Path) -> str:
        found = build.cache_folder() / f"ptx_{architecture}_{source.stem}-{key}.ptx"
        if not found.exists():
            build.once(found, lambda unfinished: build.run([*command, source, "-o", unfinished]))
        return found.read_text()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((s.stem for s in sources), pool.map(compile, sources), strict=True))


def _pieces(module: Module) -> list[list[Function]]:
    """The functions of a module, divided into files of about equal length."""
    pieces: list[list[Function]] = [[]]
    length = 0
    for function in module.functions.values():
        if length > STATEMENTS:
            pieces.append([])
            length = 0
        pieces[-1].append(function)
        length += len(function.body)
    return pieces


def _object(name: str, text: str, depends: Sequence[Path], counting: bool) -> Path:
    """A C++ text, compiled. Texts are shared by architectures, as far as they are the same."""
    command = [*(build.compiler() or []), *FLAGS, "-c"]
    command += ["-DPTX_COUNT"] if counting else []
    key = build.digest([*command, text], depends)
    found = build.cache_folder() / f"ptx_{name}-{key}.o"

    def make(unfinished: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"{name}.cpp"
            source.write_text(text)
            build.run([*command, source, "-o", unfinished])

    if not found.exists():
        build.once(found, make)
    return found


def _make_library(
    library: Path, modules: Sequence[Module], sources: Sequence[Path], *, counting: bool = False
) -> None:
    """Of modules, and of the files that launch their kernels."""
    headers = [*HERE.glob("*.h"), *build.HERE.glob("*.h")]
    texts = [("entries", entries(modules), headers)]
    texts += [(source.stem, f'#include "{source}"\n', _files()) for source in sources]
    for module in modules:
        for i, functions in enumerate(_pieces(module)):
            text = translate(module, functions, counting=counting)
            texts.append((f"{Path(module.file).stem}_{i}", text, headers))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda one: _object(*one, counting), texts))
    build.run([*(build.compiler() or []), "-shared", *objects, "-o", library])


class Compiled:
    """Kernels that a library has compiled, and their PTX for its messages."""

    def __init__(self, library: ctypes.PyDLL, texts: Mapping[str, str]) -> None:
        self.library = library
        self.texts = texts

    def call(
        self, function: str, memory: Sequence[tuple[int, int, bool]], *arguments: object
    ) -> None:
        """As kernels_on_host has it; beside an error stands the instruction where that is."""
        numbers = [int(number) for one in memory for number in one]
        ranges = (ctypes.c_int64 * len(numbers))(*numbers)
        build.call_of(self.library, "set_global_memory", ranges, ctypes.c_int64(len(memory)))
        try:
            build.call_of(self.library, function, *arguments)
        except RuntimeError as error:
            match = re.search(r"(\w+)\.ptx:(\d+)", str(error))
            if match is None or match[1] not in self.texts:
                raise
            line = self.texts[match[1]].split("\n")[int(match[2]) - 1]
            raise RuntimeError(f"{error}: {line.strip()}") from None

    def take_counts(self) -> dict[str, dict[str, int]]:
        """By kernel and name, what was counted since the last time."""
        text = ctypes.create_string_buffer(2**20)
        build.call_of(self.library, "take_counts", text, ctypes.c_int64(2**20))
        found: dict[str, dict[str, int]] = {}
        for line in text.value.decode().splitlines():
            kernel, name, number = line.split("\t")
            found.setdefault(kernel, {})[name] = int(number)
        return found

    def approximate(self, ulps: int) -> None:
        """How far approximate functions are off from now on, in units in the last place."""
        build.call_of(self.library, "set_approximation", ulps)


@cache
def load(architecture: str, *, counting: bool = False, only: str = "") -> Compiled:
    """The kernels whose mangled names hold ``only``, compiled for an architecture.

    ``counting``: for ``take_counts``.
    """
    texts = ptx(architecture)
    words = [architecture, str(counting), only, *(build.compiler() or []), *FLAGS]
    words += texts.values()
    library = build.cache_folder() / f"ptx_{architecture}-{build.digest(words, _files())}.so"

    def make(unfinished: Path) -> None:
        modules = [parse(text, f"{name}.ptx") for name, text in texts.items()]
        for module in modules:
            all_of_it = module.functions.items()
            module.functions = {n: f for n, f in all_of_it if only in n or not f.is_entry}
        _make_library(unfinished, modules, [KERNELS, LAUNCH], counting=counting)

    if not library.exists():
        build.once(library, make)
    return Compiled(ctypes.PyDLL(str(library)), texts)


def load_texts(
    texts: Mapping[str, str], *, with_operators: bool = True, counting: bool = False
) -> Compiled:
    """Some PTX, as of a test. ``with_operators``: kernels of csrc/cuda, to be called as such."""
    modules = [parse(text, f"{name}.ptx") for name, text in texts.items()]
    sources = [KERNELS, LAUNCH] if with_operators else [LAUNCH]
    words = [*(build.compiler() or []), *FLAGS, str(with_operators), str(counting)]
    key = build.digest([*words, *texts, *texts.values()], _files())
    library = build.cache_folder() / f"ptx_of_test-{key}.so"

    def make(unfinished: Path) -> None:
        _make_library(unfinished, modules, sources, counting=counting)

    if not library.exists():
        build.once(library, make)
    return Compiled(ctypes.PyDLL(str(library)), texts)
