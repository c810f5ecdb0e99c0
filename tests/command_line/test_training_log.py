"""What a training has logged, read from its folder: as a table and as a picture."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import io
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs the demo extra and accelerate: pip install '.[demo]'"
transformers = pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("accelerate", reason=MISSING)
pytest.importorskip("rich", reason=MISSING)
pytest.importorskip("matplotlib", reason=MISSING)

from demo_tiny_model import VOCABULARY, tiny_folder

from eaft_ext.cli import training_report
from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.main import main
from eaft_ext.cli.palette import LOGGED
from eaft_ext.cli.training_log import draw, print_log, read_log, run_log
from eaft_ext.integrations.trainer import EAFTCallback

__all__ = ["tiny_folder"]

STEPS = 4


def train(model_folder: Path, folder: Path, *callbacks: Any, **changes: Any) -> Any:
    """Four steps, with a checkpoint and an evaluation after every second; returns the trainer."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCABULARY, (STEPS * 2, 12), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_only_model": True,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = transformers.Trainer(
        transformers.AutoModelForCausalLM.from_pretrained(model_folder),
        transformers.TrainingArguments(str(folder), **options | changes),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a training and its log."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    trainer = train(tiny_folder, folder, EAFTCallback())
    return folder, trainer.state.log_history


@pytest.fixture(scope="module")
def plain(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training without the callback."""
    folder = tmp_path_factory.mktemp("plain")
    train(tiny_folder, folder, eval_strategy="no")
    return folder


@pytest.fixture
def console() -> Any:
    from rich.console import Console

    return Console(width=120, record=True, file=io.StringIO())


def ours(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step and what is reported, of entries with our values."""
    return [
        {
            name: value
            for name, value in entry.items()
            if name in ("step", "loss", "eval_loss") or "eaft_" in name
        }
        for entry in history
        if any("eaft_" in name for name in entry)
    ]


def test_the_state_of_the_newest_checkpoint(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """Also where its number has more digits, and one that was not written to the end is passed."""
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    assert not (folder / "trainer_state.json").exists()
    found = ours(read_log(folder))
    assert found == ours(trained[1]) and len(found) == STEPS + 2
    assert ours(read_log(folder / f"checkpoint-{STEPS}")) == found
    (folder / f"checkpoint-{STEPS}").rename(folder / "checkpoint-10")
    assert ours(read_log(folder)) == found
    (folder / "checkpoint-11").mkdir()
    (folder / "checkpoint-11" / "trainer_state.json").write_text('{"log_history": [{"st')
    assert ours(read_log(folder)) == found


def test_the_state_in_the_folder_itself(trained: tuple[Path, Any], tmp_path: Path) -> None:
    state = {"log_history": trained[1]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert ours(read_log(tmp_path)) == ours(trained[1])


def test_the_files_of_tensorboard(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With images among them; they win where the checkpoint has fewer steps, and not else."""
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs" / "first"))
    options = {"report_to": ["tensorboard"], "save_strategy": "no"}
    trainer = train(tiny_folder, tmp_path, EAFTCallback(landscape=True), **options)
    found = read_log(tmp_path)
    assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
    for entry in ours(trainer.state.log_history):
        of_step = found[entry["step"] - 1]
        for name, value in entry.items():
            assert of_step[name] == pytest.approx(value, rel=1e-6), name

    few = {"log_history": [{"step": 1, "eaft_gate": 0.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(few))
    assert len(read_log(tmp_path)) == STEPS
    many = {"log_history": [{"step": step, "eaft_gate": 0.5} for step in range(9)]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(many))
    assert len(read_log(tmp_path)) == 9

    (tmp_path / "trainer_state.json").unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(CommandError, match="tensorboard is not installed: pip install tensorboard"):
        read_log(tmp_path)


def test_the_log_of_llama_factory(tmp_path: Path) -> None:
    """It is taken where it has our values; a line that is being written is left out."""
    lines = [
        {"current_steps": step, "total_steps": 4, "loss": 2.0 / step, "eaft_gate": 0.1 * step}
        for step in (1, 2)
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"current_st'
    (tmp_path / "trainer_log.jsonl").write_text(text)
    assert [(e["step"], e["loss"], e["eaft_gate"]) for e in read_log(tmp_path)] == [
        (1, 2.0, 0.1),
        (2, 1.0, 0.2),
    ]
    without = [{"current_steps": 1, "loss": 2.0}]
    (tmp_path / "trainer_log.jsonl").write_text("\n".join(map(json.dumps, without)))
    with pytest.raises(CommandError, match=r"trainer_log\.jsonl has no values of EAFTCallback"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (None, "", r"no log in .*: pass the output_dir of a training, which has a trainer_state"),
        ("trainer_state.json", "", r"cannot read .*trainer_state\.json: not the state of a train"),
        ("trainer_state.json", "[1]", r"cannot read .*: not the state of a trainer: no log_hist"),
        ("trainer_state.json", '{"log_history": 3}', "no log_history"),
        ("trainer_state.json", "\udcff", "not the state of a trainer"),
        ("trainer_state.json", "[" * 100_000, "not the state of a trainer"),
        ("trainer_state.json", '{"log_history": []}', "has no values of EAFTCallback"),
        ("trainer_state.json", '{"log_history": [3, {"eaft_gate": 1}]}', "has no values of"),
        ("trainer_log.jsonl", "", "has no values of EAFTCallback, such as eaft_gate: train with"),
        ("trainer_log.jsonl", "[" * 100_000, "has no values of EAFTCallback"),
        ("trainer_log.jsonl", "\udcff", r"cannot read .*trainer_log\.jsonl"),
        ("checkpoint-7/trainer_state.json", "{", r"cannot read .*checkpoint-7"),
        ("checkpoint-last/trainer_state.json", "{}", "no log in"),
    ],
)
def test_broken_and_empty_folders(
    file: str | None, text: str, message: str, tmp_path: Path
) -> None:
    if file is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CommandError, match=message) as raised:
        read_log(tmp_path)
    assert "\n" not in str(raised.value)


def test_broken_files_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    (tmp_path / "runs").mkdir()
    for content in (b"", b"no events", b"\x18" + bytes(7) + b"x" * 40):
        (tmp_path / "runs" / "events.out.tfevents.1.host").write_bytes(content)
        with pytest.raises(CommandError, match="has no values of EAFTCallback"):
            read_log(tmp_path)


def test_what_is_no_folder(tmp_path: Path, plain: Path) -> None:
    for path in (tmp_path / "absent", plain / "checkpoint-2" / "trainer_state.json"):
        with pytest.raises(CommandError, match="is not a folder: pass the output_dir of a train"):
            read_log(path)


def test_a_training_without_the_callback(plain: Path) -> None:
    with pytest.raises(CommandError, match=r"checkpoint-4.*has no values of EAFTCallback"):
        read_log(plain)


def test_the_report(trained: tuple[Path, Any], tmp_path: Path, console: Any) -> None:
    plot = tmp_path / "log.png"
    run_log(trained[0], plot, console)
    printed = console.export_text()
    history = trained[1]
    of_steps = [entry for entry in history if "eaft_gate" in entry]
    rows = [line.split() for line in printed.splitlines()]
    for entry in of_steps:
        values = [entry[name] * (100 if "conflicts" in name else 1) for name in LOGGED]
        row = ["training", str(entry["step"]), *(f"{value:.3f}" for value in values)]
        assert row in rows
    first, last = (f"{of_steps[at]['eaft_gate']:.3f}" for at in (0, -1))
    assert "training 1 -> 4" in " ".join(printed.split()) and f"{first} -> {last}" in printed
    of_evaluations = [entry["eval_eaft_nll"] for entry in history if "eval_eaft_nll" in entry]
    assert "evaluation 2 -> 4" in " ".join(printed.split())
    assert f"{of_evaluations[0]:.3f} -> {of_evaluations[-1]:.3f}" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def long_history(steps: int = 100) -> list[dict[str, Any]]:
    history = [
        {
            "step": step,
            "loss": 3.0 / step,
            "eaft_gate": 0.5,
            "eaft_nll": 4.0 / step,
            "eaft_entropy": 1.0,
            "eaft_confident_conflicts": 0.25,
        }
        for step in range(1, steps + 1)
    ]
    history.append({"step": 50, "eval_code_loss": 1.0, "eval_code_eaft_gate": 0.75})
    return history


def test_a_long_table(console: Any) -> None:
    """Twelve steps spread over it, and one evaluation of a data set that has a name."""
    print_log(console, long_history())
    rows = [line.split() for line in console.export_text().splitlines()]
    steps = [int(row[1]) for row in rows if row[:1] == ["training"] and row[2] != "->"]
    assert len(steps) == training_report.ROWS and steps[0] == 1 and steps[-1] == 100
    gaps = {after - before for before, after in pairwise(steps)}
    assert gaps == {9}
    assert ["evaluation", "code", "50", "1.000", "-", "0.750", "-", "-"] in rows
    assert ["training", "1", "3.000", "4.000", "0.500", "1.000", "25.000"] in rows


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn in each panel, over which steps and in whose colour."""
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    history = long_history()
    history[3]["eaft_entropy"] = math.nan
    draw(history, tmp_path / "log.svg")
    assert (tmp_path / "log.svg").stat().st_size > 0
    monkeypatch.undo()
    (figure,) = kept
    drawn = {
        axes.get_title(): {line.get_label(): line for line in axes.lines} for axes in figure.axes
    }
    assert {title: list(lines) for title, lines in drawn.items()} == {
        "Loss": ["loss", "loss, evaluation code", "cross-entropy (nll)"],
        "Mean gate": ["gate", "gate, evaluation code"],
        "Entropy of the largest k logits": ["entropy"],
        "Confident conflicts": ["confident conflicts"],
    }
    line = drawn["Loss"]["cross-entropy (nll)"]
    assert list(line.get_xdata()) == list(range(1, 101)) and line.get_ydata()[1] == 2.0
    assert line.get_color() == LOGGED["eaft_nll"].light
    evaluation = drawn["Mean gate"]["gate, evaluation code"]
    assert evaluation.get_linestyle() == "None" and list(evaluation.get_xdata()) == [50]
    assert drawn["Confident conflicts"]["confident conflicts"].get_ydata()[0] == 25.0
    assert math.isnan(drawn["Entropy of the largest k logits"]["entropy"].get_ydata()[3])
    pyplot.close(figure)


def test_a_picture_that_cannot_be_written(
    trained: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, complaint in [
        ("absent/log.png", "not a file in a folder that exists"),
        (".", "not a file in a folder that exists"),
        ("log.xyz", "--plot must end in .png, .svg, .pdf, got"),
    ]:
        plot = tmp_path / name
        assert main(["inspect", "--log", str(trained[0]), "--plot", str(plot)]) == 1
        assert complaint in capsys.readouterr().err and not plot.is_file()


def test_without_a_picture(trained: tuple[Path, Any], console: Any) -> None:
    run_log(trained[0], None, console)
    assert "picture" not in console.export_text()


def test_the_command(
    trained: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "log.png"
    assert main(["inspect", "--log", str(trained[0]), "--plot", str(plot)]) == 0
    assert "gate" in capsys.readouterr().out and plot.stat().st_size > 10_000
    assert main(["inspect", "--log", str(trained[0]), "--html", "page.html"]) == 1
    assert "--log has a table and a --plot: leave --html out" in capsys.readouterr().err
    assert main(["inspect", "--log", str(tmp_path)]) == 1
    assert f"no log in {tmp_path}" in capsys.readouterr().err
