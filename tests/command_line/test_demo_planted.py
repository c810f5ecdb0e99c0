"""The demo's wrong labels: where they are, what is said of them, and what EAFT does with them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo_tiny_model import Demo, demo, save_tiny_model, tiny_folder, tokenizer

from eaft_ext.cli import model as models
from eaft_ext.cli.batches import IGNORE_INDEX, training_batches
from eaft_ext.cli.demo.planted import PLANTED_SHARE, plant, sure_and_right
from eaft_ext.cli.records import Record

__all__ = ["demo", "tiny_folder", "tokenizer"]

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COLOURS = ["red", "green", "blue", "white", "black", "brown"]


def counting(lines: int, colours: list[str], seed: int) -> str:
    """Text of which a small model soon knows all but the colours by heart."""
    draw = random.Random(seed)
    return "\n\n".join(
        " ".join([*(NUMBERS[(first + i) % 10] for i in range(5)), draw.choice(colours)])
        for first in (draw.randrange(10) for _ in range(lines))
    )


@pytest.fixture(scope="module")
def sure_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned to count."""
    folder = tmp_path_factory.mktemp("sure-model")
    save_tiny_model(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    batches = training_batches(
        [Record(counting(300, COLOURS, seed=0))], words, steps=200, batch_size=8, length=64, seed=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for batch in batches:
        logits = model(input_ids=batch.input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def test_sure_and_right() -> None:
    logits = torch.zeros(1, 5, 50)
    logits[0, :3, 7] = 20.0
    labels = torch.tensor([[7, 8, IGNORE_INDEX, 7, IGNORE_INDEX]])
    found = sure_and_right(logits, labels, k=20)
    # Right, in conflict, ignored, unsure, ignored.
    assert found.tolist() == [[True, False, False, False, False]]


def test_a_share_of_the_candidates_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1000, (100, 100), generator=generator)
    candidates = torch.rand(100, 100, generator=generator) < 0.5
    words = torch.tensor([2000, 2001])
    found = plant(labels, candidates, words, PLANTED_SHARE, generator)
    changed = found != labels
    assert not (changed & ~candidates).any()
    assert changed.sum() / candidates.sum() == pytest.approx(PLANTED_SHARE, abs=0.02)
    assert set(found[changed].tolist()) == {2000, 2001}
    assert plant(labels, candidates, words, 0.0, generator).equal(labels)


class TestRuns:
    def run(self, demo: Demo, folder: Path, data: Path, *options: str, output: str) -> Any:
        data.write_text(counting(200, COLOURS[:2], seed=1))
        more = ("--model", str(folder), "--data", str(data), "--drift-data", str(data))
        sizes = ("--steps", "12", "--batch-size", "4", "--sequence-length", "64")
        rate = ("--learning-rate", "0.003")
        status, results = demo(*more, *sizes, *rate, *options, output=output)
        assert status == 0
        return results

    def test_what_was_done_to_the_labels_is_told(
        self, demo: Demo, sure_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = tmp_path / "counting.txt"
        planted = self.run(demo, sure_folder, data, output="planted")
        printed = " ".join(capsys.readouterr().out.split())
        told = planted["texts"]["labels"]
        assert told in printed and "where the base is sure and right" in printed
        changed, candidates = [int(word) for word in told.split() if word.isdigit()][:2]
        assert changed / candidates == pytest.approx(PLANTED_SHARE, abs=0.05)
        natural = self.run(demo, sure_folder, data, "--natural", output="natural")
        assert natural["texts"]["labels"] == "the labels as they are"
        assert natural["base"] == planted["base"]  # the held-out text is clean in both
        first = [results["runs"]["SFT"]["steps"][0]["nll"] for results in (natural, planted)]
        assert first[0] < first[1]

    def test_in_bfloat16(
        self, demo: Demo, sure_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a CPU that multiplies in it: near, and not equal."""
        data = tmp_path / "counting.txt"
        whole = self.run(demo, sure_folder, data, output="float32")
        monkeypatch.setattr(models, "cpu_multiplies_bfloat16", lambda: True)
        half = self.run(demo, sure_folder, data, output="bfloat16")
        first, second = (r["runs"]["EAFT"]["steps"][0]["nll"] for r in (whole, half))
        assert first != second
        assert first == pytest.approx(second, rel=0.02)

    @pytest.mark.parametrize("seed", range(3))
    def test_eaft_keeps_what_the_model_knew(
        self, demo: Demo, sure_folder: Path, tmp_path: Path, seed: int
    ) -> None:
        data = tmp_path / "counting.txt"
        results = self.run(demo, sure_folder, data, "--seed", str(seed), output=f"seed{seed}")
        last = {name: run["evaluations"][-1] for name, run in results["runs"].items()}
        base = results["base"]
        lost = {name: point["sure_loss"] - base["sure_loss"] for name, point in last.items()}
        assert lost["SFT"] > 0
        assert lost["EAFT"] < 0.8 * lost["SFT"]
        assert last["EAFT"]["drift_kl"] < 0.9 * last["SFT"]["drift_kl"]
