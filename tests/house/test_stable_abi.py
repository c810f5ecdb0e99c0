"""The operators touch torch through its stable ABI alone, so that one build fits every torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import eaft_ext
from eaft_ext import _library

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = Path(eaft_ext.__file__).parent / "_operators.so"
TORCH_HEADERS = Path(torch.__file__).parent / "include" / "torch" / "csrc"
SYSTEM = re.compile(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC|libcudart|LIBCUDART)")

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm; binutils has it")


def undefined_symbols() -> list[tuple[str, str]]:
    """What the library wants of others, each with its kind: w is a symbol that may be missing."""
    command = ["nm", "--dynamic", "--undefined-only", str(OPERATORS)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(line.split()[1], line.split()[0]) for line in listed.splitlines()]


def stable_functions() -> set[str]:
    """Functions of the stable ABI, as the headers of the installed torch declare them."""
    headers = [TORCH_HEADERS / "stable" / "c" / "shim.h"]
    headers += sorted((TORCH_HEADERS / "inductor" / "aoti_torch").glob("c/shim*.h"))
    headers += [TORCH_HEADERS / "inductor" / "aoti_torch" / "generated" / "c_shim_aten.h"]
    text = "".join(header.read_text() for header in headers)
    # Some are declared by a macro that makes the name: aoti_torch_dtype_##name.
    made = re.findall(r"\b(?:aoti_)?torch_\w+_(?=##)", text)
    return {*re.findall(r"\b(?:aoti_)?torch_\w+(?=\s*\()", text), *made}


@needs_nm
def test_the_library_wants_nothing_of_torch_but_the_stable_abi() -> None:
    wanted = [name for name, kind in undefined_symbols() if kind != "w"]
    of_torch = [name for name in wanted if not SYSTEM.search(name)]
    unstable = set(of_torch) - stable_functions()
    assert "torch_call_dispatcher" in of_torch, "the check must see torch's symbols"
    assert not unstable, f"not in torch's stable ABI: {sorted(unstable)}"


@needs_nm
def test_the_library_knows_no_python() -> None:
    assert not [name for name, _ in undefined_symbols() if name.startswith(("Py", "_Py"))]


def test_the_headers_are_held_to_the_oldest_torch() -> None:
    """With this macro they leave out what came after it."""
    major, minor = _library.OLDEST_TORCH
    pinned = f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    assert pinned in (ROOT / "CMakeLists.txt").read_text()
    setup = (ROOT / "setup.py").read_text()
    assert f'OLDEST_TORCH = "{major}.{minor}"' in setup and "TORCH_STABLE_ONLY" in setup
    assert f'"torch>={major}.{minor}"' in (ROOT / "build_backend.py").read_text()
