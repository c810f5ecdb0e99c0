"""``eaft-ext bench``: what it compares is measured, and is the same loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import eaft_ext
from eaft_ext.cli import bench
from eaft_ext.cli.main import main

SMALL = ["bench", "--device", "cpu", "--tokens", "8", "--vocabulary", "300", "--rounds", "3"]


def _rows(out: str) -> dict[str, list[str]]:
    """The lines of the table, by their first column."""
    lines = [line for line in out.splitlines()[2:] if line]
    width = len(lines[0]) - len(lines[0].lstrip())
    assert width == 0
    return {line[:30].strip(): line[30:].split() for line in lines}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_small_run(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    assert main([*SMALL, "--dtype", dtype, "--k", "8"]) == 0
    out = capsys.readouterr().out
    assert f"logits 8 x 300 {dtype}, k = 8" in out and "median of 3" in out
    rows = _rows(out)
    losses = [rows[name][-1] for name in rows if name.startswith("gated_ce")]
    assert len(losses) == 3 and len(set(losses)) == 1
    assert float(rows["eager EAFT"][-1]) == pytest.approx(float(losses[0]), rel=1e-5)
    assert float(rows["F.cross_entropy (no gate)"][-1]) > float(losses[0])
    assert rows["gated_ce"][1] == "1.00"
    assert all(float(row[0]) >= 0 for row in rows.values())


def test_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of each of ours, and that each has a gradient in every round."""
    calls: list[tuple[int, dict[str, Any]]] = []
    gradients: list[Tensor] = []

    def recorded(logits: Tensor, labels: Tensor, k: int, **options: Any) -> Tensor:
        if logits.requires_grad:  # not where the option is checked
            calls.append((k, options))
            logits.register_hook(gradients.append)
        loss: Tensor = original(logits, labels, k, **options)
        return loss

    original: Any = eaft_ext.gated_ce
    monkeypatch.setattr(eaft_ext, "gated_ce", recorded)
    assert main([*SMALL, "--k", "8"]) == 0
    rounds = 1 + 3
    expected = [(8, {}), (8, {"inplace_backward": True}), (8, {"gradient_in_forward": True})]
    assert calls == expected * rounds
    assert len(gradients) == len(calls)


def test_others_have_a_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[Tensor] = []

    def recorded(function: Any) -> Any:
        def loss(logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
            logits.register_hook(gradients.append)
            value: Tensor = function(logits, labels, *rest)
            return value

        return loss

    monkeypatch.setattr(bench, "eager_eaft", recorded(bench.eager_eaft))
    found = bench.contenders(20)
    plain = next(c for c in found if c.title.startswith("F.cross_entropy"))
    plain.loss = recorded(plain.loss)
    bench.measure(found, 4, 50, torch.float32, torch.device("cpu"), 1)
    assert len(gradients) == 2 * 2


def test_the_workspace_is_restored() -> None:
    """What overwrites the logits gets them anew in each round: its loss stays what it was."""
    (inplace,) = (contender for contender in bench.contenders(20) if contender.overwrites)
    values = []

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = original(logits, labels)
        values.append(loss.item())
        return loss

    original, inplace.loss = inplace.loss, watched
    bench.measure([inplace], 4, 50, torch.float32, torch.device("cpu"), 4)
    assert len(values) == 5 and len(set(values)) == 1
    assert len(inplace.seconds) == 4


def test_what_does_not_fit_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def eager(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "eager_eaft", eager)
    assert main(SMALL) == 0
    assert _rows(capsys.readouterr().out)["eager EAFT"][:3] == ["out", "of", "memory"]
    for tokens in ("9" * 12, "9" * 18):
        assert main(["bench", "--device", "cpu", "--tokens", tokens]) == 1
        assert capsys.readouterr().err == (
            f"eaft-ext bench: {tokens} tokens of 151936 words do not fit on cpu: pass fewer "
            "--tokens\n"
        )


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(*_: object) -> Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(bench, "eager_eaft", eager)
    with pytest.raises(RuntimeError, match="something else"):
        main(SMALL)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--vocabulary", "1", "expected a whole number from 2, got '1'"),
        ("--tokens", "0", "expected a whole number from 1, got '0'"),
        ("--k", "129", "k must be"),
        ("--dtype", "float64", "invalid choice: 'float64'"),
        ("--device", "nowhere", "'nowhere' cannot be used"),
        ("--device", "meta", "'meta' cannot be used: it computes nothing"),
    ],
)
def test_options(
    capsys: pytest.CaptureFixture[str], option: str, value: str, complaint: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", option, value])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_eager_eaft() -> None:
    """Written out for one token: p = (1/2, 1/4, 1/4), k = 2."""
    logits = torch.tensor([[math.log(2), 0.0, 0.0], [5.0, 5.0, 5.0]])
    labels = torch.tensor([1, -100])
    q = torch.tensor([2 / 3, 1 / 3])
    gate = -(q * q.log()).sum() / math.log(2)
    expected = gate * math.log(4)
    torch.testing.assert_close(bench.eager_eaft(logits, labels, 2), expected)
    torch.testing.assert_close(bench.eager_eaft_sum(logits, labels, 2), expected)
