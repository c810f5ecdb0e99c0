"""No memory in the middle of a call: an exception, no leak, and the next call is right.

Each call is run with its first block of memory refused, then its second, and so on to its last; and
with all refused from each of them on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import CALLS
from spawned import environment

HERE = Path(__file__).parent
QUICK = ("few_long_rows", "gradient_in_forward", "linear")


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that refuses memory."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and glibc: install gcc, or set CC")
    library = tmp_path_factory.mktemp("allocator") / "limited_memory.so"
    command = [*compiler.split(), "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", library, HERE / "limited_memory.c"], check=True)
    return library


@pytest.mark.parametrize(
    ("extent", "names"),
    [
        pytest.param("ONE", QUICK, id="one_of_three_calls"),
        pytest.param("ONE", tuple(CALLS), marks=pytest.mark.slow, id="one"),
        pytest.param("ALL", tuple(CALLS), marks=pytest.mark.slow, id="all_that_follow"),
    ],
)
def test_every_allocation_fails_once(
    allocator: Path,
    extent: str,
    names: tuple[str, ...],
    record_property: Callable[[str, object], None],
) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "memory_worker.py", extent, *names],
        env=environment(HERE) | {"LD_PRELOAD": str(allocator)},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    faults = dict(re.findall(r"(\w+): (\d+) faults", done.stdout))
    assert set(faults) == set(names) and "0" not in faults.values()
    record_property("faults", sum(map(int, faults.values())))


LIMIT = """
import resource, sys, torch, eaft_ext
torch.set_num_threads(1)
logits = torch.randn(64, 50_000).requires_grad_()
labels = torch.randint(50_000, (64,))
expected = torch.autograd.grad(eaft_ext.gated_ce(logits, labels), logits)[0].clone()
status = dict(line.split(":") for line in open("/proc/self/status"))
used = int(status["VmSize"].split()[0]) * 1024
loss = eaft_ext.gated_ce(logits, labels)
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
for _ in range(3):
    try:
        torch.autograd.grad(loss, logits, retain_graph=True)
        sys.exit("there was memory")
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__, "memory" in str(error) or "alloc" in str(error))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS as on Linux")
def test_an_address_space_that_ends_in_the_backward() -> None:
    """The graph stays, and its backward is right once there is memory."""
    done = subprocess.run(
        [sys.executable, "-c", LIMIT],
        env=environment(),
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["RuntimeError True"] * 3
