"""One process of test_torchtitan.py: ``torchtitan_worker.py RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

from typing import Any

import torch
from pages import on_page
from spawned import work
from torchtitan.distributed.spmd_types import set_current_spmd_mesh

Loss = on_page("other-stacks.md", "EAFTCrossEntropy")
VOCAB_SIZES = [60, 61]


def inputs(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of torchtitan's layout, labels, and how many count."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 8, vocab_size, generator=generator)
    labels = torch.randint(vocab_size, (2, 8), generator=generator)
    labels[0, :3] = -100
    labels[1, 0] = vocab_size - 1
    return logits, labels, (labels != -100).sum()


def main(rank: int, world_size: int) -> dict[int, Any]:
    """Loss and gradient of this process' shard, as its model gives it under tensor parallelism."""
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    found = {}
    for vocab_size in VOCAB_SIZES:
        logits, labels, count = inputs(vocab_size)
        width = -(-vocab_size // world_size)
        shard = logits[..., rank * width : (rank + 1) * width].clone().requires_grad_()
        loss_fn = Loss.Config(global_vocab_size=vocab_size).build()
        with set_current_spmd_mesh(mesh):
            loss, _ = loss_fn(shard, labels, count)
            loss.backward()
        found[vocab_size] = {"loss": loss.detach(), "gradient": shard.grad}
    return found


if __name__ == "__main__":
    work(main)
