"""Loads the compiled part. Importing this module registers ``torch.ops.eaft_ext``."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

OLDEST_TORCH = (2, 10)
_FOLDER = Path(__file__).resolve().parent
_OPERATORS = _FOLDER / "_operators.so"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _check_no_other_copy() -> None:
    """Registered twice, by the compiled parts of two copies, operators would end the process."""
    if not torch._C._dispatch_has_kernel("eaft_ext::topk"):
        return
    if sys.platform != "win32":  # which cannot tell
        try:
            ctypes.CDLL(str(_OPERATORS), os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            raise ImportError(
                "eaft_ext: another copy of the compiled part is in this process already, and "
                f"{_OPERATORS} cannot be loaded beside it; start a new process."
            ) from None


def _built_for() -> str:
    cuda = _C.build_info()["cuda_version"]
    return f"CUDA {cuda}" if cuda else "the CPU"


try:
    from eaft_ext import _C
except ImportError as error:
    if any(path.suffix != ".pyi" for path in _FOLDER.glob("_C*")):
        raise ImportError(
            "eaft_ext: the compiled part was not built for this Python, "
            f"{sys.version.split()[0]} ({error}); reinstall it with `pip install .` from its "
            "source."
        ) from error
    raise ImportError(
        f"eaft_ext: the compiled part is not in {_FOLDER}, the package that Python found first; "
        f"run `pip install -e .` in {_FOLDER.parent}, or leave that folder to use an installed one."
    ) from error

if _release(torch.__version__) < OLDEST_TORCH:
    raise ImportError(
        f"eaft_ext: needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, found "
        f"{torch.__version__}."
    )
_check_no_other_copy()
try:
    torch.ops.load_library(_OPERATORS)
except OSError as _error:
    raise ImportError(
        f"eaft_ext: the compiled part was built for {_built_for()} and cannot be loaded into torch "
        f"{torch.__version__} ({_error}); reinstall it with `pip install .` from its source."
    ) from _error

MIN_TOP_K: int = _C.MIN_TOP_K
MAX_TOP_K: int = _C.MAX_TOP_K


def build_info() -> dict[str, str]:
    """How the compiled part was built: version, torch_version, cuda_version ("" without), …."""
    return _C.build_info()


def has_kernel(op: str, device_type: str) -> bool:
    """Whether operator ``op`` is compiled for tensors on ``device_type``."""
    key = device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"eaft_ext::{op}", key)
