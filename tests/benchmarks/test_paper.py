"""The measurements of the paper's claims: forgetting at equal loss, weights, and whole commands."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install '.[test]'")

from paper import knowledge, report, study, texts, weights
from paper.__main__ import main
from paper.step import largest
from paper.verdict import Path as RunPath
from paper.verdict import compare, forgetting_at, frontier, path_of

from eaft_ext.cli.batches import Example, collate

ROOT = Path(__file__).resolve().parents[2]
ROWS, TOKENS = 8, 10.0


def path(target: list[float], kl: list[float], spread: float = 0.0) -> RunPath:
    """A run of these means at its checkpoints; of its rows some forget more, by a spread."""
    around = 1 + spread * np.linspace(-1, 1, ROWS)
    of_rows = TOKENS * np.outer(target, np.ones(ROWS))
    counts = np.full(ROWS, TOKENS)
    forgotten = TOKENS * np.outer(kl, around)
    sums = (of_rows, forgotten, of_rows, forgotten, forgotten)
    return RunPath(list(range(len(target))), *sums, counts, counts, counts)


class TestVerdict:
    @pytest.mark.parametrize(
        ("level", "expected"), [(2.0, 0.0), (1.75, 0.1), (1.5, 0.2), (1.25, 0.3), (0.9, None)]
    )
    def test_forgetting_between_checkpoints(self, level: float, expected: float | None) -> None:
        found = forgetting_at(level, np.array([2.0, 1.5, 1.0]), np.array([0.0, 0.2, 0.4]))
        assert found == (None if expected is None else pytest.approx(expected))

    def test_the_first_crossing_counts(self) -> None:
        target, kl = np.array([2.0, 1.0, 1.5, 0.5]), np.array([0.0, 0.1, 0.5, 0.9])
        assert forgetting_at(1.0, target, kl) == pytest.approx(0.1)

    def test_frontier_is_the_best_of_all_rates(self) -> None:
        slow = path([2.0, 1.5], [0.0, 0.1])
        fast = path([2.0, 1.0], [0.0, 0.4])
        assert frontier(1.75, [slow, fast]) == pytest.approx(0.05)
        assert frontier(1.25, [slow, fast]) == pytest.approx(0.3)
        assert frontier(0.5, [slow, fast]) is None

    def test_ratio_is_at_a_loss_that_both_reach(self) -> None:
        """The first went further, and forgot more for that; at 1.5 it had forgotten half."""
        one, other = path([2.0, 1.5, 1.0], [0.0, 0.1, 0.8]), path([2.0, 1.5], [0.0, 0.2])
        found = compare([(one, other)], np.random.default_rng(0))
        assert found is not None
        assert found.ratio == pytest.approx(0.5)
        assert found.level == pytest.approx(1.5)
        assert found.seeds == 1

    def test_interval_is_of_seeds(self) -> None:
        pairs = [
            (path([2.0, 1.0], [0.0, share]), path([2.0, 1.0], [0.0, 1.0]))
            for share in (0.4, 0.5, 0.9)
        ]
        found = compare(pairs, np.random.default_rng(0))
        assert found is not None
        assert found.ratio == pytest.approx(0.6)
        assert (found.low, found.high) == (pytest.approx(0.4), pytest.approx(0.9))

    def test_interval_is_of_rows(self) -> None:
        """Rows that agree say nothing new; rows that do not widen it."""
        base, other = path([2.0, 1.0], [0.0, 1.0]), path([2.0, 1.0], [0.0, 1.0], spread=0.9)
        same = compare([(base, base)], np.random.default_rng(0))
        wide = compare([(base, other)], np.random.default_rng(0))
        assert same is not None and wide is not None
        assert same.low == same.high == 1
        assert wide.low < 0.95 and wide.high > 1.05

    def test_nothing_learned_is_no_comparison(self) -> None:
        stuck = path([2.0, 2.1], [0.0, 0.1])
        assert compare([(stuck, stuck)], np.random.default_rng(0)) is None


class TestRates:
    def results(self, **paths: tuple[list[float], list[float]]) -> dict[str, Any]:
        """Runs of both arms, by loss and rate: target loss and KL at each checkpoint."""
        runs = {}
        for arm in study.ARMS:
            for of, (target, kl) in paths.items():
                loss, rate = of.split("_")
                measured = [
                    {
                        "step": step,
                        "target_nll": {"sure": [nll], "conflict": [0.0], "unsure": [0.0]},
                        "target_kl": [forgotten],
                        "drift_nll": [1.0],
                        "drift_kl": [forgotten],
                    }
                    for step, (nll, forgotten) in enumerate(zip(target, kl, strict=True))
                ]
                name = study.Run(arm, loss, float(f"1e-{rate}"), 0).name
                runs[name] = {"measured": measured, "seconds": 60.0}
        none = {"sure": [1], "conflict": [0], "unsure": [0]}
        counts = {"target": none, "drift": [1]}
        return {"preset": "tiny", "runs": runs, "counts": counts}

    def short(self) -> dict[str, Any]:
        """At the low rate EAFT was stopped before it had learned as much as cross-entropy."""
        fast = ([2.0, 0.9], [0.0, 1.1])
        slow = {"sft": ([2.0, 1.0], [0.0, 0.2]), "eaft": ([2.0, 1.2], [0.0, 0.12])}
        return self.results(sft_2=fast, eaft_2=fast, sft_3=slow["sft"], eaft_3=slow["eaft"])

    def test_a_frontier_does_not_tell_who_was_trained_for_longer(self) -> None:
        """At 1.2 EAFT has forgotten 0.12, and cross-entropy 0.16; at 1.0 EAFT's is of the rate."""
        shown = report.verdicts(self.short(), "natural")
        assert "| 0.75 | 1.200 | 0.001, 0.01 |" in shown

    def test_all_rates_at_one_target_loss(self) -> None:
        shown = report.rates(self.short())
        assert "| cross-entropy (SFT), natural | 1.200 | 0.1600 | 0.8000 |" in shown
        assert "| EAFT, planted | 1.200 | 0.1200 | 0.8000 |" in shown
        assert report.rates(self.results(sft_2=([2.0, 1.0], [0.0, 1.0]))) == report.NOTHING


class TestWeights:
    def tokens(self, **changes: Any) -> weights.Tokens:
        """Sure and right, in conflict, unsure, in conflict, of 20 logits."""
        entropy = torch.tensor([0.1, 0.1, 0.7, 0.2]) * math.log(20)
        given: dict[str, Any] = {
            "nll": torch.tensor([0.05, 6.0, 2.0, 4.0]),
            "entropy": entropy,
            "labels": torch.tensor([5, 6, 7, 6]),
            "k": 20,
            "progress": 0.0,
            "generator": torch.Generator().manual_seed(0),
        }
        return weights.Tokens(**(given | changes))

    def test_shuffled_mutes_as_much(self) -> None:
        tokens = self.tokens()
        found = weights.shuffled(tokens)
        assert sorted(found.tolist()) == sorted(tokens.normalized_entropy.tolist())

    def test_random_mask_leaves_out_as_many(self) -> None:
        assert weights.random_mask(self.tokens()).sum() == 2

    def test_corner_is_soft_and_has_a_floor(self) -> None:
        found = weights.corner(self.tokens())
        assert found[1] == pytest.approx(0.1, abs=0.03)
        assert found[0] > 0.95 and found[2] > 0.95

    def test_alpha_falls(self) -> None:
        tokens = self.tokens()
        assert weights.falling(tokens).tolist() == pytest.approx(tokens.normalized_entropy.tolist())
        assert weights.falling(self.tokens(progress=1.0)).tolist() == [1.0] * 4

    def test_habits_count(self) -> None:
        memory: dict[str, torch.Tensor] = {}
        first = weights.habit(self.tokens(memory=memory))
        second = weights.habit(self.tokens(memory=memory))
        assert first.tolist() == [1.0, 0.0, 1.0, 0.0]
        assert second.tolist() == pytest.approx([1.0, 0.5, 1.0, 0.5])


class TestMuted:
    def results(self, dropping: list[list[float]]) -> dict[str, Any]:
        """Two seeds whose held-out loss comes down to 1.0 and 1.2, beside runs that drop rows."""
        shares = {0.0: [[2.0, 1.0], [2.0, 1.2]], 1e-3: dropping}
        runs = [
            {
                "seed": seed,
                "drop_below": share,
                "measured": [{"step": 50 * at, "nll": nll} for at, nll in enumerate(losses)],
                "steps": {"loss": [1.0] * 50, "dropped": [0.25 * (share > 0)] * 50},
            }
            for share, of_seeds in shares.items()
            for seed, losses in enumerate(of_seeds)
        ]
        return {
            "model": "one",
            "precision": "float32",
            "settings": {"rows_a_step": 1, "rates": [1e-4]},
            "machine": {"model": "", "cores": 2, "torch": "", "commit": "", "date": ""},
            "runs": {str(number): run for number, run in enumerate(runs)},
        }

    def test_within_what_seeds_differ_by(self) -> None:
        shown = report.muted(self.results([[2.0, 1.01], [2.0, 1.17]])).replace("\n", " ")
        assert "one seed differ by up to 0.0300, and seeds by up to 0.2000." in shown
        assert "within the range" in shown and "outside" not in shown
        assert "25.0 % of rows dropped" in shown

    def test_outside_of_it(self) -> None:
        shown = report.muted(self.results([[2.0, 1.3], [2.0, 1.25]])).replace("\n", " ")
        assert "outside the range of those without: 0.001 at step 50." in shown

    def test_seeds_that_ran_with_every_share(self) -> None:
        results = self.results([[2.0, 1.0], [2.0, 1.2]])
        del results["runs"]["3"]
        assert [len(runs) for runs in report.seeds_of(results).values()] == [1, 1]
        assert "one seed does not say" in report.muted(results).replace("\n", " ")
        del results["runs"]["2"]
        assert report.muted(results) == report.NOTHING


class TestKnowledge:
    def results(self, chosen: dict[str, str]) -> dict[str, Any]:
        """Eight questions, of which the base model answers four rightly."""
        runs: dict[str, Any] = {"base": {"chosen": "11110000"}}
        for name, answers in chosen.items():
            arm, loss, seed = name.split()
            runs[name] = {"arm": arm, "loss": loss, "seed": int(seed), "chosen": answers}
        machine = {"model": "", "cores": 2, "torch": "", "commit": "", "date": ""}
        return {"right": "1" * 8, "machine": machine, "runs": runs}

    def test_differences_are_of_the_same_questions(self) -> None:
        """One more and one fewer, for the first: other ones make no difference of the sums."""
        chosen = {"planted sft 0": "01111000", "planted eaft 0": "11111111"}
        shown = report.knowledge(self.results(chosen))
        assert "| the base model |  | 50.0 (12.5 to 87.5) |" in shown
        assert "| cross-entropy (SFT), planted | 1 | 50.0 | +0.0 (-37.5 to +37.5) |  |" in shown
        eaft = next(line for line in shown.splitlines() if line.startswith("| EAFT, planted"))
        assert "| 100.0 | +50.0 (" in eaft and eaft.count("+50.0 (") == 2
        assert "natural" not in shown

    def test_seeds_that_both_losses_ran_with(self) -> None:
        chosen = {"natural sft 0": "1" * 8, "natural eaft 0": "1" * 8, "natural sft 1": "0" * 8}
        shown = report.knowledge(self.results(chosen))
        assert "| EAFT, natural | 1 | 100.0 | +50.0" in shown
        assert report.knowledge({"runs": {}}) == report.NOTHING

    def test_nll_is_of_the_answer_alone(self, tmp_path: Path) -> None:
        """Whatever the order and the padding: the sum over the tokens behind the prompt."""
        from small_model import save_model
        from transformers import AutoModelForCausalLM

        save_model(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        generator = torch.Generator().manual_seed(0)
        lengths = [(9, 4), (3, 1), (30, 29), (5, 2)] * 5
        rows = [
            Example(torch.randint(3, 20, (length,), generator=generator).tolist(), prompt)
            for length, prompt in lengths
        ]
        found = knowledge.nll_of(model, rows, "float32")
        for row, nll in zip(rows, found, strict=True):
            tokens = torch.tensor(row.tokens)
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, row.prompt_length - 1 : -1]
            wanted = torch.nn.functional.cross_entropy(
                logits, tokens[row.prompt_length :], reduction="sum"
            )
            torch.testing.assert_close(nll.float(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", range(9))
def test_largest_that_fits(limit: int) -> None:
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= limit

    assert largest(fits, 7) == min(limit, 7)
    assert len(set(tried)) == len(tried) and max(tried) <= 7


def test_runs_have_names_of_their_own() -> None:
    for preset in study.PRESETS.values():
        names = [run.name for run in study.runs_of(preset)]
        assert len(set(names)) == len(names)
        assert {run.arm for run in study.runs_of(preset)} == {*study.ARMS, study.EDITED}


def test_steps_see_every_row_once_in_an_epoch() -> None:
    preset = study.PRESETS["tiny"]
    rows = [Example([10 + i] * 4, 2) for i in range(preset.rows)]
    masks = [torch.tensor([False, True, True, False])] * preset.rows
    batches, wrong = texts.steps_of(rows, masks, preset, "natural", seed=0)
    seen = [int(row[0]) for batch in batches for row in batch.input_ids]
    assert sorted(seen) == [10, 11, 12, 13] and wrong == 0
    planted, wrong = texts.steps_of(rows, masks, preset, "planted", seed=0)
    assert [b.input_ids.tolist() for b in planted] == [b.input_ids.tolist() for b in batches]
    changed = sum(int((a.labels != b.labels).sum()) for a, b in zip(batches, planted, strict=True))
    assert changed == wrong
    again, _ = texts.steps_of(rows, masks, preset, "planted", seed=0)
    assert [b.labels.tolist() for b in again] == [b.labels.tolist() for b in planted]


def test_edits_are_the_same_everywhere() -> None:
    """Where the mask holds, and a word is one of those that are most often there."""
    rows = [Example([5, *([7] * 40), *([9] * 30), 11]) for _ in range(2)]
    masks = [collate([row]).labels[0] != -100 for row in rows]
    masks[1][::2] = False
    words = texts.edits(rows, masks)
    assert words.tolist() == [[7, 9], [9, 11], [11, 7]]
    labels = torch.tensor([7, 9, 7, 3])
    changed = texts.edited(labels, torch.tensor([True, True, False, True]), words)
    assert changed.tolist() == [9, 11, 7, 3]
    preset = study.PRESETS["tiny"]
    batches, wrong = texts.steps_of(rows, masks, preset, study.EDITED, seed=0)
    assert wrong > 0
    assert {tuple(b.labels.shape) for b in batches} == {(2, len(rows[0].tokens))}


@pytest.mark.slow
def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model: what is done is not done again, and the page shows what the files say."""
    from small_model import save_model

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # set by what runs in processes

    model, data, output = (tmp_path / name for name in ("model", "data", "output"))
    save_model(model)
    data.mkdir()
    for file, count in ((texts.TRAIN, 8), (texts.TARGET, 4)):
        rows = ({"question": f"w{i + 3} w4", "answer": f"w5 w{i + 6}"} for i in range(count))
        (data / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (data / texts.DRIFT).write_text("w10 w11 w12 w13 " * 20)
    asked = [{"goal": f"w{i + 3}", "sol1": "w4 w5", "sol2": "w6"} for i in range(4)]
    (data / knowledge.QUESTIONS).write_text("".join(f"{json.dumps(one)}\n" for one in asked))
    (data / knowledge.RIGHT).write_text("0\n1\n0\n")

    def command(*arguments: object) -> int:
        return main(list(map(str, arguments)))

    given = ("--model", model, "--output", output)
    tiny = ("--preset", "tiny", "--jobs", 1)
    sizes: dict[str, tuple[object, ...]] = {
        "fidelity": ("--tokens", 200, "--rows", 16),
        "regions": ("--preset", "tiny"),
        "frontiers": tiny,
        "step": ("--length", 16, "--most", 1),
        "dropping": ("--preset", "tiny", "--tokens", 6, "--rounds", 1),
        "muted": tiny,
        "knowledge": tiny,
    }
    with pytest.raises(SystemExit, match="for each of the 4 questions"):
        command("knowledge", *tiny, *given, "--data", data)
    (data / knowledge.RIGHT).write_text("0\n1\n0\n1\n")
    for name, more in sizes.items():
        of_data = () if name == "step" else ("--data", data)
        assert command(name, *more, *given, *of_data) == 0
    results = json.loads((output / "paper-frontiers.json").read_text())
    runs = study.runs_of(study.PRESETS["tiny"])
    assert set(results["runs"]) == {run.name for run in runs}
    first = path_of(results, runs[0])
    assert first is not None and first.steps == [0, 1, 2]
    assert first.kl()[0] < 1e-4 < first.kl()[-1]
    assert first.target()[-1] < first.target()[0]
    assert report.comparison(results, "natural", "eaft") is not None

    tuned = json.loads((output / "paper-muted.json").read_text())["runs"]
    assert set(tuned) == {"seed0-0", "seed0-0.001", "seed1-0", "seed1-0.001"}
    for of_run in tuned.values():
        assert [one["step"] for one in of_run["measured"]] == [0, 1, 2]
        assert of_run["measured"][-1]["nll"] < of_run["measured"][0]["nll"]
        assert {len(curve) for curve in of_run["steps"].values()} == {2}

    answered = json.loads((output / knowledge.FILE).read_text())
    assert answered["right"] == "0101"
    assert len(answered["runs"]) == 1 + 2 * 2 * 2
    assert all(len(run["chosen"]) == 4 for run in answered["runs"].values())

    # As a user runs it.
    line = [sys.executable, ROOT / "benchmarks" / "paper", "frontiers", *given, "--data", data]
    again = subprocess.run(list(map(str, [*line, *tiny])), capture_output=True, text=True)
    assert f"0 of {len(runs)} runs to do" in again.stdout, again.stderr
    with pytest.raises(SystemExit, match="choose another --output"):
        command("frontiers", "--preset", "small", *given, "--data", data)

    (tmp_path / "docs").mkdir()
    for page in ("docs/paper.md", "README.md"):
        (tmp_path / page).write_text((ROOT / page).read_text())
    shown = ("--results", output, "--root", tmp_path)
    assert command("page", *shown) == command("page", *shown, "--check") == 0
    text = (tmp_path / "docs" / "paper.md").read_text()
    assert f"{first.target()[0]:.3f}" in text
    (tmp_path / "docs" / "paper.md").write_text(text.replace(f"{first.target()[0]:.3f}", "0.000"))
    with pytest.raises(SystemExit, match="does not show"):
        command("page", *shown, "--check")
