"""The loss over a divided vocabulary in real processes, which exchange by gloo on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import same_bits, upstream_of
from parity import Outcome, outcome
from spawned import by_size, run_all
from torch import Tensor
from vocab_parallel_cases import CASES, NUM_ROWS, WORDS, Case, cases_of
from vocab_parallel_errors import ONE_ERRS, errors_of
from vocab_parallel_worker import (
    COMPILED,
    SIZES,
    WATCHED,
    WATCHES,
    data_parallel_inputs,
    data_parallel_weight,
)
from vocab_shards import assert_matches

from eaft_ext import NoGate, TokenStats, gated_ce, reference

WORLD_SIZES = [1, 2, 3, 4]
TIMEOUT = 300  # of a minute at most, where the machine does nothing else

Results = Callable[[int, str], list[Any]]


def _run(world_size: int, folder: Path) -> str:
    """Run vocab_parallel_worker.py in so many processes; gives why they did not end well."""
    worker = Path(__file__).with_name("vocab_parallel_worker.py")
    commands = [(worker, rank, world_size, folder) for rank in range(world_size)]
    try:
        run_all(commands, TIMEOUT)
    except (AssertionError, pytest.fail.Exception) as error:
        # What they had saved until then shall be looked at as if they had.
        return str(error)[-2000:]
    return "they ended"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process saved under a name: all cases of a world size in one run."""
    runs: dict[int, tuple[Path, str]] = {}

    def load(world_size: int, name: str) -> list[Any]:
        if world_size not in runs:
            folder = tmp_path_factory.mktemp(f"world_of_{world_size}_")
            runs[world_size] = folder, _run(world_size, folder)
        folder, end = runs[world_size]
        found = sorted(folder.glob(f"{name}.*.pt"))
        if not found:
            pytest.fail(f"no process came as far as {name!r}: {end}")
        return [torch.load(path) for path in found]

    return load


@pytest.fixture
def results(saved: Results) -> Results:
    """The same, where nothing is to be raised, and all processes are to have it."""

    def load(world_size: int, name: str) -> list[Any]:
        found = saved(world_size, name)
        for rank, values in enumerate(found):
            if isinstance(values, dict) and "raised" in values:
                pytest.fail(f"process {rank} raised\n{values['raised'][2]}")
        return found

    return load


def _assert_raised(found: list[Any], kinds: str, sentence: str) -> None:
    for rank, values in enumerate(found):
        raised = values.get("raised") if isinstance(values, dict) else None
        assert raised, f"process {rank} raised nothing"
        found_kinds, message, trace = raised
        assert set(found_kinds) & set(kinds.split("|")), f"in process {rank}: {trace}"
        assert re.search(sentence, message), f"in process {rank}: {message}"
        assert message.startswith("vocab_parallel_gated_ce: ") and "\n" not in message


def _together(found: list[dict[str, Tensor]], words: int) -> Outcome:
    """One outcome of all processes, whose losses and stats are the same bits; padding is left."""
    first = found[0]
    for other in found[1:]:
        for name in ("loss", *TokenStats._fields):
            a, b = other[name], first[name]
            assert a is b is None or same_bits(a, b), f"{name} differs between processes"
    gradient = torch.cat([values["gradient"] for values in found], -1)
    padding = gradient[..., words:]
    assert same_bits(padding, torch.zeros_like(padding))
    values = (first[name] for name in ("loss", "nll", "entropy", "gate"))
    return Outcome(*values, gradient[..., :words])


def _assert_is(found: list[dict[str, Tensor]], case: Case, world_size: int) -> None:
    """That of one process with the whole rows."""
    logits, labels = case.inputs(world_size)
    unreduced = case.options.get("reduction") == "none"
    upstream = upstream_of(labels) if unreduced else torch.tensor(1.0)
    left_out = ("inplace_backward", "return_stats")
    options = {name: x for name, x in case.options.items() if name not in left_out}
    assert_matches(_together(found, case.words), logits, labels, upstream, **options)
    options |= {"return_stats": case.options.get("return_stats", True)}
    truth = reference.gated_ce(logits.double(), labels, **options)[1]
    for name in ("correct", "lse", "z_loss", "vocab_entropy"):
        stat, expected = found[0][name], getattr(truth, name)
        assert (stat is None) == (expected is None), name
        if stat is not None:
            torch.testing.assert_close(
                stat.to(expected), expected, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
            )


@pytest.mark.parametrize(
    ("world_size", "name"), by_size((n, name) for n in WORLD_SIZES for name in cases_of(n))
)
def test_the_loss_is_that_of_one_process(results: Results, world_size: int, name: str) -> None:
    found = results(world_size, name)
    assert len(found) == world_size
    _assert_is(found, CASES[name], world_size)


def _default_loss(world_size: int = 2) -> Tensor:
    return gated_ce(*CASES["default"].inputs(world_size))


def _assert_default_losses(found: list[Tensor], world_size: int) -> None:
    assert len(found) == world_size
    for loss in found:
        assert same_bits(loss, found[0])
        torch.testing.assert_close(loss, _default_loss(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WATCHES)
@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("world_size", by_size([1, 2, 4]))
def test_one_exchange_in_the_forward_and_none_in_the_backward(
    results: Results, world_size: int, name: str, way: str
) -> None:
    """Of k + 3 numbers for each token, float32 whatever the logits are; alone, of none.

    With the entropy of the whole vocabulary one more, of which alone there are 5.
    """
    options = CASES[name].options
    k, full = options.get("k", 20), options.get("return_stats") == "full"
    size = 5 if k is None else k + 3 + full + ("label_smoothing" in options)
    count = min(world_size - 1, 1)
    itemsize = 8 if name == "float64" else 4
    expected = {
        "debug_mode": count,
        "profiler": [("gloo:all_gather", [[NUM_ROWS, size]])] * count,
        "dispatch": [NUM_ROWS * size * itemsize] * count,
    }
    for found in results(world_size, "collectives"):
        forward, backward = found[f"{name} {way}"]
        assert forward == expected[way]
        assert not backward


@pytest.mark.parametrize("name", [*COMPILED, "with_checks"])
def test_compiled_to_one_graph_with_the_exchange_in_it(results: Results, name: str) -> None:
    """For all sizes, also of the vocabulary, and with eager's results."""
    for rank, found in enumerate(results(2, f"compiled_{name}")):
        gathers = [target for target in found["targets"] if "wait" not in target]
        assert gathers == ["_c10d_functional.all_gather_into_tensor"]
        assert found["overwrites"] and not any(found["overwrites"]), "the compiler decides of that"
        assert len(found["results"]) == len(SIZES)
        for eager, compiled in found["results"]:
            for a, b in zip(compiled, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert found["graphs"] == 1, f"process {rank} compiled {found['graphs']} graphs"


def test_recomputed_under_activation_checkpointing(results: Results) -> None:
    plain = results(2, "default")
    for rank, found in enumerate(results(2, "recomputed")):
        for loss, gradient in found.values():
            assert same_bits(loss, plain[rank]["loss"])
            assert same_bits(gradient, plain[rank]["gradient"])


def test_under_autocast(results: Results) -> None:
    expected = results(2, "bfloat16_mean")[0]["loss"]
    for loss in results(2, "autocast"):
        assert loss.dtype == torch.float32 and same_bits(loss, expected)


def test_two_losses_in_a_graph_that_is_kept(results: Results) -> None:
    logits, labels = CASES["default"].inputs(2)
    logits.requires_grad_()
    losses = gated_ce(logits, labels), gated_ce(logits, labels.flip(0), gate=NoGate())
    (losses[0] + 2 * losses[1]).backward()
    assert logits.grad is not None
    for gradient, found in zip(logits.grad.chunk(2, -1), results(2, "two_losses"), strict=True):
        *values, once, twice = found
        torch.testing.assert_close(tuple(values), tuple(x.detach() for x in losses))
        torch.testing.assert_close(once, gradient)
        torch.testing.assert_close(twice, 2 * gradient)


@pytest.mark.slow
def test_beside_data_parallelism(results: Results) -> None:
    """A mesh of two by two; DistributedDataParallel averages over replicas, one of them idle."""
    gradients, losses = [], []
    for replica in range(2):
        hidden, labels = data_parallel_inputs(replica)
        weight = data_parallel_weight().requires_grad_()
        loss = gated_ce(hidden @ weight.T, labels)
        loss.backward()
        gradients.append(weight.grad)
        losses.append(loss.detach())
    average = torch.stack(gradients).mean(0).chunk(2)
    assert losses[1] == 0
    for rank, found in enumerate(results(4, "data_parallel")):
        torch.testing.assert_close(found["loss"], losses[rank // 2])
        torch.testing.assert_close(found["gradient"], average[rank % 2], rtol=1e-4, atol=1e-6)


FOLLOW = "shards must follow each other without a gap"
SENTENCES: dict[str, tuple[str, str]] = {
    "labels_of_a_wrong_shape": ("ValueError", r"got \(3,\) for logits \(12, \d+\)"),
    "labels_that_are_no_tensor": ("TypeError", "labels must be a tensor, got NoneType"),
    "labels_of_a_wrong_dtype": ("TypeError", "labels must be int64 or int32, got torch.float32"),
    "another_number_of_tokens": ("ValueError", r"shape of the tokens: \[12\] in .* \[3\] in"),
    "no_tokens": ("ValueError", r"shape of the tokens: \[12\] in .* \[0\] in"),
    "another_shape_of_as_many": ("ValueError", r"shape of the tokens: \[12\] in .* \[3, 4\] in"),
    "another_dtype": ("ValueError", "dtype of the logits: torch.float32 in .*torch.float64 in"),
    "an_unsupported_dtype": ("TypeError", "logits must be float32, .*got torch.int32"),
    "another_k": ("ValueError", "differ in k: 20 in process 0, 7 in process"),
    "no_k": ("ValueError", "differ in k: 20 in process 0, None in process"),
    "a_wrong_k": ("ValueError", "k must be from 2 to 128, or None for all, got 999"),
    "a_k_that_is_no_int": ("TypeError", r"k must be an int, or None for all, got 20\.0"),
    "another_gate": ("ValueError", r"differ in gate: EntropyGate\(.*NoGate\(\) in process"),
    "another_parameter_of_the_gate": ("ValueError", r"differ in gate: .*HardGate\(.*=0\.25\)"),
    "a_gate_that_is_none": ("TypeError", "gate must be a gate .*got 3"),
    "gate_and_alpha": ("TypeError", r"cannot go with gate=NoGate\(\)"),
    "another_reduction": ("ValueError", "differ in reduction: mean in .*none in process"),
    "a_wrong_reduction": ("ValueError", "'mean', 'sum' or 'none', got 'avg'"),
    "another_ignore_index": ("ValueError", "differ in ignore_index: -100 in process 0, 3 in"),
    "another_vocab_size": ("ValueError", "differ in vocab_size: None in process 0, 239 in"),
    "other_stats": ("ValueError", "differ in return_stats='full': False in .*, True in process"),
    "wrong_stats": ("ValueError", "return_stats must be True, False or 'full', got 'all'"),
    "a_wrong_number_of_items": ("ValueError", "num_items_in_batch must be at least 0, got -1"),
    "no_group": ("TypeError", "group must be the ProcessGroup .*got None"),
    "a_group_that_is_none": ("TypeError", "group must be the ProcessGroup .*got 'tp'"),
    "a_negative_start": ("ValueError", "vocab_start must be at least 0, got -1"),
    "a_start_that_is_no_int": ("TypeError", r"vocab_start must be an int, got 1\.0"),
    "a_start_of_true": ("TypeError", "vocab_start must be an int, got True"),
    "a_vocab_size_that_is_no_int": ("TypeError", r"vocab_size must be an int, got 240\.0"),
    "overlap": ("ValueError", FOLLOW),
    "gap": ("ValueError", FOLLOW),
    "another_width": ("ValueError", FOLLOW),
    "labels_differ": ("ValueError", r"labels at position \[2\] differ: \[(\d+, )+5\]"),
    "ignored_by_one_alone": ("ValueError", r"labels at position \[2\] differ: \[(\d+, )+-100\]"),
    "a_label_in_no_shard": ("ValueError", r"position \[2\] is 240, in no shard and not"),
    "a_label_below_all_shards": ("ValueError", r"position \[2\] is -1, in no shard and not"),
    "a_label_in_the_padding": ("ValueError", r"position \[2\] is 239, in no shard and not"),
    "vocab_size_beyond_the_shards": ("ValueError", "have 240 words, and vocab_size is 241"),
    "all_shards_at_the_start": ("ValueError", FOLLOW),
    "a_first_shard_that_is_not_first": ("ValueError", FOLLOW),
    "errors_of_several": ("ValueError|TypeError", "k must be from 2|labels must be int64 or"),
    "no_group_anywhere": ("TypeError", "group must be the ProcessGroup .*got None"),
}


@pytest.mark.parametrize(
    ("world_size", "name"), by_size((n, name) for n in (1, 2, 3) for name in errors_of(n))
)
def test_what_is_wrong_in_one_process_is_raised_in_all(
    saved: Results, results: Results, world_size: int, name: str
) -> None:
    """And the next call, which is right, is made as if nothing had been."""
    kinds, sentence = SENTENCES[name]
    found = saved(world_size, f"error_{name}")
    assert len(found) == world_size
    _assert_raised(found, kinds, sentence)
    if name in ONE_ERRS and world_size > 1:
        others = [values["raised"][1] for values in found[:-1]]
        wrong = f"process {world_size - 1}"
        assert all(wrong in told or "differ: [" in told for told in others), "which one it was"
    _assert_default_losses(results(world_size, f"after_{name}"), world_size)


@pytest.mark.parametrize("world_size", by_size([2, 3]))
def test_errors_of_one_process_in_a_row(results: Results, world_size: int) -> None:
    found = results(world_size, "repeated_errors")
    sentences = ["got 999", "got 999", "got None", "differ in k", "got None", "got 999"]
    for values in found:
        for told, sentence in zip(values["told"], sentences, strict=True):
            assert sentence in told
    _assert_default_losses([values["loss"] for values in found], world_size)


@pytest.mark.parametrize("world_size", by_size([2, 3]))
def test_a_shard_that_cannot_be_overwritten(
    saved: Results, results: Results, world_size: int
) -> None:
    _, message, _ = saved(world_size, "error_in_place")[-1]["raised"]
    assert "rows of the logits share memory" in message
    _assert_default_losses(results(world_size, "after_in_place"), world_size)


@pytest.mark.parametrize("world_size", by_size([2, 3]))
def test_notes_do_not_pile_up(results: Results, world_size: int) -> None:
    """What processes tell each other beforehand is taken away once all have read it."""
    for before, after in results(world_size, "keys"):
        assert after <= before + world_size


@pytest.mark.parametrize("world_size", by_size([2, 3]))
def test_with_checks(saved: Results, results: Results, world_size: int) -> None:
    _assert_is(results(world_size, "checked"), CASES["default"], world_size)
    _assert_raised(saved(world_size, "error_checked"), *SENTENCES["a_label_in_no_shard"])


@pytest.mark.parametrize("world_size", by_size(WORLD_SIZES))
def test_torch_distributed_not_initialised(saved: Results, world_size: int) -> None:
    _assert_raised(saved(world_size, "not_initialised"), "ValueError", "call init_process_group")


@pytest.mark.parametrize("world_size", by_size([2, 3, 4]))
def test_a_mesh_as_group(results: Results, world_size: int) -> None:
    _assert_is(results(world_size, "mesh"), CASES["default"], world_size)


@pytest.mark.slow
def test_a_mesh_of_two_dimensions_is_no_group(saved: Results, results: Results) -> None:
    sentence = r"one dimension of a DeviceMesh, such as mesh\['tp'\], got one of 2"
    _assert_raised(saved(4, "error_mesh_of_two_dimensions"), "ValueError", sentence)
    _assert_default_losses(results(4, "after_mesh_of_two_dimensions"), 4)


@pytest.mark.parametrize("world_size", by_size([2, 3, 4]))
def test_a_group_of_one_process_is_its_own_business(results: Results, world_size: int) -> None:
    """Calls on it, right and wrong ones, do not upset those of the larger group."""
    (told,) = results(world_size, "error_alone")
    assert len(told) == 3 and all("got 999" in sentence for sentence in told)
    (loss,) = results(world_size, "alone")
    expected = gated_ce(*CASES["default"].inputs(1), reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    _assert_default_losses(results(world_size, "after_alone"), world_size)


@pytest.mark.parametrize("world_size", by_size([2, 3, 4]))
def test_a_process_that_is_late_is_waited_for(
    saved: Results, results: Results, world_size: int
) -> None:
    """What it did wrong before, in a call without a group, has nothing to do with a new group."""
    _assert_raised(saved(world_size, "error_without_a_group"), *SENTENCES["no_group"])
    for name in ("after_without_a_group", "latecomer", "after_latecomer"):
        _assert_default_losses(results(world_size, name), world_size)


@pytest.mark.slow
def test_a_process_that_stays_away_is_named(saved: Results) -> None:
    found = saved(4, "error_absence")
    assert len(found) == 3
    _assert_raised(found, "RuntimeError", r"processes \[3\] did not make this call")


def test_gloo_that_torch_chose_by_itself(saved: Results, results: Results) -> None:
    """After a second init_process_group(), which names no backend."""
    _assert_default_losses(results(2, "without_a_backend"), 2)
    _assert_raised(saved(2, "error_without_a_backend"), *SENTENCES["another_k"])
    _assert_default_losses(results(2, "after_without_a_backend"), 2)


@pytest.mark.slow
def test_groups_that_share_a_process(results: Results) -> None:
    for first in (0, 1):
        _assert_default_losses(results(3, f"pair_{first}"), 2)
    _assert_default_losses(results(3, "after_pairs"), 3)


@pytest.mark.slow
@pytest.mark.parametrize("outsider", ["calls_too", "stays_away"])
@pytest.mark.parametrize("kind", ["subgroup", "submesh"])
def test_a_part_of_all_processes(
    saved: Results, results: Results, kind: str, outsider: str
) -> None:
    """Processes 1 and 2; process 0 is told if it makes the call too, and disturbs nobody."""
    case = CASES["default"]
    found = results(3, f"{kind}_{outsider}")
    assert len(found) == 2
    logits, labels = case.inputs(2)
    op = _together(found, WORDS)
    expected = outcome(gated_ce, logits, labels, upstream_of(labels), reduction="none")
    for name, a, b in zip(Outcome._fields, op, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    if outsider == "calls_too":
        told = saved(3, f"error_outsider_{kind}")
        _assert_raised(told, "ValueError|TypeError", "process 0 is not in the group")
    _assert_default_losses(results(3, f"after_{kind}_{outsider}"), 3)


@pytest.mark.parametrize("world_size", by_size(WORLD_SIZES))
def test_all_processes_came_to_the_end(results: Results, world_size: int) -> None:
    assert results(world_size, "end") == [True] * world_size
