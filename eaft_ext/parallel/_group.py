"""The processes that share a vocabulary, and per-token losses over all of their shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from eaft_ext._dispatch import is_transformed
from eaft_ext._options import Reduce, TokenLoss
from eaft_ext.gates import Gate, GateFunction, is_built_in
from eaft_ext.parallel import _agreement
from eaft_ext.parallel._agreement import NotInGroupError
from eaft_ext.parallel._shard import VocabShard, num_words, token_losses
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Member(NamedTuple):
    """This process in its group."""

    group: ProcessGroup
    rank: int
    size: int


def check_group(op: str, group: ProcessGroup | DeviceMesh) -> Member:
    """Raise unless this process is in the group."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{op}: torch.distributed has no process group; call init_process_group")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{op}: group must be one dimension of a DeviceMesh, such as mesh['tp'], got one "
                f"of {group.ndim} dimensions"
            )
        _check_inside(op, group.get_coordinate() is not None)
        group = group.get_group()
    # What new_group() gives to those that are not in it is a number.
    _check_inside(op, not isinstance(group, int))
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: group must be the ProcessGroup whose processes share the vocabulary, got "
            f"{group!r}; torch.distributed.group.WORLD is that of all"
        )
    rank = dist.get_rank(group)
    _check_inside(op, rank >= 0)
    return Member(group, rank, dist.get_world_size(group))


def check_shard(
    op: str, columns: int, member: Member, vocab_start: int | None, vocab_size: int | None
) -> VocabShard:
    """The shard of this process, which has so many columns."""
    for name, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be an int, got {value!r}")
        if value < 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {value}")
    if vocab_start is None:  # all shards are alike
        total = member.size * columns
        return VocabShard(
            member.rank * columns, vocab_size, total if vocab_size is None else vocab_size
        )
    return VocabShard(vocab_start, vocab_size, vocab_size)


def _check_inside(op: str, is_inside: bool) -> None:
    if not is_inside:
        raise NotInGroupError(f"{op}: process {dist.get_rank()} is not in the group")


@dataclass(frozen=True)
class Words:
    """Where the words of a call are: this process's shard, and who has the others."""

    shard: VocabShard
    member: Member | None
    """None: nobody has."""
    is_assumed: bool = False
    """Nobody said which shard it is."""

    @property
    def group(self) -> ProcessGroup | None:
        """The processes that have the others."""
        return None if self.member is None else self.member.group

    @property
    def can_check(self) -> bool:
        """Whether there are values to look at, and others to compare them with."""
        return not torch.compiler.is_compiling() and (
            self.group is None or _agreement.is_real(self.group)
        )

    def note(self, num_columns: int, of_token: TokenLoss, reduce: Reduce) -> _agreement.Note:
        """What processes compare of their options and shards."""
        options = {
            field.name: getattr(of_token, field.name) for field in fields(of_token) if field.compare
        }
        shard = self.shard
        return options | {
            "gate": _name_of(of_token.gate),
            "reduction": reduce.reduction,
            "num_items_in_batch": _number_of(reduce.num_items_in_batch),
            "return_stats='full'": of_token.tells_entropy,
            "the sum of token_weight": _sum_of(reduce.token_weight),
            "vocab_size": shard.vocab_size,
            "columns": [shard.start, shard.start + num_words(num_columns, shard)],
        }


def group_losses(
    op: str,
    logits: Tensor,
    labels: Tensor,
    of_token: TokenLoss,
    reduce: Reduce,
    words: Words,
    inplace_backward: bool,
) -> tuple[Tensor, TokenStats]:
    """Per-token losses and stats, the same in all processes of the group.

    How they are reduced is only compared. Without a group the shard is all there is.
    """
    member, group, checks = words.member, words.group, words.can_check

    def compare() -> None:
        if group is None or not checks:
            return
        note = {
            "the shape of the tokens": list(labels.shape),
            "the dtype of the logits": str(logits.dtype),
            "the device of the logits": logits.device.type,
        }
        note |= words.note(logits.size(-1), of_token, reduce)

        def row(token: tuple[int, ...], columns: slice) -> Tensor:
            return logits.detach()[token][columns]

        evidence = partial(fingerprint, labels, of_token.ignore_index, logits.size(-1), row)
        _agreement.check(op, group, logits.device, note, evidence if words.is_assumed else None)

    def gather(partial: Tensor) -> Tensor:
        # From here on the others know by themselves, from the notes or from the exchange.
        others.are(None)
        compare()
        if member is None or member.size == 1:
            partials = partial.unsqueeze(0)
        else:
            partials = all_gather(partial, member.group.group_name, member.size)
        if checks:
            _agreement.check_labels(op, partials, labels, of_token.ignore_index)
        return partials

    # What a shard tells is made before notes are compared: without memory for it, all hear of that.
    with _agreement.told_to_others() as others:
        others.are(group if checks else None)
        return token_losses(logits, labels, of_token, words.shard, gather, inplace_backward)


FINGERPRINT_WORDS = 64

Row = Callable[[tuple[int, ...], slice], Tensor]
"""From the position of a token, and some words of this shard, to their logits."""


def fingerprint(labels: Tensor, ignore_index: int, columns: int, row: Row) -> int | None:
    """A hash of some logits, by which whole rows in every process are known; None: they are shards.

    A label beyond the first shard shows that there are others, and shards may be equal; a row of
    one number, as a weight of zeros gives it, is so in all.
    """
    # There may be no values to look at, or nobody may wait for them.
    if is_transformed() or type(labels) is not Tensor or labels.is_meta or labels.numel() == 0:
        return None
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    label = labels.masked_fill(labels == ignore_index, -1).max()
    if not 0 <= label < columns:
        return None
    token = tuple((labels == label).nonzero()[0].tolist())
    logits = row(token, slice(None, None, -(-columns // FINGERPRINT_WORDS))).tolist()
    is_constant = len({x for x in logits if math.isfinite(x)}) < 2
    return None if is_constant else hash(tuple(logits))


def _sum_of(token_weight: Tensor | None) -> str | None:
    """The same in all processes that have the same weights; NaN, too."""
    if token_weight is None or type(token_weight) is not Tensor or token_weight.is_meta:
        return None if token_weight is None else "given"
    return str(token_weight.sum(dtype=torch.float64).item())


def _number_of(num_items: float | Tensor | None) -> str | None:
    """The same in all processes that have the same number, which may be where no host reads it."""
    if num_items is None:
        return None
    if isinstance(num_items, Tensor) and (
        type(num_items) is not Tensor or num_items.device.type != "cpu"
    ):
        return "a tensor"
    return str(float(num_items))


def _name_of(gate: Gate | GateFunction) -> str:
    """What tells gates apart, and is the same in all processes."""
    return repr(gate) if is_built_in(gate) else getattr(gate, "__qualname__", type(gate).__name__)


# The functional form of collectives: torch.compile keeps them in its graph.


def all_gather(partial: Tensor, group: str, size: int) -> Tensor:
    """The partials of all processes of a group, by its name."""
    collectives = torch.ops._c10d_functional
    rows = partial.view(-1, partial.size(-1))
    gathered = collectives.all_gather_into_tensor(rows, size, group)
    partials: Tensor = collectives.wait_tensor(gathered)
    return partials.view(size, *partial.shape)


def all_reduce(part: Tensor, group: str) -> Tensor:
    """The sum of the parts of all processes of a group, by its name, in the memory of the part."""
    collectives = torch.ops._c10d_functional
    total: Tensor = collectives.wait_tensor(collectives.all_reduce_(part, "sum", group))
    return total
