"""The command line: ``info``, ``--version`` and what happens without optional packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eaft_ext
from eaft_ext.cli.main import main


def test_info_describes_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["version", torch.__version__] in lines
    assert ["threads", str(torch.get_num_threads())] in lines
    for key, value in eaft_ext.build_info().items():
        assert [key, *(value or "none").split()] in lines
    forward = next(line for line in lines if line[0] == "gated_ce_forward")
    assert "CPU" in forward[1]


def test_info_as_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    main(["info"])
    plain = capsys.readouterr().out.splitlines()
    stated = []
    for title, section in report.items():
        stated.append([title])
        stated.extend([key, value] for key, value in section.items())
    assert [line.split(maxsplit=1)[0] for line in plain] == [
        words[0].split()[0] for words in stated
    ]
    assert all(line.endswith(words[-1].rstrip()) for line, words in zip(plain, stated, strict=True))


def test_info_says_where_every_operator_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "--json"])
    operators = json.loads(capsys.readouterr().out)["operators"]
    written_in_pytorch = {name for name in operators if name.startswith("linear_")}
    assert len(written_in_pytorch) == 3
    for name, places in operators.items():
        if name in written_in_pytorch:
            assert places == "any device, in PyTorch"
        else:
            assert places.split(", ")[0] == "CPU"


def test_info_names_other_accelerators(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
    )
    main(["info", "--json"])
    section = json.loads(capsys.readouterr().out)["torch"]
    assert (section["gpus"], section["hip"]) == ("mps", "7.1")


def test_info_lists_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    main(["info", "--json"])
    section = json.loads(capsys.readouterr().out)["torch"]
    assert section["gpu 0"] == "Some GPU, capability 9.0, 80.0 GiB"
    assert "gpus" not in section


def test_info_without_gpu_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    main(["info", "--json"])
    assert json.loads(capsys.readouterr().out)["torch"]["gpus"] == "none visible"


def test_info_without_the_compiled_part_prints_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(eaft_ext, "_library")
    monkeypatch.setitem(sys.modules, "eaft_ext._library", None)
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["build"].keys() == {"missing"}
    assert "eaft_ext._library" in report["build"]["missing"]
    assert report["torch"]["version"] == torch.__version__


def test_torch_is_all_that_info_needs(tmp_path: Path) -> None:
    """And the demo says in one sentence what it needs more."""
    program = """
import sys
for name in ("rich", "transformers", "matplotlib", "gguf", "accelerate", "typer"):
    sys.modules[name] = None
from eaft_ext.cli.main import main
assert main(["info"]) == 0
sys.exit(main(["demo"]))
"""
    package = Path(eaft_ext.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout.startswith("eaft_ext\n  version")
    assert result.stderr.splitlines() == [
        "eaft-ext demo: transformers, matplotlib, rich not installed: "
        "pip install 'eaft_ext[demo]' brings what it needs"
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("eaft-ext ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["demo", "--steps", "0"], "argument --steps: expected a whole number from 1, got '0'"),
        (
            ["demo", "--batch-size", "two"],
            "--batch-size: expected a whole number from 1, got 'two'",
        ),
        (["demo", "--sequence-length", "1"], "expected a whole number from 2, got '1'"),
        (["demo", "--learning-rate", "0"], "expected a number above 0, got '0'"),
        (["demo", "--learning-rate", "nan"], "expected a number above 0, got 'nan'"),
        (
            ["demo", "--k", "1"],
            "argument --k: gated_ce: k must be from 2 to 128, or None for all, got 1",
        ),
        (
            ["demo", "--k", "129"],
            "argument --k: gated_ce: k must be from 2 to 128, or None for all, got 129",
        ),
        (["demo", "--device", "abacus"], "argument --device: 'abacus' cannot be used"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err
