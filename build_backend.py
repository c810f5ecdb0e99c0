"""PEP 517 backend: setuptools, building against the torch that the user already has.

pip builds in an isolated environment. Were torch listed in ``build-system.requires``, pip would
put some torch into it, and the extension would be built for another torch than the one that loads
it. So this backend looks for torch in the surrounding environment and requests it only if there is
none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = Mapping[str, Any] | None

_PROBE = """
import importlib.util, json, sys
print(json.dumps(sys.path[1:] if importlib.util.find_spec("torch") else []))
"""
# Through these, pip lays its isolated environment over the surrounding one.
_ISOLATION = ("PYTHONPATH", "PYTHONNOUSERSITE")


def _add_surrounding_torch() -> bool:
    """Make the surrounding torch importable here, after all that the isolation brings."""
    environment = {name: value for name, value in os.environ.items() if name not in _ISOLATION}
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True
    )
    path = json.loads(probe.stdout)
    sys.path.extend(p for p in path if p not in sys.path)
    return bool(path)


def _requires_torch() -> list[str]:
    return [] if _add_surrounding_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """torch, where there is none, and what setuptools asks for."""
    return [*_requires_torch(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """torch, where there is none, and what setuptools asks for."""
    return [*_requires_torch(), *build_meta.get_requires_for_build_editable(config_settings)]


def prepare_metadata_for_build_wheel(directory: str, config_settings: Settings = None) -> str:
    """Metadata with the requirement on the torch that is built against."""
    _add_surrounding_torch()
    return build_meta.prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(directory: str, config_settings: Settings = None) -> str:
    """Metadata with the requirement on the torch that is built against."""
    _add_surrounding_torch()
    return build_meta.prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(
    directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """A wheel for the torch that is there."""
    _add_surrounding_torch()
    return build_meta.build_wheel(directory, config_settings, metadata_directory)


def build_editable(
    directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """An editable wheel, its extension built into the source tree."""
    _add_surrounding_torch()
    return build_meta.build_editable(directory, config_settings, metadata_directory)
