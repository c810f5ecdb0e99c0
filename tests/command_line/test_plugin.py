"""The command that tells where a training stack finds the loss."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from eaft_ext.cli.main import main
from eaft_ext.cli.plugin import PLUGINS


@pytest.mark.parametrize("stack", PLUGINS)
def test_the_path(stack: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", stack]) == 0
    path = Path(capsys.readouterr().out.strip())
    ast.parse(path.read_text())
    # The stack puts the folder first on sys.path: what is in it hides what has its name.
    assert {file.stem for file in path.parent.glob("*.py")} == {"__init__", "eaft_plugin"}


def test_another_stack(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plugin", "another"])
    assert "ms-swift" in capsys.readouterr().err
