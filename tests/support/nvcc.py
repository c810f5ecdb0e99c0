"""The CUDA compiler, which some tests need, without a GPU."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path


@cache
def nvcc() -> str | None:
    """Its path, if there is one."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
