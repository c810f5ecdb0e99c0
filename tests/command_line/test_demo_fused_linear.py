"""The demo with ``--fused-linear``: its loss, the memory it takes, and models it cannot train."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from demo_tiny_model import VOCABULARY, Demo, base, demo, tiny_folder
from peak_memory import MARK, measured

import eaft_ext
from eaft_ext.cli import batches
from eaft_ext.cli import model as models
from eaft_ext.cli.demo import losses, memory, training
from eaft_ext.cli.errors import CommandError

__all__ = ["base", "demo", "tiny_folder"]

WORDS, TOKENS = 30_000, 512


def print_memory(device: str) -> None:
    """Print what the output layer and the loss take at their peak; on a CPU in float32."""
    models.cpu_multiplies_bfloat16 = lambda: False
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    net = transformers.LlamaForCausalLM(config).to(device)
    ids = torch.randint(WORDS, (2, TOKENS // 2), device=device)
    found = memory.measure(net, batches.Batch(ids, ids), k=20)
    assert isinstance(found, memory.LossMemory)
    assert found.fused.gradients == found.unfused.gradients
    assert all(parameter.grad is None for parameter in net.parameters())
    print(MARK + json.dumps({"fused": found.fused.beyond, "unfused": found.unfused.beyond}))


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
                    # The tiny model is never sure, so that there are no such losses.
                    none = {"conflict_loss", "sure_loss"}
                    for number in found.keys() - {"seconds", "difference"} - none:
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
        """In a process of its own: what earlier tests freed and kept would not be seen."""
        if device == "cpu" and not os.access(memory.CLEAR_REFS, os.W_OK):
            pytest.skip("needs the peak of resident memory, and to reset it, as Linux allows")
        found = measured(__file__, f"print_memory({device!r})")
        row = WORDS * (2 if device == "cuda" else 4)
        weights = WORDS * 16 * 2 * 2 if device == "cuda" else 0  # in bfloat16, with a gradient
        slack = 6 * memory.MiB
        assert abs(found["fused"] - weights - losses.CHUNK_TOKENS * row) <= slack
        assert abs(found["unfused"] - weights - TOKENS * row) <= slack

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
        assert "(softcap 30.0, scale 1.0)" in error
        assert error.count("\n") == 1
        assert demo(*capped)[0] == 0

    def test_logits_from_elsewhere_are_refused(self, base: Any) -> None:
        ids = torch.arange(20).reshape(2, 10)
        batch = batches.Batch(ids, ids)
        losses.check_output_layer(base, batch)
        scaled = base.lm_head.register_forward_hook(lambda layer, inputs, output: 2 * output)
        with pytest.raises(CommandError, match="are not the output layer's product"):
            losses.check_output_layer(base, batch)
        scaled.remove()
        base.register_forward_hook(
            lambda net, inputs, output: type(output)(logits=1.1 * output.logits)
        )
        with pytest.raises(
            CommandError, match="logits of LlamaForCausalLM are not the output layer"
        ):
            losses.check_output_layer(base, batch)
        base.lm_head = torch.nn.Sequential(base.lm_head)
        with pytest.raises(CommandError, match="LlamaForCausalLM has no linear output layer"):
            losses.check_output_layer(base, batch)
