"""Megatron-Core without logits: losses and every gradient are those of use_gated_ce."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peak_memory import all_measured, measure
from spawned import leave, run_processes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORKER = Path(__file__).with_name("megatron_linear_worker.py")
TIMEOUT = 400
MISSING = importlib.util.find_spec("megatron") is None
pytestmark = pytest.mark.skipif(
    MISSING, reason="needs megatron-core: pip install '.[test,megatron]'"
)

Results = list[tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """(number of processes, what one of them saved), with 1 and with 2."""
    return [
        (n, of_rank)
        for n in (1, 2)
        for of_rank in run_processes(
            WORKER, n, tmp_path_factory.mktemp(f"linear{n}"), timeout=TIMEOUT, folders=[EXAMPLES]
        )
    ]


STEPS = ["plain", "tied", "mtp", "mtp, tied"]
NUM_LOSSES = {"mtp": 3, "mtp, tied": 2, "sequence parallel, mtp": 3}
PARTS = ["sequence parallel", "sequence parallel, tied", "sequence parallel, mtp"]


def of_case(results: Results, case: str) -> list[dict[str, Any]]:
    """What the processes found that have the case: of sequence parallelism there are two."""
    found = [of_rank[case] for _, of_rank in results if case in of_rank]
    assert len(found) == (2 if case.startswith("sequence parallel") else 3)
    return found


@pytest.mark.parametrize("case", [*STEPS, *PARTS, "half"])
def test_losses_and_gradients_are_those_of_the_logits(results: Results, case: str) -> None:
    for found in of_case(results, case):
        if "refused" in found:
            assert re.match(r"TypeError: use_linear_gated_ce: .* uses its logits", found["refused"])
            continue
        logits, hidden = found["logits"], found["hidden"]
        assert set(logits["output"]) == {"Tensor"} and set(hidden["output"]) == {"NoLogits"}
        assert len(hidden["output"]) == len(logits["output"]) == NUM_LOSSES.get(case, 1)
        for what in ("losses", "stats"):
            torch.testing.assert_close(hidden[what], logits[what], rtol=1e-5, atol=1e-5)
        assert hidden["losses"].shape == (3, 16) and not hidden["losses"][0, 3]
        assert len(hidden["gradients"]) >= 20
        rounding = 1e-2 if case == "half" else 1e-5
        for name, expected in logits["gradients"].items():
            gradient = hidden["gradients"][name]
            assert expected is not None and gradient.dtype == expected.dtype, name
            error = (gradient.double() - expected.double()).norm() / expected.double().norm()
            assert expected.any() and error < rounding, name


@pytest.mark.parametrize("case", ["main_grad", "main_grad, tied", "sequence parallel, main_grad"])
def test_gradients_arrive_in_main_grad(results: Results, case: str) -> None:
    """Of two micro-batches, and where the output layer would have added its own there."""
    for found in of_case(results, case):
        for how in ("hidden", "fused"):
            for name, expected in found["logits"].items():
                torch.testing.assert_close(found[how][name], expected, rtol=1e-4, atol=1e-5)
                assert expected.any(), name


def test_it_comes_and_goes(results: Results) -> None:
    for found in of_case(results, "removal"):
        assert found["clean"]
        for name in ("removed", "after the block"):
            assert torch.equal(found[name], found["megatron"])
        assert torch.equal(found["logits, meanwhile"], found["logits"])
        assert not torch.allclose(found["5"], found["20"])
        for name in ("5, evaluated", "5, again"):
            assert torch.equal(found[name], found["5"]), name
        torch.testing.assert_close(found["20, linear"], found["20"])


def test_stages(results: Results) -> None:
    for found in of_case(results, "stages"):
        torch.testing.assert_close(*found["losses"])
        assert found["stats"] and found["hidden"] == (16, 3, 32)


def test_errors(results: Results) -> None:
    op = "use_linear_gated_ce: "
    layer = f"{op}the output layer of GPTModel "
    for found in of_case(results, "errors"):
        assert found["untouched"]
        beginnings = {
            "deferred": f"ValueError: {layer}has defer_embedding_wgrad_compute",
            "other": f"TypeError: {layer}must be a ColumnParallelLinear of Megatron-Core, "
            "got torch.nn.modules.linear.Linear",
            "biased": f"ValueError: {layer}leaves its bias to others",
            "fused": f"ValueError: {op}GPTModel computes its loss without logits",
            "k": f"ValueError: {op}k must be from 2 to 128",
            "chunk_size": f"ValueError: {op}chunk_size must be",
            "logits": f"TypeError: {op}GPTModel gave its loss other logits",
            "used": f"TypeError: {op}the model uses its logits (float) before its loss",
        }
        for name, beginning in beginnings.items():
            assert found[name].startswith(beginning), found[name]


def test_what_would_be_another_loss_is_refused(results: Results) -> None:
    op = "use_linear_gated_ce: "
    layer = f"TypeError: {op}the output layer of GPTModel "
    used = f"TypeError: {op}the model uses its logits "
    beginnings = {
        "scaled": f"{used}(mul) before its loss",
        "cut": f"{used}(getitem) before its loss",
        "capped in a hook": f"{used}(tanh) before its loss",
        "kept": f"{used}(pickle) before its loss",
        "capped": f"{layer}has another forward than ColumnParallelLinear",
        "capped later": f"{layer}has another forward than ColumnParallelLinear",
        "sharded": f"{layer}is sharded by FSDP2",
        "sharded later": f"{layer}is sharded by FSDP2",
        "replaced": f"{layer}has another forward than its class",
        "own loss": f"TypeError: {op}GPTModel was called with labels, and did not call its output "
        "layer",
        "bert": f"TypeError: {op}the forward of BertModel has no argument of the name labels",
    }
    for found in of_case(results, "logits used"):
        assert found.keys() == beginnings.keys()
        for name, beginning in beginnings.items():
            assert found[name].startswith(beginning), (name, found[name])


def test_a_loss_in_a_call_without_labels(results: Results) -> None:
    for found in of_case(results, "own labels"):
        assert found["logits"].shape == (3, 16)
        assert torch.equal(found["hidden"], found["logits"])


def test_removal_below_other_forwards(results: Results) -> None:
    for found in of_case(results, "wrapped"):
        assert torch.equal(found["removed"], found["megatron"]) and found["fusion"]
        assert not torch.allclose(found["5"], found["megatron"])


VOCAB_SIZE, TOKENS = 150_016, 512


def measure_step(how: str) -> None:
    """A forward and backward of 512 tokens, of a vocabulary of 150,016."""
    sys.path.append(str(EXAMPLES))
    import megatron_linear_worker as worker

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    worker.start(1)
    model = worker.build_model(vocab_size=VOCAB_SIZE)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)  # as main_grad is there before
    worker.USES[how](model)
    tokens = torch.randint(VOCAB_SIZE, (1, TOKENS + 1))
    position_ids = torch.arange(TOKENS)[None]

    def step() -> None:
        losses = model(tokens[:, :-1], position_ids, attention_mask=None, labels=tokens[:, 1:])
        losses.mean().backward()

    measure(step)
    torch.distributed.destroy_process_group()
    leave()


@pytest.mark.slow
def test_memory(record_property: Any) -> None:
    """The logits of a chunk of tokens are held, not those of all tokens and their gradient."""
    calls = {how: f"measure_step({how!r})" for how in ("logits", "hidden")}
    found = all_measured(__file__, calls, record_property)
    logits = 4 * TOKENS * VOCAB_SIZE
    assert found["logits"]["bytes"] > 2 * logits
    assert found["hidden"]["bytes"] < 0.5 * found["logits"]["bytes"]
