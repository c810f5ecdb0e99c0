"""One process of test_deepspeed.py: ``deepspeed_worker.py RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
from spawned import work
from torch import Tensor
from trainer_runs import LEARNING_RATE, STEPS, examples
from transformers_models import build, unfused

from eaft_ext.integrations.transformers import use_linear_gated_ce

# Stages of ZeRO; in the last a step is one for each of several vectors.
WAYS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3_in_groups": {"stage": 3, "sub_group_size": 2_000},
}
# And the model; the last has the embedding for an output layer.
RUNS = [(way, "llama", when) for way in WAYS for when in ("before", "after")]
RUNS += [("1", "smollm2", "before"), ("3", "smollm2", "before")]


def engine_of(model: Any, zero: dict[str, Any], **options: Any) -> Any:
    """DeepSpeed clips by default."""
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings | options)
    return engine


def micro_batches(rank: int) -> list[tuple[Tensor, Tensor, int]]:
    """Tokens and labels of this process, and the labels that the step has in both."""
    found = []
    for step in range(STEPS):
        rows = examples()[4 * step : 4 * step + 4]
        tokens, labels = (torch.stack([row[n] for row in rows]) for n in ("input_ids", "labels"))
        part = slice(2 * rank, 2 * rank + 2)
        found.append((tokens[part], labels[part], int((labels[:, 1:] != -100).sum())))
    return found


def losses(rank: int, world_size: int, way: str, name: str, when: str) -> list[float]:
    """Of some steps; the model has the loss before the engine has the model, or after."""
    model = build(name).train()
    if when == "before":
        use_linear_gated_ce(model)
    engine = engine_of(model, WAYS[way])
    if when == "after":
        use_linear_gated_ce(engine)
    found = []
    for tokens, labels, num_items in micro_batches(rank):
        # DeepSpeed averages over the processes.
        given = {"labels": labels, "num_items_in_batch": num_items / world_size}
        loss = engine(input_ids=tokens, **given).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def refusal(rank: int, way: str, **options: Any) -> str:
    """What is said of a step of another loss, after one of ours."""
    model = build("llama").train()
    use_linear_gated_ce(model)
    engine = engine_of(model, WAYS[way], **options)
    tokens, labels, _ = micro_batches(rank)[1]
    try:
        for asks in (True, False):
            given = engine(input_ids=tokens, labels=labels) if asks else None
            loss = unfused(engine, tokens, labels) if given is None else given.loss
            engine.backward(loss)
            engine.step()
    except RuntimeError as error:
        return str(error) if not asks else f"too early: {error}"
    return "it was not refused"


def main(rank: int, world_size: int) -> dict[str, Any]:
    of_launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in of_launcher.items()}
    deepspeed.init_distributed("gloo")
    found = {run: losses(rank, world_size, *run) for run in RUNS}
    refused = {way: refusal(rank, way) for way in WAYS}
    refused["1 bf16"] = refusal(rank, "1", bf16={"enabled": True})
    return {"losses": found, "refused": refused}


if __name__ == "__main__":
    work(main)
