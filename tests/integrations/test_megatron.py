"""Megatron-Core: its own GPTModel with the gated loss, under tensor and sequence parallelism."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from spawned import run_all, run_processes
from torch import nn

import eaft_ext
from eaft_ext.integrations.megatron import use_gated_ce, vocab_parallel_cross_entropy

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
WORKER = Path(__file__).with_name("megatron_worker.py")
TIMEOUT = 400
MISSING = importlib.util.find_spec("megatron") is None
MEGATRON = pytest.mark.skipif(MISSING, reason="needs megatron-core: pip install '.[test,megatron]'")

Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process of megatron_worker.py saved, with 1 and with 2 processes."""
    return {
        n: run_processes(
            WORKER,
            n,
            tmp_path_factory.mktemp(f"megatron{n}"),
            timeout=TIMEOUT,
            folders=[EXAMPLES],
        )
        for n in (1, 2)
    }


def processes_of(results: Results) -> list[tuple[int, dict[str, Any]]]:
    """(number of processes, results of one of them)"""
    return [(size, of_rank) for size, of_ranks in results.items() for of_rank in of_ranks]


@MEGATRON
@pytest.mark.parametrize("case", ["training", "sequence parallel"])
def test_shards_start_as_parts_of_the_whole(results: Results, case: str) -> None:
    num_sharded = 0
    for name, (whole, _) in results[1][0]["training"]["weights"].items():
        shards = [of_rank[case]["weights"][name] for of_rank in results[2]]
        dim = shards[0][1]
        if dim >= 0:
            num_sharded += 1
            assert torch.equal(torch.cat([shard for shard, _ in shards], dim), whole), name
        else:
            assert all(torch.equal(shard, whole) for shard, _ in shards), name
    assert num_sharded >= 10


@MEGATRON
@pytest.mark.parametrize("case", ["training", "sequence parallel"])
def test_two_processes_train_as_one(results: Results, case: str) -> None:
    alone = results[1][0]["training"]["losses"]
    assert alone.dtype == torch.float32 and alone.shape == (8, 3, 16)
    assert alone[0].mean() - alone[-1].mean() > 0.5
    for of_rank in results[2]:
        torch.testing.assert_close(of_rank[case]["losses"], alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[2][0][case]["losses"], results[2][1][case]["losses"])


@MEGATRON
def test_sequence_parallelism_divides_the_sequence(results: Results) -> None:
    assert [of_rank["training"]["lengths"] for _, of_rank in processes_of(results)] == [[16]] * 3
    assert [of_rank["sequence parallel"]["lengths"] for of_rank in results[2]] == [[8]] * 2


@MEGATRON
def test_the_log_has_the_means_over_all_tokens(results: Results) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["training"]
        for step, means in enumerate(found["averages"]):
            both = slice(2 * step, 2 * step + 2)
            mask = torch.stack(found["masks"][both])
            nll, entropy, gate = (
                torch.stack(x) for x in zip(*(s[:3] for s in found["stats"][both]), strict=True)
            )
            expected = {
                "lm loss": found["losses"][both],
                "eaft gate": gate,
                "eaft entropy": entropy,
                "eaft nll": nll,
            }
            assert list(means) == list(expected)
            for name, values in expected.items():
                mean = (values * mask).sum() / mask.sum()
                assert means[name] == pytest.approx(mean.item(), rel=1e-5), name


@MEGATRON
def test_losses_are_those_of_the_gathered_logits(results: Results) -> None:
    for _, of_rank in processes_of(results):
        cases = of_rank["composition"]
        for name, pair in cases.items():
            if isinstance(pair, tuple):
                found, expected = pair
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=name)
        for dtype in ("torch.float32", "torch.bfloat16"):
            plain = cases[f"no gate {dtype}"][0][0]
            torch.testing.assert_close(plain, cases[f"megatron's {dtype}"], rtol=1e-5, atol=1e-5)


@MEGATRON
def test_without_a_gate_the_drop_in_is_megatrons(results: Results) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["drop-in"]
        for ours, theirs in zip(found["no gate"], found["megatron"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        for name in ("gated", "given group"):
            for ours, theirs in zip(found[name], found["reference"], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@MEGATRON
@pytest.mark.parametrize("spoil", [False, True])
def test_logits_stay_as_they_are(results: Results, spoil: bool) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["memory"][f"inplace=False {spoil=}"]
        assert found["after forward"] and not found["in the logits"]
        assert found["after backward"] is not spoil


@MEGATRON
@pytest.mark.parametrize("spoil", [False, True])
def test_in_place_the_gradient_is_in_the_logits(results: Results, spoil: bool) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["memory"][f"inplace=True {spoil=}"]
        assert found["after forward"] and found["in the logits"] and not found["after backward"]


@MEGATRON
@pytest.mark.parametrize("inplace", [False, True])
def test_masked_tokens_are_not_read_by_the_backward(results: Results, inplace: bool) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["memory"]
        mask = found["mask"].T
        gradient = found[f"{inplace=} spoil=True"]["gradient"]
        assert torch.equal(gradient, found["inplace=False spoil=False"]["gradient"])
        assert (mask == 0).sum() > 2
        assert not gradient[mask == 0].any() and gradient[mask == 1].any(-1).all()


@MEGATRON
def test_remove_gives_the_model_its_own_loss_again(results: Results) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["removal"]
        for name in ("removed", "after the block"):
            assert torch.equal(found[name], found["megatron"])
        assert found["clean"]
        assert found["another"] == 7


@MEGATRON
def test_the_last_call_counts(results: Results) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["removal"]
        assert not torch.allclose(found["20"], found["5"])
        assert not torch.allclose(found["20"], found["megatron"])
        assert torch.equal(found["5 in a block"], found["5"])
        for name in ("20, then 5 removed", "20 over another"):
            assert torch.equal(found[name], found["20"])


@MEGATRON
def test_chunks_wrappers_and_stages(results: Results) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["models"]
        for name in ("list", "wrapped"):
            assert torch.equal(found[name], found["plain"]), name
        assert found["stats"] and found["stage without a loss"] == (16, 3, 32)


@MEGATRON
@pytest.mark.parametrize("source", ["pg_collection", "tp_group", "parallel_state"])
def test_the_group_is_the_models_or_else_megatrons(results: Results, source: str) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["groups"]
        torch.testing.assert_close(found[source], found["expected"], rtol=1e-5, atol=1e-5)


@MEGATRON
def test_ignored_labels_count_for_nothing(results: Results) -> None:
    for _, of_rank in processes_of(results):
        found = of_rank["ignored"]
        nll, _, _, valid, *_ = found["stats"]
        assert not valid[0, :5].any() and valid.sum() == 3 * 16 - 5
        assert not found["losses"][0, :5].any() and found["losses"][valid].all()
        # Whatever they are, if negative: Megatron-Core masks them afterwards.
        assert torch.equal(found["negative"], found["losses"])
        assert torch.equal(*found["drop-in"]) and found["drop-in"][0][5:].all()
        for name, weight in (("unmasked", valid.float()), ("masked", valid * found["mask"])):
            total, count = found[name]["eaft nll"]
            assert count == weight.sum()
            torch.testing.assert_close(total, (nll * weight).sum())


@MEGATRON
def test_errors(results: Results) -> None:
    for size, of_rank in processes_of(results):
        found = of_rank["errors"]
        expected = "ValueError: use_gated_ce: got logits of all 384 words, gathered from the 2"
        assert found["gathered"].startswith(expected if size == 2 else "nothing")
        assert found["fused"].startswith("ValueError: use_gated_ce: GPTModel computes its loss")
        assert found["vocab_size"].endswith("from 1 to the model's 384, got 385")


def printed_losses(output: str) -> list[list[float]]:
    """The numbers of the example's log, without its speed."""
    lines = [line for line in output.splitlines() if line.startswith("iteration")]
    return [[float(x) for x in re.findall(r": (\d+\.\d+)(?= |$)", line)] for line in lines]


@MEGATRON
@pytest.mark.slow
def test_the_example_prints_the_same_with_any_number_of_processes() -> None:
    script = str(EXAMPLES / "megatron_pretrain.py")
    options = ["--train-iters", "6", "--log-interval", "2", "--seq-length", "32"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--local-addr", "127.0.0.1"]
    (alone,) = run_all([[script, *options]], TIMEOUT)
    (together,) = run_all([[*torchrun, script, *options, "--sequence-parallel"]], TIMEOUT)
    expected = printed_losses(alone)
    assert [len(line) for line in expected] == [4] * 4, alone
    assert expected[0][0] - expected[-1][0] > 0.3
    torch.testing.assert_close(
        torch.tensor(printed_losses(together)), torch.tensor(expected), rtol=0, atol=0.0021
    )


class Model(nn.Module):
    """Something with a loss like GPTModel's."""

    vocab_size = 100

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 1}, ValueError, "k must be from 2 to 128, or None for all, got 1"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0"),
        ({"alpha": 2.0, "gate": eaft_ext.NoGate()}, TypeError, "cannot go with gate"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be from 1 to the model's 100, got 0"),
        ({"vocab_size": 101}, ValueError, "vocab_size must be from 1 to the model's 100, got 101"),
        ({"vocab_size": 50.0}, TypeError, "vocab_size must be an int, got 50.0"),
    ],
)
def test_options_are_checked_at_once(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model()
    with pytest.raises(error, match=message):
        use_gated_ce(model, **options)
    assert "compute_language_model_loss" not in vars(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), [nn.Linear(2, 2), nn.Tanh()], []])
def test_a_model_without_such_a_loss(model: Any) -> None:
    with pytest.raises(TypeError, match=r"use_gated_ce: nothing in .+ has compute_language_model"):
        use_gated_ce(model)


class Wrapper(nn.Module):
    """Passes on the attributes of what it wraps, as FSDP's does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def test_the_loss_is_put_into_the_model_itself() -> None:
    wrapper = Wrapper(Model())
    use_gated_ce([wrapper, wrapper.module])
    assert "compute_language_model_loss" in vars(wrapper.module)
    assert "compute_language_model_loss" not in vars(wrapper)


@pytest.mark.usefixtures("group_of_one")
def test_label_smoothing_is_that_of_megatron() -> None:
    """Its formula: the other words share 0.1, and nothing of it is the label's."""
    logits = torch.randn(5, 2, 40, dtype=torch.float64, requires_grad=True)
    target = torch.randint(40, (5, 2))
    world = torch.distributed.group.WORLD
    loss = vocab_parallel_cross_entropy(logits, target, 0.1, gate=eaft_ext.NoGate(), tp_group=world)
    log_p = logits.log_softmax(-1)
    of_label = log_p.gather(-1, target[..., None])[..., 0]
    expected = -0.9 * of_label - 0.1 * (log_p.sum(-1) - of_label) / 39
    torch.testing.assert_close(loss, expected)
    found, its = (
        torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, expected)
    )
    torch.testing.assert_close(found, its)


def stats_of(model: Model) -> Any:
    """A handle that has seen a micro-batch of four tokens, one of them not a number."""
    gated = use_gated_ce(model)
    nll = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    gated.stats = eaft_ext.TokenStats(nll, nll + 1, nll + 2, torch.ones(2, 2, dtype=torch.bool))
    return gated


def test_report_keeps_the_form_of_the_script() -> None:
    gated = stats_of(Model())
    mask = torch.tensor([[1.0, 1.0], [0.5, 0.0]])
    pair = {"lm loss": torch.tensor([8.0, 2.0])}
    loss, count = torch.tensor(8.0), torch.tensor(2)

    entries = gated.report(lambda x, scale: (scale * loss, count, pair), mask)(loss, scale=3)
    assert entries[:2] == (24, 2) and list(pair) == ["lm loss"]
    assert {name: value.tolist() for name, value in entries[2].items()} == {
        "lm loss": [8.0, 2.0],
        "eaft gate": [1 * 3 + 1 * 4 + 0.5 * 5, 2.5],
        "eaft entropy": [1 * 2 + 1 * 3 + 0.5 * 4, 2.5],
        "eaft nll": [1 + 2 + 0.5 * 3, 2.5],
    }
    assert gated.report(lambda x: (loss, {}), mask)(loss)[1]["eaft nll"].tolist() == [4.5, 2.5]
    # A script that averages by itself gets averages, also where nothing counts.
    single = {"lm loss": torch.tensor(4.0)}
    assert gated.report(lambda x: (loss, single), mask)(loss)[1]["eaft nll"] == 4.5 / 2.5
    assert gated.report(lambda x: (loss, single), 0 * mask)(loss)[1]["eaft nll"] == 0
    # What is no loss with a dict is passed on, as is everything after remove().
    assert gated.report(lambda x: {"logits": x}, mask)(5) == {"logits": 5}
    gated.remove()
    assert gated.report(lambda x: (loss, pair), mask)(loss)[1] is pair


def test_the_module_needs_no_megatron() -> None:
    code = "import sys; sys.modules['megatron'] = None; import eaft_ext.integrations.megatron"
    run_all([["-c", code]], TIMEOUT)
