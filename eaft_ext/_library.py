"""Loads the compiled part. Importing this module registers ``torch.ops.eaft_ext``."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def _check_no_other_copy() -> None:
    """Registered twice, by the compiled parts of two copies, operators would end the process."""
    spec = find_spec("eaft_ext._C")
    if spec is None or not spec.origin or not torch._C._dispatch_has_kernel("eaft_ext::topk"):
        return
    if sys.platform != "win32":  # which cannot tell
        try:
            ctypes.CDLL(spec.origin, os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            raise ImportError(
                "eaft_ext: another copy of the compiled part is in this process already, and "
                f"{spec.origin} cannot be loaded beside it; start a new process."
            ) from None


_check_no_other_copy()
try:
    from eaft_ext import _C
except ImportError as error:
    _folder = Path(__file__).resolve().parent
    if any(path.suffix != ".pyi" for path in _folder.glob("_C*")):
        _reason = f"was not built for torch {torch.__version__} and this Python ({error})"
        _remedy = "reinstall it with `pip install .` from its source"
    else:
        _reason = f"is not in {_folder}, the package that Python found first"
        _remedy = (
            f"run `pip install -e .` in {_folder.parent}, or leave that folder to use an "
            "installed one"
        )
    raise ImportError(f"eaft_ext: the compiled part {_reason}; {_remedy}.") from error

_built_for: str = _C.build_info()["torch_version"]
if _release(_built_for) != _release(torch.__version__):
    raise ImportError(
        f"eaft_ext: the compiled part was built for torch {_built_for}, and this is torch "
        f"{torch.__version__}; reinstall it with `pip install .` from its source."
    )

MIN_TOP_K: int = _C.MIN_TOP_K
MAX_TOP_K: int = _C.MAX_TOP_K


def build_info() -> dict[str, str]:
    """How the compiled part was built: version, torch_version, cuda_version ("" without), …."""
    return _C.build_info()


def has_kernel(op: str, device_type: str) -> bool:
    """Whether operator ``op`` is compiled for tensors on ``device_type``."""
    key = device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"eaft_ext::{op}", key)
