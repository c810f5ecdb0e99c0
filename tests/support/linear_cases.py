"""Inputs of the linear loss, and its parity with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN, V = 16, 50
"""Features, and words that neither 3 nor 4 processes can share evenly."""


def linear_inputs(
    num_tokens: int = 13,
    vocab_size: int = V,
    dtype: torch.dtype = torch.float32,
    *,
    hidden_size: int = HIDDEN,
    ignored: float = 0.2,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden (num_tokens, H), weight (V, H), bias (V) and labels (num_tokens), some ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    drop = torch.rand(num_tokens, generator=generator) < ignored
    # Logits with a standard deviation of 1.5: each is a sum in float32, and known to some epsilons
    # of its largest term.
    weight *= 1.5 / hidden_size**0.5
    hidden, weight, bias = (tensor.to(dtype).to(device) for tensor in (hidden, weight, bias))
    return hidden, weight, bias, labels.masked_fill(drop, -100).to(device)
