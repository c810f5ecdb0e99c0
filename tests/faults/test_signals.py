"""Ctrl-C and signals during long calls: they end it, and the next call is right."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from spawned import environment, stop

HERE = Path(__file__).parent
# A call goes on until the kernel's loop is done: a second, at most, where a whole run is minutes.
PROMPT = 15.0

LOOP = """
import json, signal, sys, time, torch, eaft_ext
# Whoever started the tests may have had them ignored, as nohup does.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(name, signal.SIG_DFL)
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(2048, 64, generator=generator).requires_grad_()
weight = torch.randn(20_000, 64, generator=generator).requires_grad_()
labels = torch.randint(20_000, (2048,), generator=generator)

def loss(rows):
    value = eaft_ext.linear_gated_ce(hidden[:rows], weight, labels[:rows], chunk_size=64)
    return [value.item(), torch.autograd.grad(value, weight)[0].sum().item()]

expected = loss(200)
print("ready", flush=True)
interrupts = 0
while interrupts < int(sys.argv[1]):
    try:
        while True:
            loss(2048)
    except KeyboardInterrupt:
        interrupts += 1
        print(json.dumps([expected, loss(200)]), flush=True)
"""


def _started(*arguments: Any) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *map(str, arguments)],
        env=environment(HERE),
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_a_call_and_the_next_is_right() -> None:
    process = _started(3)
    assert process.stdout is not None
    try:
        for pause in (0.3, 0.05, 0.6):
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
            expected, found = json.loads(process.stdout.readline())
            assert found == expected
        assert process.wait(timeout=PROMPT) == 0
    finally:
        stop(process)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_the_process_does_so_in_a_call(name: str) -> None:
    process = _started(1)
    try:
        time.sleep(0.2)
        sent = time.monotonic()
        process.send_signal(signal.Signals[name])
        assert process.wait(timeout=PROMPT) == -signal.Signals[name]
        assert time.monotonic() - sent < PROMPT
    finally:
        stop(process)
