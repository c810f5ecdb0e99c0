"""Faults in the compiled kernels that their C++ cannot have, and ptxas would not see.

Each is put into the PTX of one kernel, of which a small test must fail. What no test can see:

- Hints to caches (L1::no_allocate, cs), which change no value.
- Memory ordering: a barrier of the cluster that is relaxed where it should release, a warp barrier
  that is missing where a shuffle or another barrier follows before anybody reads.
- In threshold_of_threads, shuffles that bring another lane's maximum: the threshold stays valid,
  and only the list of candidates grows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import kernels_on_host
import pytest
import torch
from inputs import IGNORED, make
from ptx_on_host import compiled
from test_kernels_on_host import Way, assert_right

from eaft_ext import reference

pytestmark = [pytest.mark.slow, pytest.mark.nvcc]


def check_staged() -> None:
    assert_right(*make(3, 3001), [Way("cluster", 4)] * 4)


def check_backward() -> None:
    logits, labels = make(3, 3001)
    row_max = logits.amax(1)
    log_sum = (logits - row_max[:, None]).exp().sum(1).log()
    found = kernels_on_host.backward(torch.ones(3), logits, labels, row_max, log_sum, IGNORED)
    wanted = logits.softmax(1) - torch.nn.functional.one_hot(labels, 3001)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def check_scale() -> None:
    gradient = torch.randn(2, 3001)
    assert torch.equal(kernels_on_host.scale_gradient(gradient, 0.5), gradient * 0.5)


def check_merge() -> None:
    logits, labels = make(9, 300)
    shards = [(start, logits[:, start : start + 100]) for start in (0, 100, 200)]
    partials = [reference.shard_partial(x, labels, 20, start) for start, x in shards]
    found = kernels_on_host.merge(torch.stack(partials), labels, 20, "entropy", [1.0], IGNORED)
    wanted = reference.gated_ce(logits, labels, reduction="none")
    torch.testing.assert_close(found.loss, wanted)


def check_topk() -> None:
    logits = torch.randn(2, 9001)
    for seed in range(3):
        values, indices = kernels_on_host.topk(logits, 20, seed=seed)
        for found, wanted in zip((values, indices), logits.topk(20), strict=True):
            assert torch.equal(found, wanted)


@dataclass(frozen=True)
class Kernel:
    file: str
    name: str  # part of the mangled one
    check: Callable[[], None]


STAGED = Kernel("gated_ce_forward_with_grad", "staged_kernelIfLi192ENS0_9PlainLossE", check_staged)
BACKWARD = Kernel("gated_ce_backward", "backward_kernelIfNS0_9PlainLossE", check_backward)
SCALE = Kernel("scale_gradient", "scale_gradient_kernelIfE", check_scale)
MERGE = Kernel("gated_ce_merge", "gated_ce_merge_kernel", check_merge)
TOPK = Kernel("topk", "11topk_kernelIfE", check_topk)
KERNELS = [STAGED, BACKWARD, SCALE, MERGE, TOPK]

LOAD = r"(ld\.global\.L1::no_allocate\.v4\.u32 \{)(%\w+), (%\w+)"
EXPECT = r"(mbarrier\.arrive\.expect_tx.*_, \[%\w+\], )(%\w+);"
COPY = r"(cp\.async\.bulk.* \[%\w+\], \[%\w+\], )(%\w+)(.*;)"
SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+%\w+\|%\w+, %\w+, )([%\w]+)(, [%\w]+, [-%\w]+;)"
WAIT = r"(mbarrier\.try_wait\.parity.*), 0;"


def with_sum(before: str, register: str, summand: int, behind: str = ";") -> str:
    """The instruction, with an operand that is larger."""
    return f"{{ .reg .b32 %sum; add.s32 %sum, {register}, {summand}; {before}%sum{behind} }}"


# The kernel, a pattern of PTX, what stands in its place, and which of its occurrences: all, if none
# is given.
MUTANTS: dict[str, tuple[Kernel, str, str | Callable[[re.Match[str]], str], int | None]] = {
    "registers of a load": (SCALE, LOAD, r"\1\3, \2", None),
    "offset of a load": (SCALE, r"(ld\.global\.L1.*\[%\w+)\]", r"\1+16]", None),
    "bytes of a store": (SCALE, r"(st\.global\.cs\.v4\.u32 \[%\w+)\]", r"\1+8]", None),
    "registers of a store": (SCALE, r"(st\.global\.cs.*\{)(%\w+), ?(%\w+)", r"\1\3, \2", None),
    "sign of ex2": (
        BACKWARD,
        r"ex2\.approx\.ftz\.f32 (%\w+), (%\w+);",
        r"{ .reg .f32 %minus; neg.f32 %minus, \2; ex2.approx.ftz.f32 \1, %minus; }",
        None,
    ),
    "rank of mapa": (STAGED, r"(mapa\.u64 %\w+, %\w+, )%\w+;", r"\g<1>0;", None),
    "rank for size": (STAGED, "%cluster_nctarank", "%cluster_ctarank", None),
    "size for rank": (STAGED, "%cluster_ctarank", "%cluster_nctarank", None),
    "another block's rank": (STAGED, "%cluster_ctarank", "%ctaid.x", None),
    "parity": (STAGED, WAIT, r"\1, 1;", None),
    "no wait for a copy": (
        STAGED,
        r"mbarrier\.try_wait\.parity.* (%?\w+), \[%\w+\], 0;",
        r"setp.eq.s32 \1, 0, 0;",
        None,
    ),
    "more bytes expected": (STAGED, EXPECT, lambda m: with_sum(m[1], m[2], 16), None),
    "fewer bytes copied": (STAGED, COPY, lambda m: with_sum(m[1], m[2], -16, m[3]), None),
    "one arrival too many": (STAGED, r"(mbarrier\.init.*\], )1;", r"\g<1>2;", None),
    "no mbarrier": (STAGED, r"mbarrier\.init.*;", "", None),
    "no fence": (STAGED, r"fence\.proxy\.async.*;", "", None),
    "no first arrival": (STAGED, r"barrier\.cluster\.arrive\.release;", "", None),
    "no first wait": (STAGED, r"barrier\.cluster\.wait\.acquire;", "", -2),
    "no last wait": (STAGED, r"barrier\.cluster\.wait\.acquire;", "", -1),
    "no barrier after the mbarriers": (STAGED, r"bar\.sync\s+0;", "", 0),
    "lane of a shuffle": (MERGE, SHUFFLE, r"\g<1>1\3", None),
    "segment of a shuffle": (MERGE, SHUFFLE, r"\g<1>\2, 7, -1;", None),
    "lanes of a shuffle": (MERGE, SHUFFLE, r"\g<1>\2, 31, 0xffff;", None),
    "operation of a reduction": (TOPK, r"redux\.sync\.add\.u32", "redux.sync.max.u32", None),
    "operation of another": (TOPK, r"redux\.sync\.and\.b32", "redux.sync.or.b32", None),
    "bits of a ballot": (
        TOPK,
        r"vote\.sync\.ballot\.b32\s+(%\w+), (%\w+), (%\w+);",
        r"{ .reg .pred %not; not.pred %not, \2; vote.sync.ballot.b32 \1, %not, \3; }",
        None,
    ),
    "threads of a vote": (
        TOPK,
        r"bar\.red\.or\.pred\s+(%?\w+), 0, (%?\w+);",
        r"mov.pred \1, \2;",
        None,
    ),
}


def alone(text: str, kernel: str) -> str:
    """The text with one kernel of it, and all functions."""
    pieces = re.split(r"^(?=\.visible \.entry|\.func)", text, flags=re.MULTILINE)
    others = [p for p in pieces if p.startswith(".visible .entry") and kernel not in p]
    return "".join(piece for piece in pieces if piece not in others)


@pytest.fixture
def run_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel, str], None]:
    """Run the kernel's test on its code in a text."""

    def run(kernel: Kernel, text: str) -> None:
        code = compiled.load_texts({kernel.file: text})
        monkeypatch.setattr(kernels_on_host, "code", code)
        kernel.check()

    return run


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.file)
def test_as_it_is(kernel: Kernel, run_code: Callable[[Kernel, str], None]) -> None:
    run_code(kernel, alone(compiled.ptx("sm_90")[kernel.file], kernel.name))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, run_code: Callable[[Kernel, str], None]) -> None:
    kernel, pattern, replacement, which = MUTANTS[name]
    text = alone(compiled.ptx("sm_90")[kernel.file], kernel.name)
    found = list(re.finditer(pattern, text))
    assert found, "the kernel has no such instruction"
    for match in reversed(found if which is None else [found[which]]):
        new = replacement(match) if callable(replacement) else match.expand(replacement)
        text = text[: match.start()] + new + text[match.end() :]
    with pytest.raises((AssertionError, RuntimeError)) as error:
        run_code(kernel, text)
    assert "c++" not in str(error.value), "it does not compile"
    print(name, "->", str(error.value).split("\n")[0][:150])
