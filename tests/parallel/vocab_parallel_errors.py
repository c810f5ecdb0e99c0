"""Wrong calls and other groups: what they give in every process, and what comes after them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from inputs import upstream_of
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from vocab_parallel_cases import CASES, WORDS, Process

from eaft_ext import HardGate, NoGate, vocab_parallel_gated_ce


def _at_2(labels: Tensor, label: int) -> Tensor:
    changed = labels.clone()
    changed[2] = label
    return changed


Change = Callable[[Process, Tensor, Tensor, bool], dict[str, Any]]
"""From this process, its logits, labels and whether it is the one that errs, to its arguments."""

# What one process does wrong, the last one; the others make the default call.
ONE_ERRS: dict[str, Change] = {
    "labels_of_a_wrong_shape": lambda p, x, y, _: {"labels": y[:3]},
    "labels_that_are_no_tensor": lambda p, x, y, _: {"labels": None},
    "labels_of_a_wrong_dtype": lambda p, x, y, _: {"labels": y.float()},
    "another_number_of_tokens": lambda p, x, y, _: {"logits_shard": x[:3], "labels": y[:3]},
    "no_tokens": lambda p, x, y, _: {"logits_shard": x[:0], "labels": y[:0]},
    "another_shape_of_as_many": lambda p, x, y, _: {
        "logits_shard": x.unflatten(0, (3, -1)),
        "labels": y.view(3, -1),
    },
    "another_dtype": lambda p, x, y, _: {"logits_shard": x.double()},
    "an_unsupported_dtype": lambda p, x, y, _: {"logits_shard": x.int()},
    "another_k": lambda p, x, y, _: {"k": 7},
    "no_k": lambda p, x, y, _: {"k": None},
    "a_wrong_k": lambda p, x, y, _: {"k": 999},
    "a_k_that_is_no_int": lambda p, x, y, _: {"k": 20.0},
    "another_gate": lambda p, x, y, _: {"gate": NoGate()},
    "another_parameter_of_the_gate": lambda p, x, y, _: {"gate": HardGate(0.25)},
    "a_gate_that_is_none": lambda p, x, y, _: {"gate": 3},
    "gate_and_alpha": lambda p, x, y, _: {"gate": NoGate(), "alpha": 2.0},
    "another_reduction": lambda p, x, y, _: {"reduction": "none"},
    "a_wrong_reduction": lambda p, x, y, _: {"reduction": "avg"},
    "another_ignore_index": lambda p, x, y, _: {"ignore_index": 3},
    "another_vocab_size": lambda p, x, y, _: {"vocab_size": WORDS - 1},
    "other_stats": lambda p, x, y, _: {"return_stats": "full"},
    "wrong_stats": lambda p, x, y, _: {"return_stats": "all"},
    "a_wrong_number_of_items": lambda p, x, y, _: {"num_items_in_batch": -1},
    "no_group": lambda p, x, y, _: {"group": None},
    "a_group_that_is_none": lambda p, x, y, _: {"group": "tp"},
    "a_negative_start": lambda p, x, y, _: {"vocab_start": -1},
    "a_start_that_is_no_int": lambda p, x, y, _: {"vocab_start": 1.0},
    "a_start_of_true": lambda p, x, y, _: {"vocab_start": True},
    "a_vocab_size_that_is_no_int": lambda p, x, y, _: {"vocab_size": 240.0},
    "overlap": lambda p, x, y, _: {"vocab_start": (p.world_size - 1) * x.size(-1) - 1},
    "gap": lambda p, x, y, _: {"vocab_start": (p.world_size - 1) * x.size(-1) + 1},
    "another_width": lambda p, x, y, _: {"logits_shard": x[..., 1:]},
    "labels_differ": lambda p, x, y, _: {"labels": _at_2(y, 5)},
    "ignored_by_one_alone": lambda p, x, y, _: {"labels": _at_2(y, -100)},
}

# And what all of them do.
ALL_ERR: dict[str, Change] = {
    "a_label_in_no_shard": lambda p, x, y, _: {"labels": _at_2(y, WORDS)},
    "a_label_below_all_shards": lambda p, x, y, _: {"labels": _at_2(y, -1)},
    "a_label_in_the_padding": lambda p, x, y, _: {
        "labels": _at_2(y % 10, WORDS - 1),
        "vocab_size": WORDS - 1,
    },
    "vocab_size_beyond_the_shards": lambda p, x, y, _: {"vocab_size": WORDS + 1},
    "all_shards_at_the_start": lambda p, x, y, _: {"vocab_start": 0},
    "a_first_shard_that_is_not_first": lambda p, x, y, _: {"vocab_start": 5 + p.rank * x.size(-1)},
    "errors_of_several": lambda p, x, y, errs: (
        {"k": 1} if p.rank == 0 else {"labels": y.float()} if errs else {}
    ),
    "no_group_anywhere": lambda p, x, y, _: {"group": None},
}

ERRORS = ONE_ERRS | ALL_ERR
OF_A_SINGLE_PROCESS = (
    "labels_of_a_wrong_shape",
    "an_unsupported_dtype",
    "a_wrong_k",
    "no_group",
    "a_label_in_no_shard",
    "a_label_in_the_padding",
    "vocab_size_beyond_the_shards",
    "a_first_shard_that_is_not_first",
)


def errors_of(world_size: int) -> list[str]:
    return list({1: OF_A_SINGLE_PROCESS, 2: ERRORS, 3: ERRORS}.get(world_size, ()))


def _changed(process: Process, name: str) -> dict[str, Any]:
    shard, labels, _ = process.inputs(CASES["default"])
    errs = process.rank == process.world_size - 1
    if name in ONE_ERRS and not errs:
        return {}
    return ERRORS[name](process, shard, labels, errs)


@contextmanager
def checks() -> Iterator[None]:
    """With what costs a synchronisation, or a wait."""
    os.environ["EAFT_EXT_CHECKS"] = "1"
    try:
        yield
    finally:
        del os.environ["EAFT_EXT_CHECKS"]


def _told(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"


def provoke_errors(process: Process) -> None:
    """Each of them, and the default call after it."""
    for name in errors_of(process.world_size):
        process.run(f"error_{name}", lambda name=name: process.loss(**_changed(process, name)))
        process.run(f"after_{name}", process.loss)
    if process.world_size not in (2, 3):
        return

    def repeated() -> dict[str, Any]:
        names = ("a_wrong_k", "a_wrong_k", "no_group", "another_k", "no_group", "a_wrong_k")
        told = [_told(lambda name=name: process.loss(**_changed(process, name))) for name in names]
        return {"told": told, "loss": process.loss()}

    process.run("repeated_errors", repeated)

    def in_place() -> dict[str, Any]:
        """The one error that depends on where a tensor lies."""
        shard, labels, options = process.inputs(CASES["default"])
        shard.requires_grad_()
        if process.rank == process.world_size - 1:
            shard = shard[:1].expand_as(shard)
        return vocab_parallel_gated_ce(shard, labels, inplace_backward=True, **options)

    process.run("error_in_place", in_place)
    process.run("after_in_place", process.loss)

    def keys() -> tuple[int, int]:
        store = dist.distributed_c10d._get_default_store()
        dist.barrier()
        before = store.num_keys()
        for _ in range(8):
            process.loss()
            # Who would have cleaned up fails in the first, and is among those who hear in the next.
            for failing in (0, process.world_size - 1):
                wrong = {"k": 999} if process.rank == failing else {}
                _told(lambda wrong=wrong: process.loss(**wrong))
        dist.barrier()
        return before, store.num_keys()

    process.run("keys", keys)
    with checks():
        process.run("checked", lambda: process.outcome(CASES["default"]))
        process.run(
            "error_checked", lambda: process.loss(**_changed(process, "a_label_in_no_shard"))
        )


def _pair(process: Process, first: int) -> dict[str, Any]:
    """The arguments of processes ``first`` and the next one, which have all words between them."""
    logits, labels = CASES["default"].inputs(2)
    return {"logits_shard": logits.chunk(2, -1)[process.rank - first], "labels": labels}


def _single_member_groups(process: Process) -> None:
    alone = [dist.new_group([rank]) for rank in range(process.world_size)][process.rank]

    def fail() -> list[str]:
        return [_told(lambda: process.loss(group=alone, k=999)) for _ in range(3)]

    if process.rank == 0:
        logits, labels = CASES["default"].inputs(1)
        process.run("error_alone", fail)
        process.run(
            "alone", lambda: vocab_parallel_gated_ce(logits, labels, group=alone, reduction="none")
        )
    process.run("after_alone", process.loss)


def _meshes(process: Process) -> None:
    mesh = init_device_mesh("cpu", (process.world_size,))
    process.run("mesh", lambda: process.outcome(CASES["default"], group=mesh))
    if process.world_size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        process.run("error_mesh_of_two_dimensions", lambda: process.loss(group=square))
        process.run("after_mesh_of_two_dimensions", process.loss)


def _subgroups(process: Process) -> None:
    """Of processes 1 and 2, whose calls are not numbered as those of process 0 are."""
    groups = {"subgroup": dist.new_group([1, 2]), "submesh": DeviceMesh("cpu", [1, 2])}
    for name, group in groups.items():
        for outsider in ("calls_too", "stays_away"):
            if process.rank > 0:
                arguments = _pair(process, 1)
                upstream = upstream_of(arguments["labels"])

                def member(
                    arguments: Any = arguments, group: Any = group, upstream: Tensor = upstream
                ) -> dict[str, Tensor]:
                    shard = arguments["logits_shard"].clone().requires_grad_()
                    loss, stats = vocab_parallel_gated_ce(
                        shard,
                        arguments["labels"],
                        group=group,
                        reduction="none",
                        return_stats=True,
                    )
                    loss.backward(upstream)
                    found = {"loss": loss.detach(), "gradient": shard.grad}
                    return found | stats._asdict()

                process.run(f"{name}_{outsider}", member)
            elif outsider == "calls_too":
                process.run(f"error_outsider_{name}", lambda group=group: process.loss(group=group))
            process.run(f"after_{name}_{outsider}", process.loss)


def _overlapping_groups(process: Process) -> None:
    """Process 1 is in two, and makes more calls than the others."""
    groups = {first: dist.new_group([first, first + 1]) for first in (0, 1)}
    for first, group in groups.items():
        if process.rank in (first, first + 1):
            arguments = _pair(process, first)
            process.run(
                f"pair_{first}",
                lambda arguments=arguments, group=group: vocab_parallel_gated_ce(
                    **arguments, group=group
                ),
            )
    process.run("after_pairs", process.loss)


def _without_a_backend(process: Process) -> None:
    """A second start of torch.distributed, which is left to choose gloo for the CPU by itself."""
    dist.destroy_process_group()
    store = dist.FileStore(str(process.folder / "second_store"), process.world_size)
    dist.init_process_group(
        store=store,
        rank=process.rank,
        world_size=process.world_size,
        timeout=timedelta(seconds=30),
    )
    process.world = dist.group.WORLD
    process.run("without_a_backend", process.loss)
    process.run("error_without_a_backend", lambda: process.loss(**_changed(process, "another_k")))
    process.run("after_without_a_backend", process.loss)


def _latecomer(process: Process) -> None:
    """An error without a group, long past, is not taken for the first call on a new one."""
    process.run("error_without_a_group", lambda: process.loss(group=None))
    process.run("after_without_a_group", process.loss)
    group = dist.new_group()
    if process.rank == process.world_size - 1:
        time.sleep(0.5)
    process.run("latecomer", lambda: process.loss(group=group))
    process.run("after_latecomer", process.loss)


def _absence(process: Process) -> None:
    """The last process does not come, and the others wait as long as the group is told to."""
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=3))
    if process.rank < process.world_size - 1:
        process.run("error_absence", lambda: process.loss(group=group))
    else:
        time.sleep(4)  # with it the connections of the others would go


def use_other_groups(process: Process) -> None:
    """Those that are not of all processes last: they may leave the others waiting."""
    if process.world_size == 1:
        return
    _meshes(process)
    _single_member_groups(process)
    _latecomer(process)
    if process.world_size == 2:
        _without_a_backend(process)
    if process.world_size == 3:
        _overlapping_groups(process)
        _subgroups(process)
    if process.world_size == 4:
        _absence(process)
