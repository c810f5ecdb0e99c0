"""What is counted as compiled kernels run on the host, and what the kernels' bytes come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import kernels_on_host
import pytest
import torch
from cuda_on_host import build
from ptx_on_host import compiled, count
from ptx_text import HEAD, SLOTS, entry, run

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

# Where in its block's shared memory a thread reads: %r1, from %r0.
SHARED = {
    "own_words": ("shl.b32 %r1, %r0, 2;", "ld.shared.u32 %r2, [%r1];"),
    "one_word": ("mov.u32 %r1, 8;", "ld.shared.u32 %r2, [%r1];"),
    "every_other_word": ("shl.b32 %r1, %r0, 3;", "ld.shared.u32 %r2, [%r1];"),
    "one_bank": ("shl.b32 %r1, %r0, 7;", "ld.shared.u32 %r2, [%r1];"),
    "vectors": ("shl.b32 %r1, %r0, 4;", "ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1];"),
}
# Wavefronts, and those of them that are conflicts.
WAVEFRONTS = {
    "own_words": (1, 0),
    "one_word": (1, 0),
    "every_other_word": (2, 1),
    "one_bank": (32, 31),
    "vectors": (4, 0),
}
THREADS = 32


@pytest.fixture(scope="module")
def counting() -> compiled.Compiled:
    base = "mov.u32 %r9, memory; add.s32 %r1, %r1, %r9;"
    kernels = {name: [to, base, load] for name, (to, load) in SHARED.items()}
    # Slots lie 64 bytes apart, and their thread's words beside each other at %d3.
    kernels["global"] = [
        "shl.b32 %r1, %r0, 2; cvt.u64.u32 %d2, %r1; ld.param.u64 %d3, [global_param_0];",
        "add.s64 %d3, %d3, %d2; ld.global.u32 %r2, [%d3]; st.global.u32 [%d0], %r2;",
        "ld.global.u32 %r3, [%d3]; atom.shared.add.u32 %r4, [memory], 1;",
    ]
    # Lane i goes through the loop i + 1 times: of two integers and a branch.
    kernels["loop"] = [
        "mov.u32 %r1, %r0;",
        "$again: add.s32 %r1, %r1, -1; setp.ge.s32 %p1, %r1, 0; @%p1 bra $again;",
        "bar.sync 0;",
    ]
    text = HEAD + "".join(entry(name, lines) for name, lines in kernels.items())
    return compiled.load_texts({"counted": text}, with_operators=False, counting=True)


def counts_of(code: compiled.Compiled, kernel: str) -> dict[str, int]:
    code.take_counts()
    slots = torch.zeros(THREADS, SLOTS, dtype=torch.int64)
    run(code, kernel, slots, shared_bytes=THREADS * 128)
    return code.take_counts()[kernel]


@pytest.mark.parametrize("name", SHARED)
def test_bank_conflicts(counting: compiled.Compiled, name: str) -> None:
    found = counts_of(counting, name)
    assert (found["shared_load_wavefronts"], found["shared_load_conflicts"]) == WAVEFRONTS[name]
    assert found["shared_load_requests"] == 1


def test_global_memory(counting: compiled.Compiled) -> None:
    found = counts_of(counting, "global")
    sectors = THREADS * 4 // count.SECTOR
    assert found["global_load_bytes"] == 2 * THREADS * 4
    assert found["global_load_requests"] == 2
    assert found["global_load_sectors"] in (2 * sectors, 2 * sectors + 2)  # as it is aligned
    assert found["global_load_touched"] == found["global_load_sectors"] // 2
    assert found["global_store_bytes"] == THREADS * 4
    assert found["global_store_sectors"] == THREADS
    assert found["atomics"] == THREADS


def test_instructions(counting: compiled.Compiled) -> None:
    found = counts_of(counting, "loop")
    # Two more of the loop's begin, outside of it, and a branch, a barrier and the return.
    assert found["instructions_integer"] == 2 * THREADS + 2 * sum(range(1, THREADS + 1))
    assert found["warp_instructions_integer"] == 2 + 2 * THREADS
    assert found["instructions_other"] == 2 * THREADS + sum(range(1, THREADS + 1))
    assert found["barriers"] == 1


@pytest.fixture
def counts_of_case(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Counter[str], int]]:
    """What a case of count.py counts, and the bytes of its logits."""
    code = count.counting_code()
    monkeypatch.setattr(kernels_on_host, "code", code)

    def run(name: str) -> tuple[Counter[str], int]:
        make, call = next((make, call) for n, make, call in count.CASES if n == name)
        logits, labels = make()
        code.take_counts()
        call(logits, labels)
        found = sum((Counter(c) for c in code.take_counts().values()), Counter())
        return found, logits.numel() * logits.element_size()

    return run


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.parametrize("name", [name for name, *_ in count.CASES])
def test_the_bytes_of_the_kernels(
    name: str, counts_of_case: Callable[[str], tuple[Counter[str], int]]
) -> None:
    """One read; where there is a gradient, one write. No more than the edges beside it."""
    found, size = counts_of_case(name)
    read = count.SECTOR * found["global_load_touched"] + found["copied_bytes"]
    written = count.SECTOR * found["global_store_sectors"]
    assert size <= read <= 1.02 * size
    if "backward" in name or "gradient" in name or "same" in name:
        assert size <= written <= 1.03 * size
    else:
        assert written <= 0.02 * size
