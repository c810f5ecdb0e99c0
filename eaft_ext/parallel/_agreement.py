"""Whether the processes of a group mean the same call.

A collective whose processes bring different shapes, or which one of them never enters, hangs or
kills them. So they compare notes beforehand, through the store by which torch.distributed made them
known to each other: over gloo at every call; elsewhere, where the host shall run ahead of its
device, at a group's first call, and always with ``EAFT_EXT_CHECKS=1``.
"""

from __future__ import annotations

import itertools
import json
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from eaft_ext._checks import wants_value_checks
from eaft_ext.reference import PARTIAL_HEAD

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Note = dict[str, Any]

TIMEOUT = timedelta(minutes=30)  # as that of a collective
LOOKS = 50


class _Notebook:
    """This process's notes in the store of one ``init_process_group``."""

    def __init__(self) -> None:
        # Processes of a group make their calls in the same order, so they number them alike, also
        # a call that fails before its group is known.
        self.calls = itertools.count()
        # Of each group that has compared notes: the key of the last one.
        self.last_keys: dict[str, str] = {}


_notebooks: weakref.WeakKeyDictionary[Any, _Notebook] = weakref.WeakKeyDictionary()


def _open() -> tuple[Any, _Notebook]:
    store = dist.distributed_c10d._get_default_store()
    return store, _notebooks.setdefault(store, _Notebook())


def is_real(group: ProcessGroup) -> bool:
    """Whether there are other processes; a fake group answers for them, to try a program out."""
    return "fake" not in dist.get_backend_config(group)


def tell_failure(error: Exception) -> None:
    """Let the processes that wait for this one's note know why it makes no call."""
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return
    store, notebook = _open()
    _write(store, next(notebook.calls), {"error": type(error).__name__, "message": str(error)})


def check(op: str, group: ProcessGroup, device: torch.device, note: Note) -> None:
    """Raise in all processes what failed in one of them, or differs between their notes.

    A note has what must be the same, and ``columns``, the range of words of the shard.
    """
    store, notebook = _open()
    call = next(notebook.calls)
    name = group.group_name
    over_gloo = device.type == "cpu" and "gloo" in dist.get_backend_config(group)
    first = name not in notebook.last_keys
    if not (over_gloo or first or wants_value_checks()):
        return
    own = _write(store, call, note)
    notes = _read(op, store, call, dist.get_process_group_ranks(group))
    # All have written this note, so all have read the one before.
    if name in notebook.last_keys:
        store.delete_key(notebook.last_keys[name])
    notebook.last_keys[name] = own
    _compare(op, notes)


def check_labels(op: str, partials: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Raise for the first label that is in no shard or in several, or not the same in all."""
    if not (labels.device.type == "cpu" or wants_value_checks()):
        return
    label, rest, target = partials[..., :PARTIAL_HEAD].unbind(-1)
    differs = (label != labels).any(0)
    shards = (~target.isnan()).sum(0)
    # Where the shard's sum is NaN, so may the label's logit be.
    lost = (shards == 0) & ~rest.isnan().any(0)
    wrong = differs | ((labels != ignore_index) & (lost | (shards > 1)))
    for position in wrong.nonzero()[:1].tolist():
        at = (slice(None), *position)
        if differs[tuple(position)]:
            reason = f"differ: {[int(y) for y in label[at].tolist()]} in the processes of the group"
            raise ValueError(f"{op}: the labels at position {position} {reason}")
        where = (~target[at].isnan()).nonzero().flatten().tolist()
        reason = f"in the shards of processes {where}" if where else "in no shard"
        raise ValueError(
            f"{op}: the label at position {position} is {int(labels[tuple(position)])}, {reason} "
            f"and not ignore_index {ignore_index}"
        )


def _key(call: int, process: int) -> str:
    return f"eaft_ext/{call}/{process}"


def _write(store: Any, call: int, note: Note) -> str:
    key = _key(call, dist.get_rank())
    store.set(key, json.dumps(note))
    return key


def _read(op: str, store: Any, call: int, processes: list[int]) -> list[Note]:
    keys = [_key(call, process) for process in processes]
    try:
        # A store that is a file sleeps between two looks; the others are mostly here already.
        if not any(store.check(keys) for _ in range(LOOKS)):
            store.wait(keys, TIMEOUT)
    except dist.DistStoreError:
        absent = [p for p, key in zip(processes, keys, strict=True) if not store.check([key])]
        raise RuntimeError(
            f"{op}: processes {absent} did not make this call within {TIMEOUT}"
        ) from None
    return [json.loads(text) for text in store.multi_get(keys)]


def _compare(op: str, notes: list[Note]) -> None:
    for rank, note in enumerate(notes):
        if "error" in note:
            kind = TypeError if note["error"] == "TypeError" else ValueError
            raise kind(f"{op}: process {rank} of the group failed: {note['message']}")
    for rank, note in enumerate(notes[1:], 1):
        for name, value in note.items():
            if name != "columns" and value != notes[0][name]:
                raise ValueError(
                    f"{op}: processes of the group differ in {name}: {notes[0][name]} in process "
                    f"0, {value} in process {rank}"
                )
    end = 0
    for (start, stop), rank in sorted((note["columns"], rank) for rank, note in enumerate(notes)):
        if start == stop:
            continue
        if start != end:
            raise ValueError(
                f"{op}: the shards must follow each other without a gap from 0 on, and that of "
                f"process {rank} is [{start}, {stop}) after {end}; vocab_start says where a shard "
                "begins"
            )
        end = stop
    vocab_size = notes[0]["vocab_size"]
    if vocab_size is not None and end != vocab_size:
        raise ValueError(f"{op}: the shards have {end} words, and vocab_size is {vocab_size}")
