"""The landscape of a training, as an image in the logs of TensorBoard and W&B."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import copy
import importlib.util
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

MISSING = "needs transformers and accelerate: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)
pytest.importorskip("accelerate", reason=MISSING)
PIL_MISSING = "needs Pillow: pip install pillow"
Image = pytest.importorskip("PIL.Image", reason=PIL_MISSING)

from trainer_runs import STEPS, InOrder, arguments, examples, kept_landscapes, logged
from transformers_models import build, shifted

from eaft_ext import reference
from eaft_ext._landscape import CELLS, counts
from eaft_ext.cli.palette import LOSSES, REGIONS
from eaft_ext.integrations import _landscape_image
from eaft_ext.integrations._landscape_image import FULL, GROUND, PIXELS, draw
from eaft_ext.integrations.trainer import EAFTCallback

K = 20


def pixel(image: Tensor, row: int, column: int) -> tuple[int, ...]:
    """In the middle of a cell; entropy goes upwards."""
    found = image[(CELLS - 1 - row) * PIXELS + PIXELS // 2, column * PIXELS + PIXELS // 2]
    return tuple(found.tolist())


def expected_cells(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """By the reference, of labels as the data set has them."""
    tokens, labels = (torch.stack([row[n] for row in rows]) for n in ("input_ids", "labels"))
    with torch.no_grad():
        logits = model(tokens).logits
    _, stats = reference.gated_ce(logits, shifted(labels), K, return_stats=True)
    return counts(stats.nll, stats.entropy, K, stats.valid)


def run(model: Any, folder: Path, callback: EAFTCallback, **changes: Any) -> Any:
    trainer = InOrder(
        model,
        arguments(folder, **changes),
        train_dataset=examples(),
        eval_dataset=examples()[:6],
        callbacks=[callback],
    )
    trainer.train()
    return trainer


def labels_in(rows: list[dict[str, Any]]) -> int:
    return int((shifted(torch.stack([row["labels"] for row in rows])) != -100).sum())


def test_an_image() -> None:
    cells = torch.zeros(CELLS, CELLS, dtype=torch.int64)
    cells[0, CELLS - 1] = 1_000_000  # sure, and of the label
    cells[CELLS - 1, 0] = 1_000
    cells[20, 20] = 1
    image = draw(cells)
    assert image.shape == (CELLS * PIXELS, CELLS * PIXELS, 3) and image.dtype == torch.uint8
    assert pixel(image, 0, CELLS - 1) == FULL == tuple(image[-1, -1].tolist())
    assert pixel(image, 10, 10) == GROUND
    assert pixel(image, 0, 0) == GROUND
    red = [pixel(image, *cell)[0] for cell in ((0, CELLS - 1), (CELLS - 1, 0), (20, 20), (9, 9))]
    assert red == sorted(red) and len(set(red)) == 4, "darker where there are more"
    assert GROUND[0] - red[2] > 25, "one token among a million is seen"


def test_the_corner_of_an_image() -> None:
    """Lines right of p = 0.1 and above H = 0.3 ln k, and nowhere else."""
    image = draw(torch.zeros(CELLS, CELLS))
    is_line = (image != torch.tensor(GROUND, dtype=torch.uint8)).any(-1)
    size = CELLS * PIXELS
    right, top = round(0.1 * size), size - 1 - round(0.3 * size)
    expected = torch.zeros(size, size, dtype=torch.bool)
    expected[top, : right + 1] = True
    expected[top:, right] = True
    assert torch.equal(is_line, expected)


def test_an_image_beside_other_defaults() -> None:
    """Of torch: an image is where the counts are."""
    cells = torch.eye(CELLS)
    expected = draw(cells)
    with torch.device("meta"):
        assert torch.equal(draw(cells), expected)


def test_colours_are_those_of_the_palette() -> None:
    found = ["#" + bytes(colour).hex() for colour in (FULL, _landscape_image.BOUND)]
    assert found == [LOSSES["eaft"].light, REGIONS["conflict"].light]


@pytest.mark.parametrize("logging_steps", [1, 2, STEPS])
def test_every_token_is_counted_once(logging_steps: int, tmp_path: Path) -> None:
    """Of uneven micro-batches, one of which has no labels; evaluations have their own."""
    with kept_landscapes() as kept:
        run(
            build("llama"),
            tmp_path,
            EAFTCallback(landscape=True),
            logging_steps=logging_steps,
            eval_strategy="steps",
            eval_steps=1,
        )
    found = [(step, int(cells.sum())) for name, cells, step in kept if name == "eaft_landscape"]
    rows = examples()
    ends = [*range(logging_steps, STEPS, logging_steps), STEPS]
    starts = [0, *ends[:-1]]
    if STEPS % logging_steps:  # what comes after the last log is in none
        starts, ends = starts[:-1], ends[:-1]
    assert found == [
        (end, labels_in(rows[4 * start : 4 * end])) for start, end in zip(starts, ends, strict=True)
    ]
    of_evaluations = [
        (step, int(cells.sum())) for name, cells, step in kept if name == "eval_eaft_landscape"
    ]
    assert of_evaluations == [(step, labels_in(rows[:6])) for step in range(1, STEPS + 1)]
    assert len(kept) == len(found) + len(of_evaluations)


def test_logs_are_the_same_with_it(tmp_path: Path) -> None:
    def logs(**options: Any) -> list[dict[str, float]]:
        callback = EAFTCallback(**options)
        trainer = run(build("llama"), tmp_path, callback, eval_strategy="steps", eval_steps=2)
        return [
            {name: value for name, value in entry.items() if "eaft_" in name}
            for entry in trainer.state.log_history
        ]

    with kept_landscapes():
        found = logs(landscape=True)
    assert found == logs() and any(found)


@pytest.fixture(scope="module")
def of_tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Images by their tags and steps; the model before and after."""
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulators = pytest.importorskip(module, reason="needs tensorboard: pip install tensorboard")
    folder = tmp_path_factory.mktemp("tensorboard")
    model = build("llama")
    before = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        changes = {"report_to": ["tensorboard"], "eval_strategy": "steps", "eval_steps": STEPS}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="EAFTCallback")
            run(model, folder, EAFTCallback(landscape=True), **changes)
    events = accumulators.EventAccumulator(
        str(folder / "events"), size_guidance={accumulators.IMAGES: 0}
    )
    events.Reload()
    images = {
        tag: {
            event.step: torch.frombuffer(
                bytearray(Image.open(io.BytesIO(event.encoded_image_string)).tobytes()),
                dtype=torch.uint8,
            ).view(event.height, event.width, 3)
            for event in events.Images(tag)
        }
        for tag in events.Tags()["images"]
    }
    yield {"images": images, "before": before, "after": model.eval(), "tags": events.Tags()}


def test_tensorboard(of_tensorboard: dict[str, Any]) -> None:
    """Its files have an image for each log, beside the numbers of the same name."""
    images = of_tensorboard["images"]
    assert {tag: list(of_tag) for tag, of_tag in images.items()} == {
        "train/eaft_landscape": list(range(1, STEPS + 1)),
        "eval/eaft_landscape": [STEPS],
    }
    assert {"train/eaft_gate", "eval/eaft_gate"} <= set(of_tensorboard["tags"]["scalars"])
    first = expected_cells(of_tensorboard["before"], examples()[:4])
    assert torch.equal(images["train/eaft_landscape"][1], draw(first))
    last = expected_cells(of_tensorboard["after"], examples()[:6])
    assert torch.equal(images["eval/eaft_landscape"][STEPS], draw(last))


def test_the_cell_of_a_token_is_dark(of_tensorboard: dict[str, Any]) -> None:
    """Of the first one with a label, worked out by hand."""
    row = examples()[0]
    position = int((shifted(row["labels"][None])[0] != -100).nonzero()[0])
    logits = of_tensorboard["before"](row["input_ids"][None]).logits[0, position].double()
    probability = logits.softmax(-1)[row["labels"][position + 1]].item()
    top = logits.topk(K).values.softmax(-1)
    entropy = -(top * top.log()).sum().item() / math.log(K)
    image = of_tensorboard["images"]["train/eaft_landscape"][1]
    cell = int(entropy * CELLS), int(probability * CELLS)
    assert sum(pixel(image, *cell)) < sum(GROUND) - 60
    assert pixel(image, CELLS // 2, CELLS - 1) == GROUND


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs W&B: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    model = build("llama")
    before = copy.deepcopy(model)
    changes = {"eval_strategy": "steps", "eval_steps": STEPS, "report_to": ["wandb"]}
    try:
        run(model, tmp_path / "run", EAFTCallback(landscape=True), **changes)
        logged_rows = wandb.run.step
    finally:
        wandb.finish()
    assert logged_rows <= STEPS + 2, "an image has no row of its own"
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/images")
    files = {path.parent.name: [] for path in media.rglob("*.png")}
    for path in sorted(media.rglob("*.png")):
        files[path.parent.name].append(path)
    assert {tag: len(of_tag) for tag, of_tag in files.items()} == {"train": STEPS, "eval": 1}
    first = next(path for path in files["train"] if path.name.startswith("eaft_landscape_0_"))
    image = Image.open(first).convert("RGB")
    found = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    expected = draw(expected_cells(before, examples()[:4]))
    assert torch.equal(found.view_as(expected), expected)


def test_no_logger_of_images(tmp_path: Path) -> None:
    """It trains, logs its numbers, and says once that nothing shows the images."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = run(build("llama"), tmp_path, EAFTCallback(landscape=True))
    told = [str(warning.message) for warning in caught if "EAFTCallback" in str(warning.message)]
    assert len(told) == 1 and 'report_to="tensorboard" or "wandb"' in told[0]
    assert len(logged(trainer, "eaft_gate")) == STEPS


def test_options_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="EAFTCallback: landscape must be True or False, got 10"):
        EAFTCallback(landscape=10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="landscape=True is of what logs=False leaves out"):
        EAFTCallback(landscape=True, logs=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="landscape=True needs Pillow"):
        EAFTCallback(landscape=True)
    EAFTCallback()
