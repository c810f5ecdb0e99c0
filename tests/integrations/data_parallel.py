"""Trainings of two processes on the CPU, by DDP and by FSDP2.

A test calls ``trained(__file__, way, folder)``; its file has ``train_in_process(way, folder)``,
whose trainer gets the arguments of ``options_of(way, ...)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from spawned import mean_of_ones, run_processes
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers_models import assert_same

WAYS = ("ddp", "fsdp2")
WORLD_SIZE = 2
LOGS = ("gate", "entropy", "nll", "token_accuracy", "confident_conflicts")
"""What EAFTCallback logs, after its prefix."""
WORKER = Path(__file__).with_name("data_parallel_worker.py")


def trained(file: str, way: str, folder: Path, timeout: float = 240) -> list[Any]:
    """What ``train_in_process(way, folder)`` of a test file gives in each process."""
    arguments = (Path(file).stem, way)
    return run_processes(
        WORKER, WORLD_SIZE, folder, timeout=timeout, folders=[WORKER.parent], arguments=arguments
    )


def options_of(way: str, learning_rate: float) -> dict[str, Any]:
    """Arguments of a trainer of transformers, in a process that has joined the other."""
    options: dict[str, Any] = {"ddp_backend": "gloo", "learning_rate": learning_rate}
    if way == "ddp":
        return options
    _take_fsdp_on_cpu()
    options |= {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}}
    return options | {"learning_rate": learning_rate / mean_of_ones()}


@cache
def _take_fsdp_on_cpu() -> None:
    """Have accelerate shard on the CPU as it does where each process has a GPU.

    By itself it leaves the plugin of FSDP out of a state of processes on the CPU, without a word,
    and wraps their model in DDP. All else is its own.
    """
    start = AcceleratorState.__init__

    @wraps(start)
    def extended(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = extended  # type: ignore[method-assign]


def whole_weights(model: nn.Module, way: str) -> dict[str, torch.Tensor]:
    """By their names, after a training that has sharded them, or has not."""
    for module in model.modules():
        if isinstance(module, FSDPModule):  # an evaluation leaves some gathered
            module.reshard()
    weights = {
        name.replace("_checkpoint_wrapped_module.", ""): weight.detach()
        for name, weight in model.named_parameters()
    }
    sharded = [name for name, weight in weights.items() if isinstance(weight, DTensor)]
    assert sharded == (list(weights) if way == "fsdp2" else []), sharded
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in weights.items()
    }


class _Keeper(transformers.TrainerCallback):
    def __init__(self, way: str) -> None:
        self.way = way
        self.found: dict[str, Any] = {}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        whole = whole_weights(model, self.way)
        weights = {name: weight.detach().clone() for name, weight in whole.items()}
        self.found |= {"log": [dict(entry) for entry in state.log_history], "weights": weights}


@contextmanager
def kept(way: str = "alone") -> Iterator[dict[str, Any]]:
    """The log and the weights of a training within, whose trainer a stack keeps to itself."""
    keeper = _Keeper(way)
    transformers.trainer.DEFAULT_CALLBACKS.append(keeper)
    try:
        yield keeper.found
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(keeper)


def assert_same_training(found: dict[str, Any], expected: dict[str, Any], *names: str) -> None:
    """In what is logged by these names, once or more, and in the weights."""
    for name in names:
        logged = [
            [entry[name] for entry in one["log"] if name in entry] for one in (found, expected)
        ]
        assert logged[1], name
        assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-6), name
    assert_same(found["weights"], expected["weights"], rtol=1e-4, atol=1e-5)
