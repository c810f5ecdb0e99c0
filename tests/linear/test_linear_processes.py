"""The linear loss over several processes: a vocabulary in shards, DTensors, FSDP2's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import HIDDEN, V, linear_inputs
from linear_worker import DROPPING, ERRORS, OPTIONS, UNEVEN, own_rows, placements_of, scalar
from spawned import Runs, by_size
from torch import Tensor

import eaft_ext

Results = dict[int, list[dict[str, Any]]]

WORKER = Path(__file__).with_name("linear_worker.py")
WORLD_SIZES = (1, 2, 3, 4)
SHARDS = [
    (n, kind)
    for n in WORLD_SIZES
    for kind in ("even", "parts", "uneven")
    if kind != "uneven" or n in UNEVEN
]
NAMES = ("hidden", "weight", "bias")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process saved, for each number of processes."""
    return Runs(WORKER, tmp_path_factory)


def _alone(option: str) -> dict[str, Any]:
    """The unfused loss of one process; the linear one where tokens are dropped."""
    *leaves, labels = linear_inputs()
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    options = {"return_stats": True} | (OPTIONS | DROPPING)[option]
    if option in DROPPING:
        loss, stats = eaft_ext.linear_gated_ce(hidden, weight, labels, bias, **options)
        assert stats.dropped is None or 0 < stats.dropped.sum() < len(labels)
    else:
        options.pop("chunk_size", None)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        loss, stats = eaft_ext.gated_ce(logits, labels, **options)
    scalar(loss).backward()
    gradients = dict(zip(NAMES, (leaf.grad for leaf in (hidden, weight, bias)), strict=True))
    return {"loss": loss.detach(), "stats": stats, **gradients}


def _close(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}"
    )


def _compare(found: dict[str, Any], expected: dict[str, Any], *names: str) -> None:
    for name in ("loss", *names):
        _close(found[name], expected[name], name)
    for name, a, b in zip(
        eaft_ext.TokenStats._fields, found["stats"], expected["stats"], strict=True
    ):
        _close(a, b, name)


@pytest.mark.parametrize("option", [*OPTIONS, *DROPPING])
@pytest.mark.parametrize(("world_size", "kind"), by_size(SHARDS))
def test_shards(results: Results, world_size: int, kind: str, option: str) -> None:
    expected = _alone(option)
    parts = [of_process[f"{kind} {option}"] for of_process in results[world_size]]
    for rank, found in enumerate(parts):
        start, stop, _ = own_rows(rank, world_size, kind)
        words = min(stop, V) - start
        for name in ("weight", "bias"):
            _close(found[name][:words], expected[name][start:stop], name)
            # The gradient of padding is 0, whatever stands there.
            assert not found[name][words:].any()
        _compare(found, expected, *(() if kind == "parts" else ("hidden",)))
        assert torch.equal(found["loss"], parts[0]["loss"])
    _close(
        sum(p["hidden"] for p in parts) / (1 if kind == "parts" else world_size),
        expected["hidden"],
        "hidden",
    )


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["even", "parts"])
def test_collectives(results: Results, kind: str, option: str) -> None:
    """An all-gather for each chunk; of the hidden's gradient one all-reduce, if any."""
    labels = linear_inputs()[-1]
    tokens = int((labels != -100).sum())
    chunks = -(-tokens // OPTIONS[option].get("chunk_size", tokens))
    calls = 2 if option == "family_own_gate" else 1  # the z-loss is then a loss of its own
    forward, backward = results[2][0][f"{kind} {option}"]["collectives"]
    both = forward + backward
    # Losses per token and gates of one's own compute the logits again, and tell nothing again.
    expected = {"gloo:all_gather": calls * chunks}
    expected |= {"gloo:all_reduce": calls} if kind == "even" else {}
    assert both == expected


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("world_size", "placement"),
    by_size((n, name) for n in WORLD_SIZES for name in placements_of(n)),
)
def test_dtensors(results: Results, world_size: int, placement: str, option: str) -> None:
    expected = _alone(option)
    for of_process in results[world_size]:
        _compare(of_process[f"{placement} {option}"], expected, *NAMES)


@pytest.mark.parametrize("how", ["inside", "outside"])
@pytest.mark.parametrize("world_size", by_size(WORLD_SIZES))
def test_fsdp(results: Results, world_size: int, how: str) -> None:
    """Inside the module FSDP2 unshards; outside of it the loss gathers the weight itself."""
    _, weight, bias, _ = linear_inputs(seed=0)
    means = [torch.zeros(V, HIDDEN), torch.zeros(V)]
    for rank, of_process in enumerate(results[world_size]):
        hidden, _, _, labels = linear_inputs(seed=rank)
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
        loss = eaft_ext.gated_ce(torch.nn.functional.linear(*leaves), labels)
        of_hidden, *of_parameters = torch.autograd.grad(loss, leaves)
        found = of_process[f"fsdp {how}"]
        _close(found["loss"], loss.detach(), "loss")
        _close(found["hidden"], of_hidden, "hidden")
        for mean, part in zip(means, of_parameters, strict=True):
            mean += part / world_size
    for of_process in results[world_size]:
        for name, mean in zip(("weight", "bias"), means, strict=True):
            _close(of_process[f"fsdp {how}"][name], mean, name)


SENTENCES = {
    "tokens": "differ in the shape of the tokens: [13] in process 0, [12] in process 1",
    "ignored": "differ in the number of tokens not ignored",
    "labels": "the labels at position [7] differ",
    "outside": "the label at position [9] is 50, in no shard and not ignore_index -100",
    "chunk_size": "differ in chunk_size: None in process 0, 4 in process 1",
    "gradient": "differ in whether the hidden has a gradient: True in process 0, False",
    "bad_weight": "weight must be (V, H) with V of at least 0 and H = 16",
    # That of Megatron #7452, of a weight.
    "whole_weight": f"ValueError: vocab_parallel_linear_gated_ce: processes [0, 1] have the same "
    f"numbers for {V} words, and all labels are below {V}: these are no shards of {2 * V} words; "
    "a whole weight is for eaft_ext.linear_gated_ce",
    "no_size": "vocab_start goes with vocab_size",
    "reduce": "differ in reduce_hidden_gradient: True in process 0, False in process 1",
    "forward_mode": "RuntimeError: vocab_parallel_linear_gated_ce: torch.func and forward mode",
    "dtype": "TypeError: vocab_parallel_linear_gated_ce: weight is torch.bfloat16 and hidden",
    "hidden_dtype": "differ in the dtype of the hidden: torch.float32 in process 0",
    "labels_of_two_dimensions": "the labels at position [2, 1] differ",
    "dtensor_k": "linear_gated_ce: process 1 failed: k must be from 2 to 128, or None for all, got",
    "dtensor_labels": "linear_gated_ce: process 1 failed: labels must have the shape of the hidden",
    "dtensor_chunk_size": "differ in chunk_size: None in process 0, 4 in process 1",
    "dtensor_bias": "bias must be placed as the weight is",
    "meshes": "hidden, weight and bias must be on one mesh",
    "divided_features": "the last dimension of the hidden must not be divided",
    "dtensor": "TypeError: vocab_parallel_linear_gated_ce: weight_shard is a DTensor",
    "placement": "weight must be Shard(0) on one dimension of its mesh",
    "half": "TypeError: linear_gated_ce: with a DTensor as hidden, weight and bias must be",
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_is_wrong_is_said_in_all_processes(results: Results, what: str) -> None:
    for rank, of_process in enumerate(results[2]):
        sentence = SENTENCES[what]
        if rank == 1 and "process 1 failed: " in sentence:  # it says so itself
            sentence = sentence.replace("process 1 failed: ", "")
        assert sentence in of_process[f"error {what}"]


def test_a_few_words_in_two_shards(results: Results) -> None:
    """H is of all words where there are fewer than k; for any gate, and without kernels."""
    hidden, weight, _, labels = linear_inputs(vocab_size=10)
    expected = eaft_ext.reference.linear_gated_ce(hidden, weight, labels)
    for of_process in results[2]:
        for found in of_process["few words"]:
            _close(found, expected, "loss")


def test_uneven_shards_have_as_many_chunks(results: Results) -> None:
    """By default too, where one of them alone would have other chunks."""
    hidden, weight, _, labels = linear_inputs(2000, 9000, hidden_size=2)
    expected = eaft_ext.gated_ce(hidden @ weight.t(), labels)
    for of_process in results[2]:
        _close(of_process["uneven chunks"], expected, "loss")


def test_a_sharded_weight_of_another_dtype(results: Results) -> None:
    """It is gathered as the hidden is, also under autocast; its gradient has its own dtype."""
    for of_process in results[2]:
        for name, dtype in of_process["dtypes of the gradient"].items():
            assert dtype == torch.float32, name
        assert of_process["gathered"] == {
            "bfloat16": [torch.bfloat16],
            "autocast": [torch.bfloat16],
            "float32": [torch.float32],
        }
