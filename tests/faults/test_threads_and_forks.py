"""Who calls: several threads at once, a forked process, a DataLoader's workers, one that ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from calls import CALLS
from inputs import same_bits, threads
from spawned import environment
from torch import Tensor

import eaft_ext

HERE = Path(__file__).parent
AT_ONCE = ("gated_ce", "few_long_rows", "bfloat16", "own_gate", "linear", "topk")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_that_call_at_once(num_threads: int) -> None:
    """Each gets what it gets alone, whatever the others do."""
    with threads(num_threads):
        expected = {name: CALLS[name]() for name in AT_ONCE}
        wrong: list[str] = []
        start = threading.Barrier(len(AT_ONCE))

        def run(name: str) -> None:
            torch.set_num_threads(num_threads)
            start.wait()
            right = [all(map(same_bits, CALLS[name](), expected[name])) for _ in range(4)]
            wrong.extend([name] * right.count(False))

        running = [threading.Thread(target=run, args=(name,)) for name in AT_ONCE]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in running), "they wait for each other"
    assert not wrong


FORKED = """
import os, sys, torch
from calls import CALLS
from inputs import same_bits
torch.set_num_threads(2)
names = ("gated_ce", "few_long_rows", "own_gate", "linear", "topk")
for name in names:
    CALLS[name]()  # with threads, which a child does not inherit
torch.set_num_threads(1)
expected = [CALLS[name]() for name in names]
torch.set_num_threads(2)
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        found = [CALLS[name]() for name in names]
        right = all(same_bits(a, b) for x, y in zip(found, expected) for a, b in zip(x, y))
        os._exit(0 if right else 1)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children), "a child was wrong"
torch.set_num_threads(1)
again = [CALLS[name]() for name in names]
assert all(same_bits(a, b) for x, y in zip(again, expected) for a, b in zip(x, y))
"""

WORKERS = """
import torch, eaft_ext
from inputs import make, same_bits
torch.set_num_threads(2)
logits, labels = make(24, 3001)
expected = eaft_ext.gated_ce(logits.requires_grad_(), labels)
expected.backward()

class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return eaft_ext.gated_ce(logits.detach(), labels)

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(
        Losses(), num_workers=2, batch_size=3, multiprocessing_context="fork"
    )
    for batch in loader:
        assert all(same_bits(loss, expected.detach()) for loss in batch)
"""

ENDS = """
import atexit, threading, torch, eaft_ext
from inputs import make
logits, labels = make(64, 20_000)

def call():
    for _ in range(20):
        leaf = logits.clone().requires_grad_()
        eaft_ext.gated_ce(leaf, labels).backward()

atexit.register(lambda: eaft_ext.gated_ce(logits, labels))
for _ in range(3):
    threading.Thread(target=call).start()
kept = eaft_ext.gated_ce(logits.clone().requires_grad_(), labels, gradient_in_forward=True)
call_once = eaft_ext.linear_gated_ce(logits[:, :16], torch.zeros(50, 16), labels % 50)
"""


def _python(script: str, expected: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(HERE),
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork as on Linux")
def test_a_fork_after_use() -> None:
    """With one thread, as PyTorch asks of a child: its threads are those of the parent."""
    _python(FORKED)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork as on Linux")
def test_in_the_workers_of_a_data_loader() -> None:
    """allennlp #4848: a worker that is forked after the parent's first use."""
    _python(WORKERS)


def test_the_interpreter_ends_during_calls() -> None:
    """With threads that are not done, a call as it ends, and a graph that is still there.

    Not with daemon threads: Python ends them in the middle of any operator of PyTorch, and aborts.
    """
    assert "terminate" not in _python(ENDS)


def test_tensors_of_another_thread_are_let_go() -> None:
    """A graph made in a thread has its backward in another, after the first has ended."""
    made: list[Tensor] = []
    logits = torch.randn(9, 300, requires_grad=True)
    labels = torch.arange(9)

    def forward() -> None:
        made.append(eaft_ext.gated_ce(logits, labels, gradient_in_forward=True))

    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()
    made[0].backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
