"""Trainings of two processes on the CPU, by DDP and by FSDP2.

A test calls ``trained(__file__, way, folder)`` and has a function ``train_in_process(way)``, whose
trainer gets the arguments of ``options_of(way, ...)``.
"""

from __future__ import annotations

from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from spawned import mean_of_ones, run_processes
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

WAYS = ("ddp", "fsdp2")
WORLD_SIZE = 2
WORKER = Path(__file__).with_name("data_parallel_worker.py")


def trained(file: str, way: str, folder: Path, timeout: float = 240) -> list[Any]:
    """What ``train_in_process(way)`` of a test file gives in each process."""
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
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    sharded = [name for name, weight in weights.items() if isinstance(weight, DTensor)]
    assert sharded == (list(weights) if way == "fsdp2" else []), sharded
    return {
        name: weight.full_tensor() if isinstance(weight, DTensor) else weight
        for name, weight in weights.items()
    }
