"""The compiled part of eaft_ext: what it is built from, and for which CUDA.

Two files: ``_operators``, the operators on torch's stable ABI, which any torch from the oldest on
loads, and any Python; and ``_C``, a Python module that tells how they were built.

Environment: ``EAFT_EXT_CUDA=1`` insists on CUDA, ``0`` leaves it out; ``CUDA_HOME``,
``TORCH_CUDA_ARCH_LIST`` and ``MAX_JOBS`` mean what they mean to torch. ``EAFT_EXT_OPERATORS``: an
``_operators`` that was built before, for another Python, to be taken as it is. All else:
pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = "2.10"
OPERATORS = os.environ.get("EAFT_EXT_OPERATORS")
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def sources(*patterns: str) -> list[str]:
    """Files under csrc/ that match, as setuptools wants them: relative to the root."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def find_cuda_home() -> Path | None:
    """The toolkit's folder: the first that holds the headers, since nvcc may be a wrapper."""
    candidates = [Path("/usr/local/cuda")]
    if nvcc := shutil.which("nvcc"):
        candidates.insert(0, Path(nvcc).resolve().parent.parent)
    if chosen := os.environ.get("CUDA_HOME"):
        candidates.insert(0, Path(chosen))
    for home in candidates:
        if (home / "include" / "cuda_runtime.h").is_file() and shutil.which(home / "bin" / "nvcc"):
            return home
    return None


def nvcc_output(home: Path, option: str) -> str:
    """What the toolkit's nvcc answers."""
    command = [home / "bin" / "nvcc", option]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def choose_cuda(torch_cuda: str | None) -> Path | None:
    """The toolkit to build CUDA with, or None to leave CUDA out."""
    wish = os.environ.get("EAFT_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"eaft_ext: EAFT_EXT_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None
    home = find_cuda_home()
    if torch_cuda is None:
        obstacle = "the torch that is installed was built without CUDA"
    elif home is None:
        obstacle = "no CUDA toolkit was found; set CUDA_HOME to its folder"
    else:
        match = re.search(r"release (\d+)", nvcc_output(home, "--version"))
        if match and match[1] == torch_cuda.split(".")[0]:
            return home
        release = match[1] if match else "of an unknown release"
        obstacle = (
            f"the CUDA toolkit {release} in {home} cannot build for a torch with CUDA "
            f"{torch_cuda}; set CUDA_HOME to one of the same major version"
        )
    if wish == "1":
        sys.exit(f"eaft_ext: EAFT_EXT_CUDA=1, but {obstacle}")
    print(f"eaft_ext: built for the CPU alone: {obstacle}")
    return None


def set_cuda_environment(home: Path) -> None:
    """Tell torch's build helpers the toolkit and, unless the user did, the architectures."""
    os.environ["CUDA_HOME"] = str(home)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        listed = nvcc_output(home, "--list-gpu-arch").split()
        known = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in listed]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(known) + "+PTX"


def compile_arguments() -> dict[str, list[str]]:
    """Flags for the host compiler and nvcc. The C++ standard is torch's to choose."""
    if sys.platform == "win32":
        return {"cxx": ["/O2"]}
    # NaN and infinity keep their meaning; only errno and floating-point traps are given up, which
    # lets the compiler vectorise comparisons.
    cxx = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    cxx += ["-g0", "-Wall", "-Wextra"]
    cxx += ["-Wno-unused-parameter", "-Wno-unknown-pragmas"]  # torch's own headers
    nvcc = ["-O3", "--expt-relaxed-constexpr", "-Xptxas", "-warn-spills,-warn-lmem-usage"]
    return {"cxx": cxx, "nvcc": nvcc}


def target_version() -> str:
    """The oldest torch as its headers want it: 2.10 is 0x020a000000000000."""
    major, minor = map(int, OLDEST_TORCH.split("."))
    return f"0x{major:02x}{minor:02x}000000000000"


def pybind11_headers(torch_folder: Path) -> str:
    """Of pybind11, or those that torch brings, where it is not installed."""
    if importlib.util.find_spec("pybind11") is None:
        return str(torch_folder / "include")
    import pybind11

    return str(pybind11.get_include())


def extension() -> dict[str, Any]:
    """setup() arguments for the extension, built against the torch that can be imported."""
    if importlib.util.find_spec("torch") is None:
        if not {"sdist", "egg_info", "dist_info"} & set(sys.argv):
            sys.exit(f"eaft_ext: building needs torch >= {OLDEST_TORCH}; install it first")
        return {"install_requires": [f"torch>={OLDEST_TORCH}"]}
    import torch

    release = torch.__version__.split("+")[0].split(".")
    if (int(release[0]), int(release[1])) < tuple(map(int, OLDEST_TORCH.split("."))):
        sys.exit(f"eaft_ext: building needs torch >= {OLDEST_TORCH}, found {torch.__version__}")
    cuda_home = choose_cuda(torch.version.cuda)
    if cuda_home is not None:
        set_cuda_environment(cuda_home)
    from torch.utils import cpp_extension  # reads CUDA_HOME when it is imported

    class BuildExtension(cpp_extension.BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            version = self.distribution.get_version().split("+")[0]
            for built in self.extensions:
                built.define_macros.append(("EAFT_EXT_VERSION", f'"{version}"'))
            super().build_extensions()

        def build_extension(self, extension: Extension) -> None:
            if extension.name.endswith("_operators") and OPERATORS:
                target = Path(self.get_ext_fullpath(extension.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(OPERATORS, target)
            else:
                super().build_extension(extension)

        def get_ext_filename(self, name: str) -> str:
            """The operators are no Python module, and the same for every Python."""
            if name.endswith("_operators"):
                return str(Path(*name.split(".")).with_suffix(".so"))
            return str(super().get_ext_filename(name))

    macros = [("EAFT_EXT_TORCH_VERSION", f'"{torch.__version__}"')]
    files = sources("csrc/ops.cpp", "csrc/cpu/*.cpp")
    stable = [("TORCH_TARGET_VERSION", target_version()), ("TORCH_STABLE_ONLY", None)]
    kind = cpp_extension.CppExtension
    if cuda_home is not None:
        files += sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
        stable.append(("USE_CUDA", None))  # the part of the stable ABI that is for CUDA
        macros.append(("EAFT_EXT_CUDA_VERSION", f'"{torch.version.cuda}"'))
        macros.append(("EAFT_EXT_CUDA_ARCH_LIST", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'))
        kind = cpp_extension.CUDAExtension
    print(f"eaft_ext: torch {torch.__version__}, CUDA toolkit {cuda_home or 'not used'}")
    operators = kind(
        name="eaft_ext._operators",
        sources=files,
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        define_macros=stable,
        extra_compile_args=compile_arguments(),
        # First: libtorch has symbols of its own copy of it.
        libraries=["stdc++"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    module = Extension(
        name="eaft_ext._C",
        sources=["csrc/module.cpp"],
        depends=["csrc/core/limits.h"],
        include_dirs=[pybind11_headers(Path(torch.__file__).parent)],
        define_macros=macros,
        extra_compile_args={"cxx": compile_arguments()["cxx"]},
        language="c++",
    )
    release = "cu" + torch.version.cuda.replace(".", "") if cuda_home is not None else "cpu"
    return {
        "install_requires": [f"torch>={OLDEST_TORCH}"],
        "ext_modules": [operators, module],
        "cmdclass": {"build_ext": BuildExtension},
        # A wheel says in its version what it was built for.
        "options": {} if "sdist" in sys.argv else {"egg_info": {"tag_build": f"+{release}"}},
    }


if __name__ == "__main__":
    setup(**extension())
