"""The demo: whole runs on a tiny model, what they measure, and how they are compared."""

import csv
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from demo_tiny_model import Demo, base, demo, save_tiny_model, tiny_folder, tokenizer

import eaft_ext
from eaft_ext.cli import batches
from eaft_ext.cli.demo import training
from eaft_ext.cli.demo.evaluation import Evaluation, Evaluator
from eaft_ext.cli.demo.progress import Progress
from eaft_ext.cli.demo.results import at_equal_loss
from eaft_ext.cli.model import forward
from eaft_ext.cli.records import Record

__all__ = ["base", "demo", "tiny_folder", "tokenizer"]

Texts = tuple[list[batches.Batch], list[batches.Batch]]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of my own text." for i in range(50)))
    return path


class TestWholeRun:
    def test_leaves_table_plot_and_numbers(
        self, demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, results = demo()
        assert status == 0
        printed = capsys.readouterr().out
        for name in ("SFT", "EAFT"):
            run = results["runs"][name]
            assert [step["step"] for step in run["steps"]] == [1, 2]
            assert [point["step"] for point in run["evaluations"]] == [0, 1, 2]
            last = run["evaluations"][-1]
            assert last["target_loss"] < results["base"]["target_loss"]
            assert last["drift_kl"] > 0
            assert f"{last['target_loss']:.4f}" in printed
            assert f"{last['drift_kl']:.4f}" in printed
            assert f"{name:<5} step 2/2" in printed
        assert results["runs"]["SFT"]["steps"][0]["gate"] == 1
        assert 0 < results["runs"]["EAFT"]["steps"][0]["gate"] < 1
        # Both start from the same model and see the same batch first.
        first = [results["runs"][name]["steps"][0]["nll"] for name in ("SFT", "EAFT")]
        assert first[0] == pytest.approx(first[1], rel=1e-6)
        assert results["largest_difference"] <= training.TOLERANCE
        assert not results["interrupted"]

        with (tmp_path / "out" / "steps.csv").open(newline="") as stream:
            lines = list(csv.DictReader(stream))
        assert [(line["run"], line["step"]) for line in lines] == [
            (name, step) for name in ("SFT", "EAFT") for step in "012"
        ]
        assert float(lines[2]["drift_kl"]) == results["runs"]["SFT"]["evaluations"][2]["drift_kl"]
        assert lines[0]["loss"] == ""
        plot = (tmp_path / "out" / "plot.png").read_bytes()
        assert plot.startswith(b"\x89PNG") and len(plot) > 20_000

    @pytest.mark.slow
    def test_same_seed_gives_the_same_numbers(self, demo: Demo, text_file: Path) -> None:
        def numbers(results: Any) -> list[Any]:
            return [
                [{k: v for k, v in step.items() if k != "seconds"} for step in run["steps"]]
                + run["evaluations"]
                for run in results["runs"].values()
            ]

        own = ("--data", str(text_file))
        _, first = demo(*own, "--seed", "3", output="first")
        _, again = demo(*own, "--seed", "3", output="again")
        _, other = demo(*own, "--seed", "4", output="other")
        assert numbers(first) == numbers(again)
        assert numbers(first) != numbers(other)

    def test_options_reach_the_run(self, demo: Demo, text_file: Path) -> None:
        status, results = demo(
            *("--data", str(text_file), "--drift-data", str(text_file), "--k", "5"),
            *("--steps", "3", "--batch-size", "4", "--sequence-length", "16"),
        )
        assert status == 0
        steps = results["runs"]["EAFT"]["steps"]
        assert len(steps) == 3
        assert steps[0]["tokens"] == 4 * 15
        assert all(step["entropy"] <= torch.tensor(5.0).log() for step in steps)
        assert results["texts"]["target"] == "own.txt"
        assert results["texts"]["drift"].startswith("own.txt")

    def test_answers_alone_are_learned_from_jsonl(self, demo: Demo, tmp_path: Path) -> None:
        data = tmp_path / "qa.jsonl"
        lines = [{"question": f"What is {i}?", "answer": str(i)} for i in range(20)]
        data.write_text("\n".join(map(json.dumps, lines)))
        status, results = demo("--data", str(data), "--batch-size", "2")
        assert status == 0
        # One or two digits and the end of text, in two rows.
        assert all(4 <= step["tokens"] <= 6 for step in results["runs"]["SFT"]["steps"])

    @pytest.mark.parametrize(
        "options", [(), pytest.param(("--fused-linear",), marks=pytest.mark.slow)]
    )
    @pytest.mark.parametrize(("when", "steps"), [(("SFT", 1), [1]), (("EAFT", 1), [2, 1])])
    def test_control_c_keeps_what_is_done(
        self,
        demo: Demo,
        text_file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        when: tuple[str, int],
        steps: list[int],
        options: tuple[str, ...],
    ) -> None:
        update = Progress.update

        def interrupt(self: Progress, run: training.Run) -> None:
            update(self, run)
            if (run.name, len(run.steps)) == when:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Progress, "update", interrupt)
        # A process started in the background ignores the signal.
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            status, results = demo("--data", str(text_file), *options)
        finally:
            signal.signal(signal.SIGINT, inherited)
        assert status == 130
        assert results["interrupted"]
        assert [len(run["steps"]) for run in results["runs"].values()] == steps
        assert (tmp_path / "out" / "plot.png").stat().st_size > 20_000
        assert "Interrupted" in capsys.readouterr().out

    def test_control_c_before_anything_is_measured(
        self, demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(name: str | None) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("eaft_ext.cli.demo.command.load", interrupted)
        assert demo() == (130, None)
        assert capsys.readouterr().err == "eaft-ext: interrupted\n"

    @pytest.mark.parametrize(
        ("options", "function"),
        [
            ((), "gated_ce"),
            pytest.param(("--fused-linear",), "linear_gated_ce", marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.parametrize("error", [1e-4, float("nan")])
    def test_a_loss_unlike_the_reference_stops_the_run(
        self,
        demo: Demo,
        text_file: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: float,
        options: tuple[str, ...],
        function: str,
    ) -> None:
        reference = eaft_ext.reference.gated_ce
        monkeypatch.setattr(
            eaft_ext.reference, "gated_ce", lambda *args, **kw: reference(*args, **kw) * (1 + error)
        )
        status, results = demo("--data", str(text_file), *options)
        assert status == 1
        assert f"SFT, step 1: {function} gives" in capsys.readouterr().err
        assert len(results["runs"]["SFT"]["steps"]) == 1

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["--data", "absent.jsonl"], "cannot read absent.jsonl: No such file or directory"),
            (["--sequence-length", "129"], "--sequence-length 129 is above the model's limit"),
            (["--model", "./no-such-folder"], "cannot load --model ./no-such-folder: "),
        ],
    )
    def test_bad_input_is_one_sentence(
        self, demo: Demo, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
    ) -> None:
        assert demo(*options) == (1, None)
        error = capsys.readouterr().err
        assert error.startswith(f"eaft-ext demo: {complaint}")
        assert error.count("\n") == 1


class TestEvaluation:
    @pytest.fixture
    def texts(self, tokenizer: Any) -> Texts:
        def made(text: str) -> list[batches.Batch]:
            return batches.evaluation_batches(
                [Record(text)], tokenizer, batch_size=2, length=24, max_tokens=100
            )

        return made("the order of the class " * 9), made("a statement is executed " * 9)

    def test_measures_loss_and_divergence(self, base: Any, texts: Texts, tmp_path: Path) -> None:
        save_tiny_model(tmp_path, seed=1)
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
        target, drift = texts
        found = Evaluator(base, target, drift, k=20).measure(other, step=7)

        def rows(net: Any, made: list[batches.Batch]) -> torch.Tensor:
            logits = torch.cat([forward(net, batch)[batch.labels != -100] for batch in made])
            return logits.double().log_softmax(-1)

        def labels(made: list[batches.Batch]) -> torch.Tensor:
            return torch.cat([batch.labels[batch.labels != -100] for batch in made])

        nll = torch.nn.functional.nll_loss
        p, q = rows(base, drift), rows(other, drift)
        assert found.step == 7
        assert found.target_loss == pytest.approx(nll(rows(other, target), labels(target)).item())
        assert found.drift_loss == pytest.approx(nll(q, labels(drift)).item())
        assert found.drift_kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)

    def test_base_has_not_drifted(self, base: Any, texts: Texts) -> None:
        evaluator = Evaluator(base, *texts, k=20)
        again = evaluator.measure(base, step=0)
        assert again.drift_kl == pytest.approx(0, abs=1e-6)
        assert again.target_loss == evaluator.base.target_loss
        assert again.drift_loss == evaluator.base.drift_loss

    def test_conflicts_are_those_of_the_base_model(self) -> None:
        """Of three tokens one is improbable and sure, one improbable, one sure."""

        class Fixed(torch.nn.Module):
            def __init__(self, rows: list[list[float]]) -> None:
                super().__init__()
                self.rows = torch.tensor([rows])

            def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
                return SimpleNamespace(logits=self.rows.clone())

        sure, unsure = [9.0, 0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0, -2.0]
        labels = torch.tensor([[1, 4, 0, -100]])
        text = [batches.Batch(torch.zeros_like(labels), labels)]
        evaluator = Evaluator(Fixed([sure, unsure, sure, sure]), text, text, k=5)
        assert evaluator.conflicts() == 1
        assert evaluator.base.conflict_loss == pytest.approx(9.0, abs=1e-3)
        tuned = evaluator.measure(Fixed([[3.0, 0.0, 0.0, 0.0, 0.0], unsure, sure, sure]), step=1)
        assert tuned.conflict_loss == pytest.approx(math.log(math.exp(3) + 4), abs=1e-5)


class TestEqualLoss:
    @staticmethod
    def run(name: str, *points: tuple[float, float]) -> training.Run:
        return training.Run(
            name,
            evaluations=[
                Evaluation(i, loss, None, None, 0.0, kl) for i, (loss, kl) in enumerate(points)
            ],
        )

    def test_drift_is_interpolated_at_the_lowest_common_loss(self) -> None:
        found = at_equal_loss(
            [
                self.run("SFT", (3.0, 0.0), (2.0, 0.4), (1.0, 0.6)),
                self.run("EAFT", (3.0, 0.0), (2.0, 0.1), (1.5, 0.3)),
            ]
        )
        assert found.target_loss == 1.5
        assert found.drift_kl == pytest.approx({"SFT": 0.5, "EAFT": 0.3})

    @pytest.mark.parametrize(
        "points",
        [[(3.0, 0.0)], [(3.0, 0.0), (3.5, 0.2)], []],
        ids=["not measured yet", "learned nothing", "not begun"],
    )
    def test_nothing_to_compare(self, points: list[tuple[float, float]]) -> None:
        full = self.run("SFT", (3.0, 0.0), (2.0, 0.4))
        assert at_equal_loss([full, self.run("EAFT", *points)]) is None
        assert at_equal_loss([full]) is None
