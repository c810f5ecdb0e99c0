"""A few long rows keep all threads busy, and so do those that are left among ignored ones.

Measured in processor time of each thread, which a busy machine does not change as it changes the
clock on the wall, and in a process of its own, where threads that wait for work sleep. The system
books a running thread's time at its ticks, up to 10 ms apart: a case runs for many of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import eaft_ext

SCRIPT = """
import json, pathlib, time, torch, eaft_ext
torch.set_num_threads(2)
ops = torch.ops.eaft_ext
tasks = pathlib.Path("/proc/self/task")

def processor_time():  # nanoseconds that each thread ran
    return {t.name: int((t / "schedstat").read_text().split()[0]) for t in tasks.iterdir()}

def shares(run):
    run()
    before = processor_time()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        run()
    after = processor_time()
    spent = sorted((after[t] - before.get(t, 0) for t in after), reverse=True)
    return [time / sum(spent) for time in spent[:2]]

found = {}
for num_rows in (1, 4, 32):
    logits = torch.randn(num_rows, {1: 1 << 20, 4: 151936, 32: 40000}[num_rows])
    labels = torch.randint(40000, (num_rows,))
    if num_rows == 32:
        labels[:20] = -100
    upstream = torch.ones(num_rows)
    options = (labels, 20, "entropy", [1.0], -100)
    *_, gate, row_max, log_sum, _ = ops.gated_ce_forward(logits, *options)
    runs = {
        "gated_ce_forward": lambda: ops.gated_ce_forward(logits, *options),
        "gated_ce_backward":
            lambda: ops.gated_ce_backward(gate, logits, labels, row_max, log_sum, -100),
        "gated_ce_forward_with_grad":
            lambda: ops.gated_ce_forward_with_grad(upstream, logits, *options),
        "topk": lambda: ops.topk(logits, 20),
    }
    for name, run in runs.items():
        found[f"{name} {num_rows}"] = shares(run)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def shares() -> dict[str, list[float]]:
    """For each case, the share of the processor time of the two busiest threads."""
    if not Path(f"/proc/self/task/{os.getpid()}/schedstat").exists():
        pytest.skip("needs the processor time of each thread from /proc, as on Linux")
    environment = os.environ | {
        "PYTHONPATH": str(Path(eaft_ext.__file__).parents[1]),
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=environment,
        cwd=environment["PYTHONPATH"],  # not the checkout, whose package may not be built
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("num_rows", [1, 4, 32], ids=["1_row", "4_rows", "first_20_of_32_ignored"])
@pytest.mark.parametrize(
    "op", ["gated_ce_forward", "gated_ce_backward", "gated_ce_forward_with_grad", "topk"]
)
def test_two_threads_share_the_work(shares: dict[str, list[float]], op: str, num_rows: int) -> None:
    first, second = shares[f"{op} {num_rows}"]
    assert second >= 0.2, f"one thread did {first:.0%} of the work, the other {second:.0%}"
