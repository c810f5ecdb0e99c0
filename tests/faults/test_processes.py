"""A process of a group dies, raises, is late, or means something else, at every point of a step.

The others end with the reason within the group's timeout, and none trains on; over gloo.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from process_worker import DIFFERENCES, FAULT_STEP, LINEAR_POINTS, POINTS, STEPS, TIMEOUT, Case
from spawned import run_all

import eaft_ext

WORKER = Path(__file__).with_name("process_worker.py")
SLACK = 6.0
"""Seconds beyond the timeout that a busy machine may take."""

# From here on nothing is exchanged in a step any more: the others finish it.
LATE_POINTS = ("after_the_exchange", "in_the_backward", "after_the_step")
# Before it has told the others that it comes, and may tell them that it does not.
TOLD_POINTS = ("before_the_partial",)
EXCHANGES = ("before_the_exchange", *LINEAR_POINTS)
IN_VAIN = r"[Tt]imed out|[Tt]imeout|did not make this call within"
GONE = rf"[Cc]onnection|[Ss]ocket|closed|Broken pipe|{IN_VAIN}"


HARD = [Case(fault, point) for fault in ("dies", "raises") for point in POINTS]
HARD += [
    Case(fault, point, size, victim)
    for fault in ("dies", "raises")
    for point in ("before_the_call", "before_the_exchange")
    for size, victim in ((2, 0), (3, 0), (3, 2))
]
HARD += [Case(fault, point) for fault in ("dies", "raises") for point in LINEAR_POINTS]
# As one does that meets its want of memory alone.
HARD += [Case("raises_and_tries_again", point) for point in EXCHANGES]
LATE = [Case("is_late", point) for point in (*POINTS, *LINEAR_POINTS)]
DIFFERENT = [Case(difference, "before_the_call") for difference in DIFFERENCES]
QUICK = {
    Case("dies", "before_the_call"),
    Case("dies", "before_the_exchange"),
    Case("raises", "before_the_partial"),
    Case("raises", "before_the_exchange"),
    Case("raises", "in_the_backward"),
    Case("raises_and_tries_again", "before_the_second_exchange"),
    Case("is_late", "before_the_exchange"),
    *DIFFERENT,
}

Told = dict[str, Any] | None


class Groups(dict[Case, list[Told]]):
    """What each process of a case wrote down: those of a kind, quick or slow, run at once."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        super().__init__()
        self._folders = folders

    def __missing__(self, case: Case) -> list[Told]:
        everything = {*HARD, *LATE, *DIFFERENT}
        cases = QUICK if case in QUICK else everything - QUICK
        folder = self._folders.mktemp("groups")
        run_all([[WORKER, folder, *cases]], 300, WORKER.parent)
        for one in cases:
            paths = [folder / f"{one}.{rank}.json" for rank in range(one.size)]
            self[one] = [json.loads(p.read_text()) if p.exists() else None for p in paths]
        return self[case]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(tmp_path_factory)


def _each(cases: list[Case]) -> Any:
    slow = pytest.mark.slow
    parameters = [pytest.param(c, marks=() if c in QUICK else slow, id=str(c)) for c in cases]
    return pytest.mark.parametrize("case", parameters)


@_each(HARD)
def test_the_others_end_with_the_reason(groups: Groups, case: Case) -> None:
    found = groups[case]
    own = found[case.victim]
    if case.fault == "dies":
        assert own is None
    else:
        assert own is not None and own["error"][0] == "InjectedError"
    done = FAULT_STEP + (case.point in LATE_POINTS)
    for rank, told in enumerate(found):
        if rank == case.victim:
            continue
        assert told is not None, "it ended without a word"
        assert len(told["steps"]) == done and told["error"], "it trained on"
        assert told["seconds"] < TIMEOUT + SLACK
        kind, sentence = told["error"]
        if case.fault == "raises" and case.point in TOLD_POINTS:
            assert kind == "RuntimeError"
            assert sentence.endswith(f"process {case.victim} failed: an injected fault")
            assert told["seconds"] < TIMEOUT, "it was told, and need not have waited"
        elif case.fault == "raises_and_tries_again":
            # It lives, and its connection with it.
            assert re.search(IN_VAIN, sentence), sentence
            assert re.search(IN_VAIN, own["again"]), own["again"]
        elif case.point in EXCHANGES or case.victim == 0:
            # Of gloo, or of the store, which was the victim's.
            assert re.search(GONE, sentence), sentence
        else:
            assert f"processes [{case.victim}] did not make this call within" in sentence


@_each(LATE)
def test_a_late_process_is_waited_for(groups: Groups, case: Case) -> None:
    first, second = groups[case]
    assert first is not None and second is not None
    assert first["error"] is second["error"] is None
    assert [bool(told["was_late"]) for told in (first, second)] == [False, True]
    assert len(first["steps"]) == STEPS and first["steps"] == second["steps"]


@_each(DIFFERENT)
def test_what_differs_is_named_in_all_processes(groups: Groups, case: Case) -> None:
    version = eaft_ext.__version__
    names = {
        "another_version": f"eaft_ext: {version} in process 0, 0.0.9 in process 1",
        "another_dtype": "the dtype of the logits: torch.float32 in process 0",
        "another_k": "k: 20 in process 0, 7 in process 1",
        "another_number_of_items": "num_items_in_batch: 12.0 in process 0, 99.0 in process 1",
        "another_gate": "gate: EntropyGate",
        "other_labels": "the labels at position",
    }
    for told in groups[case]:
        assert told is not None and told["error"] is not None, "it trained on"
        kind, sentence = told["error"]
        assert kind == "ValueError" and names[case.fault] in sentence, sentence
        assert len(told["steps"]) == FAULT_STEP and told["seconds"] < TIMEOUT
