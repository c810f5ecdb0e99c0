"""The peak of memory that output layer and loss add, measured with all logits and without."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import eaft_ext
from eaft_ext.cli.batches import Batch

from .losses import CHUNK_TOKENS, fused_loss, hidden_states
from .precision import mixed_precision

MiB = 2**20

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")

DEFINITIONS = {
    "memory": "bytes, of output layer and loss, forward and backward, on the first training batch; "
    "before: in use with the inputs; peak: the most in use at once; gradients: of hidden states "
    "and output layer; beyond: peak - before - gradients; the second time that it is "
    "computed, so that what libraries keep for themselves is in before",
    "memory.fused": "linear_gated_ce, which holds the logits of chunk_tokens tokens at a time",
    "memory.unfused": "gated_ce of all logits, whose gradient overwrites them",
}

Gradients = tuple[torch.Tensor, ...]
Way = Callable[[torch.Tensor, torch.Tensor], Gradients]
"""Hidden states [b, s, H] and labels [b, s] to gradients of hidden states, weight and bias."""


@dataclass(frozen=True)
class Use:
    """Bytes in use before a computation, the most during it, and those of the gradients it made."""

    before: int
    peak: int
    gradients: int

    @property
    def beyond(self) -> int:
        """Return what the peak is beyond the inputs and the gradients."""
        return self.peak - self.before - self.gradients


@dataclass(frozen=True)
class LossMemory:
    """What output layer and loss use, both ways. ``tokens`` counts positions of the batch."""

    measure: str
    tokens: int
    vocabulary: int
    fused: Use
    unfused: Use

    def as_json(self) -> dict[str, Any]:
        """Return every number."""
        ways = {
            name: asdict(use) | {"beyond": use.beyond}
            for name, use in (("fused", self.fused), ("unfused", self.unfused))
        }
        return asdict(self) | {"chunk_tokens": CHUNK_TOKENS} | ways

    def sentence(self) -> str:
        """Return what was found, in MiB."""
        fused, unfused = (max(0, use.beyond) / MiB for use in (self.fused, self.unfused))
        return (
            f"Peak memory of output layer and loss, forward and backward, on the first batch of "
            f"{self.tokens} tokens, beyond inputs and gradients: {_mib(fused)} MiB with "
            f"linear_gated_ce ({CHUNK_TOKENS} tokens at a time), {_mib(unfused)} MiB with all "
            f"logits."
        )


@dataclass(frozen=True)
class NotMeasured:
    """Why there are no numbers."""

    reason: str

    def as_json(self) -> dict[str, Any]:
        """Return the reason."""
        return {"not_measured": self.reason}

    def sentence(self) -> str:
        """Return the reason."""
        return f"Peak memory of output layer and loss: not measured, {self.reason}."


def measure(model: Any, batch: Batch, k: int) -> LossMemory | NotMeasured:
    """Return the memory of both ways on the same hidden states of ``model``."""
    device = batch.input_ids.device
    meter = _meter(device)
    if meter is None:
        return NotMeasured(
            f"as that needs CUDA, or a CPU and Linux's {CLEAR_REFS}, and the device is {device}"
        )
    head = model.get_output_embeddings()
    gate = eaft_ext.EntropyGate()

    def gradients(loss: torch.Tensor, hidden: torch.Tensor) -> Gradients:
        return torch.autograd.grad(loss, [hidden, *head.parameters()])

    def fused(hidden: torch.Tensor, labels: torch.Tensor) -> Gradients:
        with mixed_precision(device):
            loss, _ = fused_loss(head, hidden, labels, k, gate)
        return gradients(loss, hidden)

    def unfused(hidden: torch.Tensor, labels: torch.Tensor) -> Gradients:
        with mixed_precision(device):
            logits = head(hidden)
        loss = eaft_ext.gated_ce(logits, labels, k, gate=gate, inplace_backward=True)
        return gradients(loss, hidden)

    with torch.no_grad(), mixed_precision(device):
        hidden = hidden_states(model, batch.input_ids)
    hidden.requires_grad_()
    used = []
    for way in (fused, unfused):
        way(hidden, batch.labels)  # libraries make workspaces for products of a size, and keep them
        used.append(_use(meter, device, way, hidden, batch.labels))
    return LossMemory(
        meter.description, batch.labels.numel(), head.weight.size(0), fused=used[0], unfused=used[1]
    )


def _use(
    meter: Meter,
    device: torch.device,
    way: Way,
    hidden: torch.Tensor,
    labels: torch.Tensor,
) -> Use:
    before = meter.start(device)
    made = way(hidden, labels)
    return Use(before, meter.peak(device), sum(gradient.nbytes for gradient in made))


class _Allocated:
    """Memory of a CUDA device, as PyTorch gives it to tensors."""

    description = "torch.cuda.max_memory_allocated"

    @staticmethod
    def start(device: torch.device) -> int:
        """Return what is in use; the peak starts anew."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    @staticmethod
    def peak(device: torch.device) -> int:
        """Return the most in use since the start."""
        return torch.cuda.max_memory_allocated(device)


class _Resident:
    """Memory of this process, as Linux sees it from outside."""

    description = "resident memory: VmHWM of /proc/self/status"

    @staticmethod
    def start(device: torch.device) -> int:
        """Return what is in use; the peak starts anew.

        What was freed goes back to the system first: used again it would not be seen.
        """
        gc.collect()
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:  # glibc's
            give_back(0)
        CLEAR_REFS.write_text("5")
        return _status("VmRSS")

    @staticmethod
    def peak(device: torch.device) -> int:
        """Return the most in use since the start."""
        return _status("VmHWM")


Meter = type[_Allocated] | type[_Resident]


def _meter(device: torch.device) -> Meter | None:
    if device.type == "cuda":
        return _Allocated
    if device.type == "cpu" and os.access(CLEAR_REFS, os.W_OK):
        return _Resident
    return None


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def _mib(amount: float) -> str:
    return f"{amount:.1f}" if amount < 10 else f"{amount:.0f}"
