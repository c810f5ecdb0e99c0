"""Faults of compiled losses elsewhere, as tests: each says which library had it."""

from __future__ import annotations

import torch
from inputs import make

from eaft_ext import gated_ce


def test_ignored_rows_in_changing_shapes() -> None:
    """pytorch #183604, Liger #1338: wrong, or compiled anew, where rows and their masks change."""
    compiled = torch.compile(gated_ce, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_rows, ignored in ((7, 0.0), (12, 0.5), (5, 1.0), (20, 0.3)):
        logits, labels = make(num_rows, 97, ignored=ignored, seed=num_rows)
        gradients = []
        for function in (gated_ce, compiled):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf, labels)
            gradients.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(gradients[1], gradients[0])
