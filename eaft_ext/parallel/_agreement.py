"""Whether the processes of a group mean the same call.

A collective whose processes bring different shapes, or which one of them never enters, hangs or
kills them. So they compare notes beforehand, through the store by which torch.distributed made them
known to each other: over gloo at every call; elsewhere, where the host shall run ahead of its
device, at a group's first call, and always with ``EAFT_EXT_CHECKS=1``.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from eaft_ext._checks import wants_value_checks
from eaft_ext._library import build_info
from eaft_ext._registration import ops
from eaft_ext.reference import PARTIAL_HEAD

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Note = dict[str, Any]

TIMEOUT = timedelta(minutes=30)  # for a group that does not say what it waits
VERSION = "the version of eaft_ext"
LOOKS = 20  # before the first sleep: mostly the others are here already
LONGEST_SLEEP = 0.1  # seconds


class _Notebook:
    """This process's calls since ``init_process_group``.

    The processes of a group make their calls in the same order, and so number them alike.
    """

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}  # of each group
        self.lives: dict[str, int] = {}  # of each group
        # Failed before their group was known. They count as calls of the group that comes next.
        self.lost = 0
        self.lost_in_all = 0
        self.looked_at: dict[int, int] = {}  # of each process: how many of its lost calls are past

    def begin(self, store: Any, group: ProcessGroup) -> _Call:
        """The call that begins."""
        name, size = group.group_name, group.size()
        if name not in self.lives:
            # The store may be that of an earlier init_process_group, with its notes in it.
            joined = store.add(f"eaft_ext/{name}/{size}", 1)
            self.lives[name] = (joined - 1) // size
        call = self.calls.get(name, 0) + self.lost
        self.calls[name] = call + 1
        self.lost = 0
        return _Call(f"eaft_ext/{name}/{self.lives[name]}", call)


class _Call(NamedTuple):
    """A call of a group."""

    folder: str
    number: int

    @property
    def page(self) -> str:
        """The key under which all processes write their notes, one in a line.

        Of one key whoever is far from the store learns in one round trip what all have written.
        """
        return f"{self.folder}/{self.number}"


def _write(store: Any, page: str, process: int, note: Note) -> None:
    # Nobody waits for an append to be answered.
    store.append(page, json.dumps({"process": process} | note) + "\n")


def _written(store: Any, page: str) -> dict[int, Note]:
    """The notes of those who have written one, among them this process."""
    # Unlike get(), this does not ask first whether there is something; nothing is set.
    lines = store.compare_set(page, "\n", "\n").decode().splitlines()
    notes: list[Note] = [json.loads(line) for line in lines]
    return {note.pop("process"): note for note in notes}


# Kept where the operators are: a second import of this module, in one process of a group alone,
# shall go on with the numbers of the first.
_notebooks: weakref.WeakKeyDictionary[Any, _Notebook] = vars(ops).setdefault(
    "notebooks", weakref.WeakKeyDictionary()
)


def _open() -> tuple[Any, _Notebook]:
    store = dist.distributed_c10d._get_default_store()
    if store not in _notebooks:
        _notebooks[store] = _Notebook()
    return store, _notebooks[store]


def is_real(group: ProcessGroup) -> bool:
    """Whether there are other processes; a fake group answers for them, to try a program out."""
    return "fake" not in dist.get_backend_config(group)


def tell_failure(error: Exception, group: ProcessGroup | None) -> None:
    """Let the processes that wait for this one's note know why it makes no call."""
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return
    world = dist.group.WORLD
    if world is None or not is_real(world):
        return
    store, notebook = _open()
    kind = next(k for k in (TypeError, ValueError, Exception) if isinstance(error, k))
    # Of several lines, as torch's errors have them, the first says it.
    sentence = next(iter(str(error).splitlines()), "") or type(error).__name__
    note: Note = {"error": kind.__name__, "message": sentence}
    if group is None:
        note |= {"calls": notebook.calls, "lives": notebook.lives, "lost": notebook.lost}
        notebook.lost += 1
        notebook.lost_in_all = store.add(f"eaft_ext/lost/{dist.get_rank()}", 1)
        store.set(_lost_key(dist.get_rank(), notebook.lost_in_all - 1), json.dumps(note))
    else:
        _write(store, notebook.begin(store, group).page, dist.get_rank(), note)


class NotInGroupError(ValueError):
    """Nobody waits for this process."""


@dataclass
class Others:
    """Who waits for this process: a group, or, before that is known, whoever may."""

    group: ProcessGroup | None = None
    are_none: bool = False

    def are(self, group: ProcessGroup | None) -> None:
        """Say who waits; None: nobody."""
        self.group = group
        self.are_none = group is None or group.size() == 1


@contextmanager
def told_to_others() -> Iterator[Others]:
    """What is raised in here makes no call, and the processes that wait for it learn why."""
    others = Others()
    try:
        yield others
    except NotInGroupError:
        raise
    except Exception as error:
        if not others.are_none:
            tell_failure(error, others.group)
        raise


def check(
    op: str,
    group: ProcessGroup,
    device: torch.device,
    note: Note,
    fingerprint: Callable[[], int | None] | None = None,
) -> None:
    """Raise in all processes what failed in one of them, or differs between their notes.

    A note has what must be the same, and ``columns``, the range of words of the shard.
    ``fingerprint`` is called if notes are compared: what it gives is of this shard alone, unless it
    is no shard.
    """
    if group.size() == 1:
        _compare(op, {dist.get_rank(): note})
        return
    store, notebook = _open()
    call = notebook.begin(store, group)
    over_gloo = device.type == "cpu" and "gloo" in dist.get_backend_config(group)
    if not (over_gloo or call.number == 0 or wants_value_checks()):
        return
    own = dist.get_rank()
    note["fingerprint"] = None if fingerprint is None else fingerprint()
    note[VERSION] = build_info()["version"]
    _write(store, call.page, own, note | {"lost": notebook.lost_in_all})
    notes = _read(op, store, notebook, group, call, _timeout_of(group, device))
    for process, its_note in notes.items():
        lost = its_note.pop("lost", 0)
        notebook.looked_at[process] = max(lost, notebook.looked_at.get(process, 0))
    # All have written this note, so all have read those before. Whoever failed does not come here.
    if call.number > 0 and own == next(p for p, it in notes.items() if "error" not in it):
        store.delete_key(call._replace(number=call.number - 1).page)
    _compare(op, notes)


def check_labels(
    op: str,
    partials: Tensor,
    labels: Tensor,
    ignore_index: int,
    place: Callable[[int], list[int]] | None = None,
) -> None:
    """Raise for the first label that is in no shard or in several, or not the same in all.

    ``place`` tells the position of a row of labels that were taken out of others.
    """
    # Other types than a plain tensor's may have no values to look at.
    if type(labels) is not Tensor or not (labels.device.type == "cpu" or wants_value_checks()):
        return
    label, rest, target = partials[..., :PARTIAL_HEAD].unbind(-1)
    differs = (label != labels).any(0)
    shards = (~target.isnan()).sum(0)
    # Where the shard's sum is NaN, so may the label's logit be.
    lost = (shards == 0) & ~rest.isnan().any(0)
    wrong = differs | ((labels != ignore_index) & (lost | (shards > 1)))
    for position in wrong.nonzero()[:1].tolist():
        own = tuple(position)
        at = (slice(None), *own)
        if place is not None:
            position = place(*own)
        if differs[own]:
            reason = f"differ: {[int(y) for y in label[at].tolist()]} in the processes of the group"
            raise ValueError(f"{op}: the labels at position {position} {reason}")
        where = (~target[at].isnan()).nonzero().flatten().tolist()
        reason = f"in the shards of processes {where}" if where else "in no shard"
        raise ValueError(
            f"{op}: the label at position {position} is {int(labels[own])}, {reason} "
            f"and not ignore_index {ignore_index}"
        )


def _lost_key(process: int, number: int) -> str:
    return f"eaft_ext/lost/{process}/{number}"


def _timeout_of(group: ProcessGroup, device: torch.device) -> timedelta:
    """How long a collective of the group would wait."""
    try:
        timeout: timedelta = group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return TIMEOUT
    return timeout


def _read(
    op: str,
    store: Any,
    notebook: _Notebook,
    group: ProcessGroup,
    call: _Call,
    timeout: timedelta,
) -> dict[int, Note]:
    """The notes of all processes of the group, when all have written them."""
    processes = dist.get_process_group_ranks(group)
    deadline = time.monotonic() + timeout.total_seconds()
    looks, sleep = 0, 1e-4
    while len(notes := _written(store, call.page)) < len(processes):
        looks += 1
        if looks < LOOKS:
            continue
        absent = [process for process in processes if process not in notes]
        for process in absent:
            _raise_if_lost(op, store, notebook, group, call, process)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{op}: processes {absent} did not make this call within {timeout}")
        time.sleep(sleep)
        sleep = min(2 * sleep, LONGEST_SLEEP)
    return {process: notes[process] for process in processes}


def _raise_if_lost(
    op: str, store: Any, notebook: _Notebook, group: ProcessGroup, call: _Call, process: int
) -> None:
    """If that process failed in this call, and did not know with whom."""
    number = notebook.looked_at.get(process, 0)
    while store.check([_lost_key(process, number)]):
        note = json.loads(store.get(_lost_key(process, number)))
        number += 1
        notebook.looked_at[process] = number
        name = group.group_name
        same_life = note["lives"].get(name, 0) == notebook.lives[name]
        if same_life and note["calls"].get(name, 0) + note["lost"] == call.number:
            _raise(op, process, note)


def _raise(op: str, process: int, note: Note) -> NoReturn:
    kinds: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}
    kind = kinds.get(note["error"], RuntimeError)
    raise kind(f"{op}: process {process} failed: {note['message'].removeprefix(f'{op}: ')}")


def _compare(op: str, notes: dict[int, Note]) -> None:
    for process, note in notes.items():
        if "error" in note:
            _raise(op, process, note)
    (first, its_note), *others = notes.items()
    for process, note in others:
        # The version comes first: in another one, there may be more to agree on, or less.
        for name in {VERSION: None} | its_note | note:
            mine, its = its_note.get(name), note.get(name)
            if name not in ("columns", "fingerprint") and mine != its:
                raise ValueError(
                    f"{op}: processes of the group differ in {name}: {mine} in process {first}, "
                    f"{its} in process {process}"
                )
    end = 0
    for (start, stop), process in sorted((note["columns"], p) for p, note in notes.items()):
        if start == stop:
            continue
        if start != end:
            raise ValueError(
                f"{op}: the shards must follow each other without a gap from 0 on, and that of "
                f"process {process} is [{start}, {stop}) after {end}; vocab_start says where a "
                "shard begins"
            )
        end = stop
    vocab_size = its_note["vocab_size"]
    if vocab_size is not None and end != vocab_size:
        raise ValueError(f"{op}: the shards have {end} words, and vocab_size is {vocab_size}")
    _check_different(op, notes, end)


def _check_different(op: str, notes: dict[int, Note], total: int) -> None:
    """Whole rows would be taken for shards of a vocabulary as many times as large."""
    holders: dict[int, list[int]] = {}
    for process, note in notes.items():
        if note.get("fingerprint") is not None:
            holders.setdefault(note["fingerprint"], []).append(process)
    for processes in holders.values():
        if len(processes) == 1:
            continue
        start, stop = notes[processes[0]]["columns"]
        whole = (
            "a whole weight is for eaft_ext.linear_gated_ce"
            if "linear" in op
            else "gathered logits are for eaft_ext.gated_ce"
        )
        raise ValueError(
            f"{op}: processes {processes} have the same numbers for {stop - start} words, and all "
            f"labels are below {stop - start}: these are no shards of {total} words; {whole}, and "
            "here each process gives its own part (parallel_output=True in Megatron-Core), or "
            f"vocab_size={total} where they are right"
        )
