"""The gated loss in TRL's SFTTrainer, whose fused output layer computes a loss of its own."""

# ruff: noqa: E402, without TRL there is nothing to import for.

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs TRL: pip install '.[test]'"
trl = pytest.importorskip("trl", minversion="1.5", reason=MISSING)

import datasets
import transformers
from data_parallel import LOGS, WAYS, options_of, trained, whole_weights
from packaging.version import Version
from small_model import tokenizer_of
from trainer_runs import logged
from transformers_models import V, assert_same, build, shifted

from eaft_ext import NoGate, reference
from eaft_ext.integrations.trainer import EAFTCallback
from eaft_ext.integrations.transformers import use_linear_gated_ce

STEPS = 3
LEARNING_RATE = 0.1
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
METRICS = ("entropy", "mean_token_accuracy", "num_tokens")
IS_FUSED = Version(trl.__version__) >= Version("1.15")
OWN_LOSS = {} if IS_FUSED else {"loss_type": "chunked_nll"}


class InOrder(trl.SFTTrainer):  # type: ignore[misc]
    """Takes the examples as they come."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def rows() -> list[dict[str, list[int]]]:
    """Texts of uneven length, of which a part has labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (12,), generator=generator).tolist()
    found = []
    for i, length in enumerate(lengths):
        tokens = torch.randint(3, V, (length,), generator=generator).tolist()
        ignored = i % 4 * length // 4
        found.append({"input_ids": tokens, "labels": [-100] * ignored + tokens[ignored:]})
    return found


def prompts() -> list[dict[str, str]]:
    texts = [" ".join(f"w{token}" for token in row["input_ids"]) for row in rows()]
    return [{"prompt": "w5 w6 w7", "completion": f" {text}"} for text in texts]


def trainer(model: Any, folder: Path, *callbacks: Any, data: Any = None, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": 32,
    } | OWN_LOSS
    peft = changes.pop("peft_config", None)
    train_dataset = datasets.Dataset.from_list(data or rows())
    return InOrder(
        model,
        args=trl.SFTConfig(str(folder), **options | changes),
        train_dataset=train_dataset,
        eval_dataset=train_dataset if "eval_strategy" in changes else None,
        processing_class=tokenizer_of(V),
        callbacks=list(callbacks),
        peft_config=peft,
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def padded(some: list[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in some)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in some])

    tokens = fill("input_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in some])
    return tokens, fill("labels", -100), torch.arange(longest) < lengths[:, None]


def written_out(model: Any, data: list[dict[str, list[int]]], **options: Any) -> list[float]:
    """The losses of the same steps, of four rows each."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        tokens, labels, mask = padded(data[4 * step : 4 * step + 4])
        logits = model(tokens, attention_mask=mask.long()).logits
        loss = reference.gated_ce(logits, shifted(labels), **options)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(o, marks=pytest.mark.slow) for o in ({"k": None}, {"k": 8, "alpha": 2.0}))],
    ids=str,
)
def test_a_training(options: dict[str, Any], tmp_path: Path) -> None:
    expected_model, model = build("llama"), build("llama")
    run = trainer(model, tmp_path, EAFTCallback(**options))
    run.train()
    losses = written_out(expected_model, rows(), **options)
    assert logged(run, "loss") == pytest.approx(losses, rel=1e-4)
    assert_same(weights(model), weights(expected_model), **CLOSE)


@pytest.mark.parametrize(
    "name",
    ["llama", "mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("smollm2", "gemma2"))],
)
@pytest.mark.parametrize(
    "is_added", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["given", "added"]
)
def test_without_a_gate_it_is_the_trainers_own(name: str, is_added: bool, tmp_path: Path) -> None:
    """With its metrics, and a router's loss."""
    expected_model, model = build(name), build(name)
    expected = trainer(expected_model, tmp_path / "own")
    expected.train()
    callback = EAFTCallback(gate=NoGate())
    run = trainer(model, tmp_path / "gated", *([] if is_added else [callback]))
    if is_added:
        run.add_callback(callback)
    run.train()
    metrics = (*METRICS, "aux_loss") if name == "mixtral" else METRICS
    for of_log in (*metrics, "loss"):
        assert len(logged(run, of_log)) == STEPS
        assert logged(run, of_log) == pytest.approx(logged(expected, of_log), rel=1e-4), of_log
    assert_same(weights(model), weights(expected_model), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {"completion_only_loss": True},
        {"completion_only_loss": False},
    ],
    ids=str,
)
def test_data(changes: dict[str, Any], tmp_path: Path) -> None:
    """Packed, or of completions, it is masked as TRL does."""
    data = prompts()
    if "packing" in changes:
        data = [{"text": row["prompt"] + row["completion"]} for row in data]
    expected_model, model = build("llama"), build("llama")
    expected = trainer(expected_model, tmp_path / "own", data=data, **changes)
    expected.train()
    run = trainer(model, tmp_path / "gated", EAFTCallback(gate=NoGate()), data=data, **changes)
    run.train()
    for name in ("loss", *METRICS):
        assert logged(run, name) == pytest.approx(logged(expected, name), rel=1e-4), name
    gated = trainer(build("llama"), tmp_path / "eaft", EAFTCallback(), data=data, **changes)
    gated.train()
    first = {name: logged(gated, name)[0] for name in ("loss", *METRICS)}
    assert first["loss"] < logged(expected, "loss")[0]
    for name in METRICS:
        assert first[name] == pytest.approx(logged(expected, name)[0], rel=1e-4), name


def test_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason=MISSING)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    losses = []
    for name, callbacks in (("own", []), ("gated", [EAFTCallback(gate=NoGate())])):
        torch.manual_seed(0)
        run = trainer(build("llama"), tmp_path / name, *callbacks, peft_config=config)
        run.train()
        losses.append(logged(run, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluation(tmp_path: Path) -> None:
    """While it trains it is gated, and has TRL's metrics; afterwards it is the model's own."""
    model = build("llama")
    changes = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    run = trainer(model, tmp_path, EAFTCallback(gate=lambda nll, h: 0 * nll), **changes)
    run.train()
    assert logged(run, "eval_loss") == [0.0] * STEPS
    assert all(entropy > 0 for entropy in logged(run, "eval_entropy"))
    assert run.evaluate()["eval_loss"] > 1


def test_the_model_afterwards(tmp_path: Path) -> None:
    model = build("llama")
    run = trainer(model, tmp_path, EAFTCallback())
    run.train()
    tokens, labels, _ = padded(rows()[:2])
    own = model(tokens, labels=labels)
    # Before 1.15 TRL leaves its own forward, which has none.
    assert (own.logits is not None) == IS_FUSED
    run.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(tokens, labels=labels).loss, own.loss)
    generated = again.generate(tokens[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=3, do_sample=False), generated)


def test_a_loss_type_of_trl(tmp_path: Path) -> None:
    run = trainer(build("llama"), tmp_path, EAFTCallback(), loss_type="dft")
    with pytest.raises(ValueError, match=r"loss_type='dft'.*ProbabilityGate\(\)"):
        run.train()


def test_the_linear_loss_before_the_trainer(tmp_path: Path) -> None:
    model = build("llama")
    before = weights(copy.deepcopy(model))
    use_linear_gated_ce(model)
    run = trainer(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"trl.*replaced its forward.*EAFTCallback"):
        run.train()
    assert_same(weights(model), before, rtol=0.0, atol=0.0)


def test_the_linear_loss_after_the_trainer(tmp_path: Path) -> None:
    run = trainer(build("llama"), tmp_path)
    with pytest.raises(TypeError, match=r"TRL has replaced the forward of Llama.*EAFTCallback"):
        use_linear_gated_ce(run.model)


def test_another_trainer_with_such_a_model(tmp_path: Path) -> None:
    model = trainer(build("llama"), tmp_path).model
    arguments = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match=r"only SFTTrainer is supported.*DPOConfig"):
        EAFTCallback().on_train_begin(arguments, None, None, model=model)


@pytest.mark.skipif(IS_FUSED, reason="of TRL before 1.15: pip install 'trl<1.15'")
def test_metrics_of_logits(tmp_path: Path) -> None:
    run = trainer(build("llama"), tmp_path, EAFTCallback(), loss_type="nll")
    with pytest.raises(ValueError, match=r"write loss_type='chunked_nll'"):
        run.train()


@pytest.mark.skipif(not IS_FUSED, reason="of TRL from 1.15 on: pip install 'trl>=1.15'")
def test_labels_that_are_shifted(tmp_path: Path) -> None:
    """As sequence and context parallelism have them."""
    run = trainer(build("llama"), tmp_path)
    tokens, labels, _ = padded(rows()[:2])
    with EAFTCallback().installed(run.model, run.args):
        shifted_labels = shifted(labels)
        with pytest.raises(TypeError, match="under context or sequence parallelism"):
            run.model(
                tokens, labels=shifted_labels, shift_labels=shifted_labels, fused_lm_head=True
            )


# The model, and the arguments of two processes and of one, for steps of four rows. In the first
# step the second process has no labels; one by one, neither has any in the second micro-batch.
AT_ONCE = {"gradient_accumulation_steps": 1}
ONE_BY_ONE = {"per_device_train_batch_size": 1}
WHOLE = AT_ONCE | {"per_device_train_batch_size": 4}
PROCESSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "at once": ("llama", AT_ONCE, WHOLE),
    "one by one": ("llama", ONE_BY_ONE, {}),
    "tied embeddings": ("smollm2", AT_ONCE, WHOLE),
    "router": ("mixtral", AT_ONCE, {}),  # whose loss is of a micro-batch
    "adapter": ("llama", AT_ONCE, WHOLE),
}
EVALUATED: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 2,
}
# Otherwise TRL drops rows without labels.
AS_IT_IS: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def rows_without_labels() -> list[dict[str, list[int]]]:
    data = rows()
    for row in data[2:4]:
        row["labels"] = [-100] * len(row["labels"])
    return data


def run_of_processes(case: str, **changes: Any) -> Any:
    """A trainer that has trained."""
    torch.manual_seed(0)
    options = EVALUATED | AS_IT_IS | changes
    if case == "adapter":
        peft = pytest.importorskip("peft", reason=MISSING)
        targets = ["q_proj", "v_proj"]
        options["peft_config"] = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    model = build(PROCESSES[case][0])
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(model, Path(folder), EAFTCallback(), data=rows_without_labels(), **options)
        run.train()
    return run


def logs_of(run: Any, case: str) -> dict[str, list[float]]:
    """Ours and TRL's own, whose metrics are means of micro-batches."""
    names = ["loss", *(of + name for of in ("eaft_", "eval_eaft_") for name in LOGS)]
    names += ["aux_loss"] if case == "router" else METRICS
    return {name: logged(run, name) for name in names}


def train_in_process(way: str, _: Path) -> dict[str, Any]:
    found = {}
    for case, (_, changes, _) in PROCESSES.items():
        run = run_of_processes(case, **changes, **options_of(way, LEARNING_RATE))
        found[case] = {"logs": logs_of(run, case), "weights": whole_weights(run.model, way)}
    return found


@pytest.fixture(scope="module", params=WAYS)
def of_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(__file__, request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("case", PROCESSES)
def test_processes(of_processes: list[dict[str, Any]], case: str) -> None:
    """As one process, whose logs are then of all tokens; and as the steps written out."""
    alone = run_of_processes(case, **PROCESSES[case][2])
    for of_process in of_processes:
        logs = of_process[case]["logs"]
        for name, expected in logs_of(alone, case).items():
            assert len(expected) == STEPS, name
            assert logs[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name
        assert_same(of_process[case]["weights"], weights(alone.model), **CLOSE)
        if case not in ("router", "adapter"):
            model = build(PROCESSES[case][0])
            losses = written_out(model, rows_without_labels())
            assert logs["loss"] == pytest.approx(losses, rel=1e-4)
            assert_same(of_process[case]["weights"], weights(model), **CLOSE)
