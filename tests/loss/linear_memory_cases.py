"""Run by test_memory.py: prints, as JSON, the memory that cases of the linear loss take, in chunks.

That is the peak beyond inputs and gradients, over the logits of one chunk of tokens.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory_cases import MB, resident

import eaft_ext
from eaft_ext.linear._chunks import default_chunk_size

HIDDEN, V = 64, 50257
IGNORED_OF = 7
"""One of so many tokens is ignored."""


def run(num_tokens: int, dtype: torch.dtype, **options: Any) -> Callable[[], int]:
    """A call that leaves its gradients, and says how many bytes they and sums in float32 have."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, HIDDEN, generator=generator).mul_(0.2).to(dtype).requires_grad_()
    bias = torch.zeros(V, dtype=dtype).requires_grad_() if options.pop("with_bias", False) else None
    labels = torch.randint(V, (num_tokens,), generator=generator)
    labels[::IGNORED_OF] = -100

    def call() -> int:
        eaft_ext.linear_gated_ce(hidden, weight, labels, bias, **options).sum().backward()
        has_sums = options.get("accumulate_in_float32") and dtype != torch.float32
        sums = 4 * weight.numel() if has_sums else 0
        return sum(t.grad.nbytes for t in (hidden, weight, bias) if t is not None) + sums

    return call


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "default": (1500, {}),
    "one_chunk": (150, {"chunk_size": 150}),
    "eight_chunks": (1024, {"chunk_size": 128}),
    "many_chunks": (4096, {"chunk_size": 128}),
    "per_token": (1024, {"chunk_size": 128, "reduction": "none"}),
    "bias": (1024, {"chunk_size": 128, "with_bias": True}),
    "float32_sums": (1024, {"chunk_size": 128, "accumulate_in_float32": True}),
    "own_gate": (1024, {"chunk_size": 128, "gate": lambda nll, entropy: entropy}),
}


def peaks(dtype: torch.dtype) -> dict[str, float]:
    """Of each case, what it takes beyond inputs and gradients, in chunks."""
    found = {}
    for name, (num_tokens, options) in CASES.items():
        kept = num_tokens - len(range(0, num_tokens, IGNORED_OF))
        row_bytes = V * dtype.itemsize
        size = options.get("chunk_size", default_chunk_size(kept, row_bytes, torch.device("cpu")))
        run(num_tokens, dtype, **options)()  # threads, caches and arenas
        call = run(num_tokens, dtype, **options)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        gradients = call()
        beyond = (resident("VmHWM") - before) * MB - gradients
        chunk = min(size, kept) * row_bytes
        found[f"{name} {str(dtype).removeprefix('torch.')}"] = beyond / chunk
    return found


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(peaks(torch.float32) | peaks(torch.bfloat16)))
