"""Run by test_memory.py: prints, as JSON, how many megabytes each case adds to the memory peak."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eaft_ext
from eaft_ext._options import TokenLoss
from eaft_ext.parallel._shard import VocabShard, token_losses

MB = 1 << 20
VOCAB_SIZE = 50257


def resident(which: str) -> float:
    """VmHWM, the peak, or VmRSS, in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {which}")


def _forward(logits: Tensor, labels: Tensor) -> None:
    eaft_ext.gated_ce(logits, labels)


def _forward_of_few_rows(logits: Tensor, labels: Tensor) -> None:
    eaft_ext.gated_ce(logits[:3], labels[:3])


def _topk(logits: Tensor, labels: Tensor) -> None:
    eaft_ext.topk(logits, 20)


class _Computed(torch.autograd.Function):
    """Makes a tensor a computed one without a copy: its gradient is handed on, not kept."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(()), None


def _computed(logits: Tensor) -> Tensor:
    return _Computed.apply(torch.ones((), requires_grad=True), logits)


def _backward(inplace: bool, reduction: str = "mean", leaf: bool = False) -> Callable[..., None]:
    def run(logits: Tensor, labels: Tensor) -> None:
        x = logits.requires_grad_() if leaf else _computed(logits)
        loss = eaft_ext.gated_ce(x, labels, reduction=reduction, inplace_backward=inplace)
        loss.backward(torch.ones_like(loss))
        assert not leaf or logits.grad is not None

    return run


def _module(logits: Tensor, labels: Tensor) -> None:
    criterion = eaft_ext.GatedCrossEntropyLoss(gate=eaft_ext.FocalGate(2.0), inplace_backward=True)
    criterion(_computed(logits), labels).backward()


def _forward_with_grad(logits: Tensor, labels: Tensor) -> None:
    upstream = torch.ones(len(labels))
    torch.ops.eaft_ext.gated_ce_forward_with_grad(
        upstream, logits, labels, 20, "entropy", [1.0], -100
    )


def _forward_with_grad_(logits: Tensor, labels: Tensor) -> None:
    upstream = torch.ones(len(labels))
    torch.ops.eaft_ext.gated_ce_forward_with_grad_(
        upstream, logits, labels, 20, "entropy", [1.0], -100
    )


def _shard_losses(
    logits: Tensor, labels: Tensor, gate: Any = None, inplace: bool = False
) -> Tensor:
    """The logits as a shard with padding, beside another one of which nothing is here but NaN."""
    shard = VocabShard(VOCAB_SIZE, 2 * VOCAB_SIZE - 100, None)

    def gather(partial: Tensor) -> Tensor:
        return torch.stack([torch.full_like(partial, float("nan")), partial])

    of_token = TokenLoss(20, eaft_ext.EntropyGate() if gate is None else gate, -100)
    here = labels % (VOCAB_SIZE - 100) + VOCAB_SIZE
    return token_losses(logits, here, of_token, shard, gather, inplace)[0]


def _shard_forward(logits: Tensor, labels: Tensor) -> None:
    _shard_losses(logits, labels)


def _shard_backward(inplace: bool, gate: Any = None, leaf: bool = False) -> Callable[..., None]:
    def run(logits: Tensor, labels: Tensor) -> None:
        x = logits.requires_grad_() if leaf else _computed(logits)
        _shard_losses(x, labels, gate, inplace).sum().backward()
        assert not leaf or logits.grad is not None

    return run


CASES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "forward": _forward,
    "forward_of_few_rows": _forward_of_few_rows,
    "topk": _topk,
    "in_place": _backward(inplace=True),
    "in_place_leaf": _backward(inplace=True, leaf=True),
    "in_place_unreduced": _backward(inplace=True, reduction="none"),
    "in_place_module": _module,
    "forward_with_grad_": _forward_with_grad_,
    "forward_with_grad": _forward_with_grad,
    "out_of_place": _backward(inplace=False),
    "out_of_place_leaf": _backward(inplace=False, leaf=True),
    "shard_forward": _shard_forward,
    "shard_in_place": _shard_backward(inplace=True),
    "shard_in_place_leaf": _shard_backward(inplace=True, leaf=True),
    "shard_in_place_callable": _shard_backward(True, lambda nll, entropy: entropy),
    "shard_out_of_place": _shard_backward(inplace=False),
    "shard_out_of_place_leaf": _shard_backward(inplace=False, leaf=True),
}


def main(megabytes: int) -> None:
    growth: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        num_rows = megabytes * MB // dtype.itemsize // VOCAB_SIZE
        labels = torch.randint(VOCAB_SIZE, (num_rows,))
        small = torch.randn(16, VOCAB_SIZE).to(dtype)
        for run in CASES.values():  # threads, caches and arenas
            run(small.clone(), labels[:16])
        for name, run in CASES.items():
            logits = torch.empty(num_rows, VOCAB_SIZE, dtype=dtype)
            for row in logits:  # without a temporary of the whole
                row.copy_(small[0])
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = resident("VmRSS")
            run(logits, labels)
            growth[f"{name} {str(dtype).removeprefix('torch.')}"] = resident("VmHWM") - before
            del logits
            gc.collect()
    print(json.dumps(growth))


if __name__ == "__main__":
    main(int(sys.argv[1]))
