"""Building and loading: finding torch and CUDA, the sdist, what a wrong import says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import eaft_ext

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(eaft_ext.__file__).parent


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem + "_under_test", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("CUDA_HOME", "EAFT_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return load(ROOT / "setup.py")


def make_toolkit(folder: Path, *, headers: bool = True) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0\n")
    nvcc.chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
    return folder


class TestFindCuda:
    def test_cuda_home_comes_first(
        self, setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = make_toolkit(tmp_path / "home")
        other = make_toolkit(tmp_path / "other")
        monkeypatch.setenv("CUDA_HOME", str(home))
        monkeypatch.setenv("PATH", str(other / "bin"))
        assert setup_script.find_cuda_home() == home

    def test_a_folder_without_headers_does_not_count(
        self, setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """nvcc on PATH may be a wrapper script whose folder is no toolkit."""
        wrapper = make_toolkit(tmp_path / "wrapper", headers=False)
        monkeypatch.setenv("CUDA_HOME", str(wrapper))
        monkeypatch.setenv("PATH", str(wrapper / "bin"))
        assert setup_script.find_cuda_home() in (None, Path("/usr/local/cuda"))

    def test_a_folder_without_nvcc_does_not_count(
        self, setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        headers = make_toolkit(tmp_path / "headers")
        (headers / "bin" / "nvcc").unlink()
        monkeypatch.setenv("CUDA_HOME", str(headers))
        assert setup_script.find_cuda_home() != headers

    def test_symlinked_nvcc_is_resolved(
        self, setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = make_toolkit(tmp_path / "toolkit")
        links = tmp_path / "links"
        links.mkdir()
        (links / "nvcc").symlink_to(home / "bin" / "nvcc")
        monkeypatch.setenv("PATH", str(links))
        assert setup_script.find_cuda_home() == home

    def test_zero_leaves_cuda_out(
        self, setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "home")))
        assert setup_script.choose_cuda("13.0") is not None
        assert setup_script.choose_cuda(None) is None
        monkeypatch.setenv("EAFT_EXT_CUDA", "0")
        assert setup_script.choose_cuda("13.0") is None

    def test_another_major_version_is_left_out(
        self,
        setup_script: ModuleType,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "home")))
        assert setup_script.choose_cuda("12.8") is None
        assert "toolkit 13 in" in capsys.readouterr().out
        monkeypatch.setenv("EAFT_EXT_CUDA", "1")
        with pytest.raises(SystemExit, match=r"toolkit 13 in .* torch with CUDA 12\.8"):
            setup_script.choose_cuda("12.8")

    def test_insisting_fails_loudly(
        self, setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EAFT_EXT_CUDA", "1")
        with pytest.raises(SystemExit, match="built without CUDA"):
            setup_script.choose_cuda(None)
        monkeypatch.setattr(setup_script, "find_cuda_home", lambda: None)
        with pytest.raises(SystemExit, match="set CUDA_HOME"):
            setup_script.choose_cuda("13.0")
        monkeypatch.setenv("EAFT_EXT_CUDA", "yes")
        with pytest.raises(SystemExit, match="'yes'"):
            setup_script.choose_cuda("13.0")


class TestBackend:
    def test_surrounding_torch_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        backend = load(ROOT / "build_backend.py")
        assert backend._requires_torch() == []

    def test_torch_is_requested_where_there_is_none(self, tmp_path: Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True
        )
        code = "import build_backend; print(build_backend._requires_torch())"
        # As under pip's isolation, packages are on PYTHONPATH, and those must not count.
        site = Path(torch.__file__).parent.parent
        result = subprocess.run(
            [tmp_path / "env" / "bin" / "python", "-c", code],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"},
            capture_output=True,
            text=True,
        )
        assert result.stdout.strip() == "['torch>=2.10']", result.stderr

    def test_the_installed_package_takes_any_torch_of_the_stable_abi(self) -> None:
        assert "torch>=2.10" in (importlib.metadata.requires("eaft_ext") or [])


def test_sdist_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    code = f"import build_backend; print(build_backend.build_sdist({str(tmp_path)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    archive = tmp_path / result.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        members = {str(Path(*Path(m.name).parts[1:])) for m in tar if m.isfile()}
    wanted = [
        "build_backend.py",
        "setup.py",
        "CMakeLists.txt",
        "eaft_ext/_C.pyi",
        "eaft_ext/py.typed",
    ]
    wanted += [str(p.relative_to(source)) for p in (source / "csrc").rglob("*") if p.is_file()]
    assert set(wanted) <= members
    assert not [m for m in members if m.endswith(".so")]


class TestLoading:
    """What an import says when the compiled part is missing or does not fit."""

    def run_import(self, folder: Path, before: str = "") -> str:
        # An editable install finds the missing part of any other copy; it must not help here.
        code = (
            "import sys\n"
            "sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
            f"{before}\n"
            "import eaft_ext"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
        )
        assert result.returncode != 0
        return result.stderr.strip().splitlines()[-1]

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        return shutil.copytree(
            PACKAGE, tmp_path / "eaft_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )

    def test_not_built(self, package: Path) -> None:
        last_line = self.run_import(package.parent)
        assert last_line.startswith("ImportError: eaft_ext: the compiled part is not in ")
        assert f"`pip install -e .` in {package.parent}" in last_line

    def test_built_for_another_python(self, package: Path) -> None:
        (package / "_C.py").write_text("raise ImportError('undefined symbol: x')\n")
        last_line = self.run_import(package.parent)
        assert f"was not built for this Python, {sys.version.split()[0]} (undefined " in last_line

    def test_an_older_torch(self, package: Path) -> None:
        (package / "_C.py").touch()
        last_line = self.run_import(package.parent, "import torch; torch.__version__ = '2.9.1+cpu'")
        assert last_line == "ImportError: eaft_ext: needs torch 2.10 or later, found 2.9.1+cpu."

    @pytest.mark.parametrize(("cuda", "named"), [("", "the CPU"), ("13.0", "CUDA 13.0")])
    def test_cannot_be_loaded(self, package: Path, cuda: str, named: str) -> None:
        """As with libcudart of another release, or none."""
        (package / "_C.py").write_text(
            f"def build_info():\n    return {{'cuda_version': {cuda!r}}}\n"
        )
        (package / "_operators.so").write_bytes(b"no library")
        last_line = self.run_import(package.parent)
        assert (
            f"was built for {named} and cannot be loaded into torch {torch.__version__} ("
            in last_line
        )
        assert "_operators.so" in last_line and "pip install ." in last_line


def test_the_version_stands_in_one_place() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"', text, re.MULTILINE)
    assert version and eaft_ext.__version__ == version[1]
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
