"""One process of test_trainer_processes.py: ``trainer_worker.py RANK WORLD_SIZE FOLDER``.

The trainers take two rows for each process and step: in the first step those of the second process
have no labels.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from spawned import work
from torch.distributed.fsdp import FullyShardedDataParallel
from trainer_runs import InOrder, arguments, examples, logged
from transformers_models import batch, build

from eaft_ext.integrations.trainer import EAFTCallback, gated_loss_func

OPTIONS: dict[str, Any] = {"gradient_accumulation_steps": 1, "ddp_backend": "gloo"}


def trained(rank: int, way: str) -> dict[str, Any]:
    """Losses, logs and weights after some steps."""
    model = build("llama")
    more: dict[str, Any] = {}
    if way == "function":
        more["compute_loss_func"] = gated_loss_func()
    else:
        more["callbacks"] = [EAFTCallback()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model,
            arguments(Path(folder), **OPTIONS),
            train_dataset=examples(),
            eval_dataset=examples()[:8],
            **more,
        )
        trainer.train()
    return {
        "losses": logged(trainer, "loss"),
        "gates": logged(trainer, "eaft_gate"),
        "accuracies": logged(trainer, "eaft_token_accuracy"),
        "weights": {name: weight.detach() for name, weight in model.named_parameters()},
    }


def sharded() -> dict[str, float]:
    """What is logged of a step of FSDP1: beside their call its weights are parts of a vector."""
    model = FullyShardedDataParallel(
        build("llama"), device_id=torch.device("cpu"), use_orig_params=True
    )
    tokens, labels = batch()
    callback = EAFTCallback()
    with callback.installed(model, None):
        model.train()
        model(input_ids=tokens, labels=labels).loss.backward()
        callback.on_step_end(None, None, None)
        return callback.take_means(is_evaluation=False)


def function(rank: int, world_size: int) -> dict[str, Any]:
    return {way: trained(rank, way) for way in ("callback", "function")} | {"fsdp1": sharded()}


if __name__ == "__main__":
    # As torchrun tells it to accelerate.
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": sys.argv[2]}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    work(function)
