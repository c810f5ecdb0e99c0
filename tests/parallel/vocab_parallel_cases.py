"""Calls that every process of a group makes, each for its shard of the vocabulary."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import make, upstream_of
from torch import Tensor, nn

from eaft_ext import (
    ConflictGate,
    EntropyGate,
    FocalGate,
    HardGate,
    NoGate,
    PowerGate,
    ProbabilityGate,
    SigmoidGate,
    ThresholdGate,
    vocab_parallel_gated_ce,
)

NUM_ROWS = 12
WORDS = 240

GATES: dict[str, Any] = {
    "entropy": EntropyGate(),
    "entropy_2": EntropyGate(2.0),
    "entropy_over_3": EntropyGate(0.5, 3.0),
    "sigmoid": SigmoidGate(),
    "hard": HardGate(0.5),
    "conflict": ConflictGate(0.5, 0.1),
    "probability": ProbabilityGate(),
    "power": PowerGate(0.5),
    "threshold": ThresholdGate(0.1),
    "focal": FocalGate(2.0),
    "none": NoGate(),
    "callable": lambda nll, entropy: nll / (1 + entropy),
}


def _leave(labels: Tensor, words: int, world_size: int) -> Tensor:
    return labels


def _in_the_first(labels: Tensor, words: int, world_size: int) -> Tensor:
    return labels % (words // world_size)


def _in_the_last(labels: Tensor, words: int, world_size: int) -> Tensor:
    return words - 1 - labels % (words // world_size)


class Case(NamedTuple):
    """A call that all processes make, each for its shard."""

    options: dict[str, Any] = {}  # noqa: RUF012, nobody changes it
    words: int = WORDS
    padding: int = 0
    uneven: bool = False
    dtype: torch.dtype = torch.float32
    ignored: float = 0.2
    num_rows: int = NUM_ROWS
    change: Callable[[Tensor, int, int], Tensor] = _leave
    shape: Callable[[Tensor], Tensor] = lambda x: x
    nan_at: tuple[int | None, ...] = ()
    """Columns of NaN in the third row; None: that of its label."""

    def widths(self, world_size: int) -> list[int]:
        columns = self.words + self.padding
        if not self.uneven:
            return [columns // world_size] * world_size
        parts = [columns // 2**i for i in range(1, world_size)]
        return [*parts, columns - sum(parts)]

    def inputs(self, world_size: int) -> tuple[Tensor, Tensor]:
        """Logits of all words, without padding, and labels."""
        logits, labels = make(self.num_rows, self.words, self.dtype, ignored=self.ignored)
        changed = self.change(labels, self.words, world_size)
        labels = torch.where(labels == -100, labels, changed)
        for column in self.nan_at:
            logits[2, labels[2] if column is None else column] = float("nan")
        return self.shape(logits), self.shape(labels[:, None])[..., 0]


def _sequence_first(x: Tensor) -> Tensor:
    return x.view(4, NUM_ROWS // 4, -1).transpose(0, 1)


def _cut_off(x: Tensor) -> Tensor:
    return x.view(3, NUM_ROWS // 3, -1)[:, :-1]


NONE = {"reduction": "none"}

CASES: dict[str, Case] = {
    "default": Case(),
    **{f"gate_{name}": Case({"gate": gate} | NONE) for name, gate in GATES.items()},
    "alpha_and_normalizer": Case({"alpha": 2.0, "normalizer": 1.5}),
    "family": Case(
        {"softcap": 5.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2} | NONE
    ),
    "family_uneven": Case({"softcap": 5.0, "z_loss": 1e-2}, words=247, uneven=True),
    "family_callable": Case({"logit_scale": 0.5, "z_loss": 1e-2, "gate": GATES["callable"]}),
    "family_in_place": Case({"softcap": 5.0, "z_loss": 1e-2, "inplace_backward": True}),
    "whole_entropy": Case({"k": None} | NONE),
    "whole_entropy_family": Case(
        {"k": None, "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-2}, dtype=torch.bfloat16
    ),
    "whole_entropy_callable": Case({"k": None, "gate": GATES["callable"], "z_loss": 1e-2} | NONE),
    "whole_entropy_uneven": Case(
        {"k": None, "return_stats": "full"} | NONE, words=200, padding=23, uneven=True
    ),
    "whole_entropy_in_place": Case({"k": None, "inplace_backward": True}),
    "full_stats": Case({"return_stats": "full"} | NONE),
    "full_stats_smoothed": Case({"return_stats": "full", "label_smoothing": 0.1}),
    "full_stats_callable": Case(
        {"return_stats": "full", "gate": GATES["callable"], "z_loss": 1e-2} | NONE
    ),
    "full_stats_uneven": Case({"return_stats": "full", "z_loss": 1e-2}, words=247, uneven=True),
    "token_weight": Case({"token_weight": torch.linspace(0, 2, NUM_ROWS)}),
    "sum": Case({"reduction": "sum"}),
    "items": Case({"num_items_in_batch": 37}),
    "items_in_a_tensor": Case({"num_items_in_batch": torch.tensor(37)}),
    "no_items": Case({"num_items_in_batch": 0}, ignored=1.0),
    "ignore_index": Case(
        {"ignore_index": 7} | NONE, ignored=0.0, change=lambda y, *_: y.masked_fill(y < 90, 7)
    ),
    "labels_in_the_first_shard": Case(NONE, change=_in_the_first),
    "labels_in_the_last_shard": Case(NONE, change=_in_the_last),
    "all_ignored": Case(ignored=1.0),
    "all_ignored_unreduced": Case(NONE, ignored=1.0),
    "no_rows": Case(num_rows=0),
    "k_above_a_shard": Case(NONE, words=24),
    "k_above_the_vocabulary": Case(NONE, words=12),
    "k_above_the_vocabulary_callable": Case({"gate": GATES["callable"]} | NONE, words=12),
    "k_128": Case({"k": 128} | NONE),
    "k_2": Case({"k": 2} | NONE),
    "uneven": Case(NONE, words=247, uneven=True),
    "uneven_callable": Case({"gate": GATES["callable"]} | NONE, words=247, uneven=True),
    "uneven_with_empty_shards": Case(NONE, words=2, uneven=True),
    "uneven_and_padded": Case(NONE, words=200, padding=23, uneven=True),
    "padded": Case(NONE, words=233, padding=7),
    "shards_of_padding": Case(NONE, words=50, padding=190),
    "bfloat16": Case(NONE, dtype=torch.bfloat16),
    "bfloat16_mean": Case(dtype=torch.bfloat16),
    "float16": Case(NONE, dtype=torch.float16),
    "float64": Case(NONE, dtype=torch.float64),
    "sequence_first": Case(NONE, shape=_sequence_first),
    "cut_off": Case(shape=_cut_off),
    "nan_at_a_label": Case(NONE, nan_at=(None,)),
    "nan_beside_a_label": Case(NONE, nan_at=(0, WORDS - 1)),
    "in_place": Case({"inplace_backward": True}),
    "in_place_and_padded": Case({"inplace_backward": True} | NONE, words=233, padding=7),
}
SUFFICE_FOR_ONE = (
    "default",
    "gate_callable",
    "padded",
    "in_place",
    "all_ignored",
    "no_rows",
    "whole_entropy_uneven",
)
"""Cases of a group of one process, where there is little to go wrong."""


def cases_of(world_size: int) -> list[str]:
    return [name for name in CASES if world_size > 1 or name in SUFFICE_FOR_ONE]


class Process:
    """This process of the group, and what it saves."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, folder
        self.world = None

    def save(self, name: str, values: Any) -> None:
        torch.save(values, self.folder / f"{name}.{self.rank}.pt")

    def run(self, name: str, body: Callable[[], Any]) -> None:
        """Save what body gives, or why it gives nothing."""
        try:
            self.save(name, body())
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            self.save(name, {"raised": (kinds, str(error), traceback.format_exc())})

    def inputs(self, case: Case) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Logits of this shard, with NaN as padding, labels and options."""
        logits, labels = case.inputs(self.world_size)
        options: dict[str, Any] = {"group": self.world, **case.options}
        if case.padding:
            logits = nn.functional.pad(logits, (0, case.padding), value=float("nan"))
            options["vocab_size"] = case.words
        widths = case.widths(self.world_size)
        start = sum(widths[: self.rank])
        if case.uneven:
            options["vocab_start"] = start
        shard = logits[..., start : start + widths[self.rank]]
        # As a process has it: rows with a place of their own, in the order that the whole has.
        return shard.detach().clone(memory_format=torch.preserve_format), labels, options

    def outcome(self, case: Case, **changed: Any) -> dict[str, Tensor]:
        """Loss, stats and gradient."""
        shard, labels, options = self.inputs(case)
        shard.requires_grad_()
        loss, stats = vocab_parallel_gated_ce(
            shard, labels, **{"return_stats": True} | options | changed
        )
        loss.backward(upstream_of(labels).to(loss.dtype) if loss.dim() else None)
        found = {"loss": loss.detach(), "gradient": shard.grad}
        return found | stats._asdict()

    def loss(self, **changed: Any) -> Tensor:
        """Of the default case, with changed arguments."""
        shard, labels, options = self.inputs(CASES["default"])
        arguments = {"logits_shard": shard, "labels": labels} | options | changed
        return vocab_parallel_gated_ce(**arguments)
