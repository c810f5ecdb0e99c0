"""A process of test_transformers_processes.py."""

from __future__ import annotations

from typing import Any

import torch
from spawned import mean_of_ones, work
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers_models import batch, build, unfused

from eaft_ext.integrations.transformers import use_linear_gated_ce

# Which modules FSDP2 has as groups of their own, besides the layers and the model.
GROUPS = {"own": ["lm_head"], "root": []}
ORDERS = ("patched first", "sharded first")
GATES = {
    "built-in": None,
    # Its backward needs the weight once more.
    "of one's own": lambda nll, entropy: entropy / (1 + nll),
}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(model: Any, rank: int, module: Any) -> dict[str, Any]:
    """A forward and a backward with this process's tokens; ``module`` is or wraps the model."""
    tokens, labels = batch(seed=rank)
    outputs = module(input_ids=tokens, labels=labels)
    assert outputs.logits is None
    outputs.loss.backward()
    return {
        "loss": outputs.loss.detach(),
        "gradients": {name: full(p.grad).clone() for name, p in model.named_parameters()},
    }


def run_fsdp(rank: int, world_size: int, groups: list[str], order: str, gate: Any) -> Any:
    model = build("llama")
    mesh = init_device_mesh("cpu", (world_size,))
    if order == "patched first":
        use_linear_gated_ce(model, gate=gate)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    for name in groups:
        fully_shard(getattr(model, name), mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    if order == "sharded first":
        use_linear_gated_ce(model, gate=gate)
    found = run(model, rank, model)
    for gradient in found["gradients"].values():
        gradient /= mean_of_ones()
    tokens, _ = batch(seed=0)
    with torch.no_grad():
        found["logits"] = model(tokens).logits
    return found


def run_fsdp_with_rounded_outputs(rank: int, world_size: int) -> Any:
    """FSDP2 then rounds what the output layer returns."""
    model = build("llama")
    mesh = init_device_mesh("cpu", (world_size,))
    rounded = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    fully_shard(model.lm_head, mesh=mesh, mp_policy=rounded)
    fully_shard(model, mesh=mesh)
    use_linear_gated_ce(model)
    return run(model, rank, model)


def run_fsdp1(rank: int, world_size: int) -> Any:
    """With the output layer wrapped by itself, after the patch."""
    model = build("llama")
    use_linear_gated_ce(model)
    device = torch.device("cpu")
    policy = ModuleWrapPolicy({nn.Linear})
    wrapper = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device)
    tokens, labels = batch(seed=rank)
    outputs = wrapper(input_ids=tokens, labels=labels)
    assert outputs.logits is None
    outputs.loss.backward()
    return {"loss": outputs.loss.detach()}


def error_of_a_step_that_does_not_ask(rank: int, world_size: int) -> str:
    """After one that does, of weights that FSDP2 has sharded."""
    model = build("llama").train()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    use_linear_gated_ce(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, labels = batch(seed=rank)
    model(tokens, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    unfused(model, tokens, labels).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def run_ddp(rank: int, world_size: int) -> Any:
    model = build("llama")
    wrapper = DistributedDataParallel(model)
    use_linear_gated_ce(wrapper)
    return run(model, rank, wrapper)


def error_under_tensor_parallelism(world_size: int) -> str:
    model = build("llama")
    mesh = init_device_mesh("cpu", (world_size,))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    tokens, labels = batch()
    try:
        use_linear_gated_ce(model)
        model(tokens, labels=labels)
    except TypeError as error:
        return str(error)
    return "nothing"


def function(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{groups} {order} {gate}": run_fsdp(rank, world_size, GROUPS[groups], order, GATES[gate])
        for groups in GROUPS
        for order in ORDERS
        for gate in GATES
    }
    found["rounded outputs"] = run_fsdp_with_rounded_outputs(rank, world_size)
    found["fsdp1"] = run_fsdp1(rank, world_size)
    found["another loss"] = error_of_a_step_that_does_not_ask(rank, world_size)
    found["ddp"] = run_ddp(rank, world_size)
    found["tensor parallelism"] = error_under_tensor_parallelism(world_size)
    return found


if __name__ == "__main__":
    work(function)
