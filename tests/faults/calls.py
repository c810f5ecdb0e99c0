"""Calls that faults are tried on: every public way to a loss and its gradients, small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from inputs import make
from linear_cases import linear_inputs
from torch import Tensor
from vocab_shards import losses_of_shards, shards_at

import eaft_ext

Call = Callable[[], list[Tensor]]

ROWS, WORDS, LONG = 24, 3001, 100_001


def own_gate(nll: Tensor, entropy: Tensor) -> Tensor:
    """One that no kernel knows."""
    return entropy / (1 + nll)


def _of_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, **how: object) -> Call:
    logits, labels = make(num_rows, vocab_size, dtype, ignored=0.2)

    def call() -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        loss = eaft_ext.gated_ce(leaf, labels, **how)  # type: ignore[arg-type]
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]

    return call


def _linear(dtype: torch.dtype, **how: object) -> Call:
    *tensors, labels = linear_inputs(ROWS, WORDS, dtype, hidden_size=48)

    def call() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        hidden, weight, bias = leaves
        loss = eaft_ext.linear_gated_ce(hidden, weight, labels, bias, **how)  # type: ignore[arg-type]
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    return call


def _topk() -> list[Tensor]:
    logits, _ = make(3, LONG)
    return list(eaft_ext.topk(logits, 20))


def _shards() -> list[Tensor]:
    logits, labels = make(ROWS, WORDS, ignored=0.2)
    places = shards_at(logits.requires_grad_(), [WORDS // 2, WORDS - WORDS // 2])
    loss = losses_of_shards(places, labels)[0].loss
    return [loss.detach(), *torch.autograd.grad(loss.sum(), logits)]


CALLS: dict[str, Call] = {
    "gated_ce": _of_logits(ROWS, WORDS, torch.float32),
    "few_long_rows": _of_logits(3, LONG, torch.float32, k=128),
    "bfloat16": _of_logits(ROWS, WORDS, torch.bfloat16, reduction="none"),
    "whole_entropy": _of_logits(3, LONG, torch.float32, k=None),
    "in_place": _of_logits(ROWS, WORDS, torch.float32, inplace_backward=True),
    "gradient_in_forward": _of_logits(ROWS, WORDS, torch.float32, gradient_in_forward=True),
    "own_gate": _of_logits(ROWS, WORDS, torch.float32, gate=own_gate, z_loss=1e-3),
    "linear": _linear(torch.float32, chunk_size=7),
    "linear_unreduced": _linear(torch.float32, chunk_size=7, reduction="none"),
    "linear_bfloat16": _linear(torch.bfloat16, chunk_size=7, accumulate_in_float32=True),
    "linear_dropped": _linear(torch.float32, chunk_size=7, drop_below=0.2),
    "shards": _shards,
    "topk": _topk,
}
