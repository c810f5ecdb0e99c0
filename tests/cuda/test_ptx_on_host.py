"""The machine that runs compiled kernels on the host: threads together, memory, and faults.

The kernels are a few lines of PTX each; test_ptx_opcodes.py has what one thread does alone.
"""

from __future__ import annotations

import re

import pytest
import torch
from cuda_on_host import build
from ptx_on_host import compiled
from ptx_on_host.ptx import PtxError, parse
from ptx_on_host.translate import translate
from ptx_text import HEAD, SLOT, SLOTS, entry, run
from torch import Tensor

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

SEEDS = range(4)
LAST = f"[%d0+{SLOT * (SLOTS - 1)}]"  # a thread's last slot
WINDOW = "cvt.u64.u32 %d3, %r1; cvta.shared.u64 %d3, %d3;"  # %d3: the generic address of %r1


def numbers(threads: int) -> Tensor:
    """Slot s of thread t: 100 t + s."""
    return 100 * torch.arange(threads)[:, None] + torch.arange(SLOTS)


RIGHT = {
    # Each kind of shuffle, of segments of 8 lanes: value, and whether there was one.
    "shuffles": [
        "ld.global.u32 %r1, [%d0];",
        "shfl.sync.up.b32 %r2|%p2, %r1, 3, 0x1800, -1;",
        "shfl.sync.down.b32 %r3|%p3, %r1, 3, 0x181f, -1;",
        "shfl.sync.bfly.b32 %r4|%p4, %r1, 12, 31, -1;",
        "shfl.sync.idx.b32 %r5, %r1, 2, 0x181f, -1;",
        *[f"st.global.u32 [%d0+{8 * i}], %r{i};" for i in (2, 3, 4, 5)],
        *[
            f"selp.u32 %r{i}, 1, 0, %p{i}; st.global.u32 [%d0+{8 * i + 4}], %r{i};"
            for i in (2, 3, 4)
        ],
    ],
    "votes": [
        "and.b32 %r1, %r0, 31; setp.lt.u32 %p1, %r1, 7;",
        "vote.sync.ballot.b32 %r2, %p1, -1; vote.sync.any.pred %p2, %p1, -1;",
        "redux.sync.add.u32 %r3, %r0, -1; redux.sync.max.u32 %r4, %r0, -1;",
        "redux.sync.min.s32 %r5, %r0, -1;",
        "redux.sync.and.b32 %r6, %r0, -1; redux.sync.or.b32 %r7, %r0, -1;",
        "setp.eq.s32 %p3, %r0, 40; bar.red.or.pred %p4, 0, %p3; bar.warp.sync -1;",
        "selp.u32 %r1, 1, 0, %p2; selp.u32 %r8, 2, 0, %p4; add.s32 %r1, %r1, %r8;",
        *[f"st.global.u32 [%d0+{8 * (i - 1)}], %r{i};" for i in range(1, 8)],
    ],
    # The sum of all slots 0, by atomics; thread 0 sets it to 0 before.
    "atomics": [
        "mov.u32 %r2, 0; setp.ne.s32 %p1, %r0, 0;",
        "@%p1 bra $wait;",
        "st.shared.u32 [memory+4], %r2;",
        "$wait: bar.sync 0;",
        "ld.global.u32 %r1, [%d0]; mov.u32 %r3, memory;",
        "atom.shared.add.u32 %r4, [%r3+4], %r1;",
        "bar.sync 0;",
        "ld.shared.u32 %r5, [memory+4];",
        f"st.global.u64 {LAST}, 0; st.global.u32 {LAST}, %r5;",
    ],
    "vectors": [
        "ld.global.L1::no_allocate.v4.u32 {%r1, %r2, %r3, %r4}, [%d0];",
        "st.global.cs.v4.u32 [%d0+16], {%r4, %r3, %r2, %r1};",
        "ld.global.v2.u64 {%d2, %d3}, [%d0]; st.global.v2.u64 [%d0+32], {%d3, %d2};",
        "mov.b64 %d4, {%r3, %r1}; mov.b64 {%r5, %r6}, %d4;",
        "ld.global.u16 %h1, [%d0+2]; mov.b32 %r7, {%h1, 7};",
        "st.global.u32 [%d0+48], %r6; st.global.u16 [%d0+52], %r5; st.global.u32 [%d0+56], %r7;",
    ],
    # What the next block of the cluster has, read while that waits.
    "clusters": [
        "mov.u32 %r9, %ctaid.x; mov.u32 %r10, %ntid.x;",
        "mad.lo.s32 %r11, %r9, %r10, 0; mul.wide.u32 %d2, %r11, 64; add.s64 %d0, %d0, %d2;",
        "ld.global.u32 %r2, [%d0]; shl.b32 %r3, %r0, 2; mov.u32 %r1, memory;",
        "add.s32 %r1, %r1, %r3; st.shared.u32 [%r1], %r2;",
        "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;",
        "mov.u32 %r4, %cluster_ctarank; mov.u32 %r5, %cluster_nctarank;",
        "add.s32 %r6, %r4, 1; rem.u32 %r6, %r6, %r5;",
        WINDOW,
        "mapa.u64 %d4, %d3, %r6; ld.u32 %r7, [%d4];",
        f"st.global.u32 {LAST}, %r7;",
        "barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;",
    ],
    # All slots through shared memory, every thread giving those of its neighbour back.
    "bulk_copies": [
        "mov.u32 %r1, memory; add.s32 %r2, %r1, 16; mov.u32 %r4, %ntid.x; shl.b32 %r3, %r4, 6;",
        "setp.ne.s32 %p1, %r0, 0; @%p1 bra $made;",
        "mbarrier.init.shared::cta.b64 [%r1], 1; fence.proxy.async.shared::cta;",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r3;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%r2], [%d0], %r3, [%r1];",
        "$made: bar.sync 0;",
        "$again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0;",
        "@!%p2 bra $again;",
        "xor.b32 %r5, %r0, 1; shl.b32 %r5, %r5, 6; add.s32 %r5, %r5, %r2;",
        "ld.shared.u64 %d2, [%r5];",
        "bar.sync 0;",
        f"st.global.u64 {LAST}, %d2;",
    ],
    # f(x, y) = x - y, and 3 for slot 0 where it is below 100 (a guarded instruction).
    "calls": [
        "ld.global.u32 %r1, [%d0]; ld.global.u32 %r2, [%d0+8];",
        "{ .param .b32 param0; st.param.b32 [param0+0], %r1;",
        ".param .b64 param1; cvt.u64.u32 %d2, %r2; st.param.b64 [param1+0], %d2;",
        ".param .b32 retval0;",
        "call.uni (retval0), minus, (param0, param1); ld.param.b32 %r3, [retval0+0]; }",
        "setp.lt.s32 %p1, %r1, 100; @%p1 mov.u32 %r1, 3;",
        f"st.global.u32 {LAST}, %r3; st.global.u32 [%d0], %r1;",
    ],
}

MINUS = """
.func (.param .b32 func_retval0) minus(
\t.param .b32 minus_param_0,
\t.param .b64 minus_param_1
)
{
\t.reg .b32 %r<9>;
\t.reg .b64 %d<9>;
\tld.param.u32 %r1, [minus_param_0];
\tld.param.u64 %d1, [minus_param_1];
\tcvt.u32.u64 %r2, %d1;
\tsub.s32 %r3, %r1, %r2;
\tst.param.b32 [func_retval0+0], %r3;
\tret;
}
"""


@pytest.fixture(scope="module")
def right() -> compiled.Compiled:
    text = HEAD + MINUS + "".join(entry(name, lines) for name, lines in RIGHT.items())
    return compiled.load_texts({"right": text}, with_operators=False)


@pytest.mark.parametrize("seed", SEEDS)
class TestRight:
    def test_shuffles(self, right: compiled.Compiled, seed: int) -> None:
        found = run(right, "shuffles", numbers(64), seed=seed).view(torch.int32).view(64, -1, 2)
        t = torch.arange(64)
        place = t % 8
        up = (torch.where(place >= 3, t - 3, t), place >= 3)
        down = (torch.where(place < 5, t + 3, t), place < 5)
        xor = (t ^ 12, torch.ones(64, dtype=torch.bool))
        for i, (lane, exists) in enumerate([up, down, xor], 2):
            assert found[:, i, 0].tolist() == (100 * lane).tolist()
            assert found[:, i, 1].tolist() == exists.int().tolist()
        assert found[:, 5, 0].tolist() == (100 * (t - place + 2)).tolist()

    def test_votes(self, right: compiled.Compiled, seed: int) -> None:
        found = run(right, "votes", torch.zeros(64, SLOTS, dtype=torch.int64), seed=seed)
        for warp in (0, 1):
            lanes = range(32 * warp, 32 * warp + 32)
            ones = 32 * warp  # the bits that all lanes have
            wanted = [3, 127, sum(lanes), lanes[-1], lanes[0], ones, ones | 31, 0]
            assert found[32 * warp : 32 * warp + 32].tolist() == [wanted] * 32

    def test_atomics(self, right: compiled.Compiled, seed: int) -> None:
        found = run(right, "atomics", numbers(64), shared_bytes=8, seed=seed)
        assert found[:, -1].tolist() == [sum(range(0, 6400, 100))] * 64

    def test_vectors(self, right: compiled.Compiled, seed: int) -> None:
        found = run(right, "vectors", numbers(32) + 2**33, seed=seed)
        words = numbers(32)[:, :2].add(2**33).view(torch.int32).view(32, 4)
        halves = found.view(torch.int32).view(32, 16)
        assert halves[:, 4:8].tolist() == words.flip(1).tolist()
        assert found[:, 4:6].tolist() == (numbers(32)[:, :2] + 2**33).flip(1).tolist()
        assert halves[:, 12].tolist() == words[:, 0].tolist()
        assert (halves[:, 13] % 2**16).tolist() == words[:, 2].tolist()
        assert halves[:, 14].tolist() == [7 << 16] * 32

    @pytest.mark.parametrize("cluster_size", [1, 2, 8])
    def test_clusters(self, right: compiled.Compiled, cluster_size: int, seed: int) -> None:
        slots = numbers(4 * cluster_size)
        options = {"threads": 4, "cluster_size": cluster_size, "shared_bytes": 16, "seed": seed}
        found = run(right, "clusters", slots, **options)
        assert found[:, -1].tolist() == slots[:, 0].roll(-4).tolist()

    def test_bulk_copies(self, right: compiled.Compiled, seed: int) -> None:
        slots = numbers(32)
        found = run(right, "bulk_copies", slots, shared_bytes=16 + 64 * 32, seed=seed)
        assert found[:, -1].tolist() == slots[torch.arange(32) ^ 1, 0].tolist()

    def test_calls(self, right: compiled.Compiled, seed: int) -> None:
        found = run(right, "calls", numbers(3), seed=seed)
        assert (
            found[:, -1].tolist() == [-1 % 2**32 + 7 - 7] * 3
            or (found[:, -1] % 2**32).tolist() == [2**32 - 1] * 3
        )
        assert found[:, 0].tolist() == [3, 100, 200]


MBARRIER = "mov.u32 %r1, memory; mov.u32 %r2, 64; mbarrier.init.shared::cta.b64 [%r1], 1;"
FENCE = "fence.proxy.async.shared::cta;"
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r2;"
COPY = (
    "add.s32 %r3, %r1, 16; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    " [%r3], [%d0], %r2, [%r1];"
)
WAIT = "$again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra $again;"

# One thread with 128 bytes of shared memory, and what is said of it.
WRONG = {
    "reads_beyond": (["ld.global.u32 %r1, [%d0+64];"], "reads 4 bytes of global .* no argument"),
    "reads_before": (["ld.global.u32 %r1, [%d0+-4];"], "reads 4 bytes of global .* no argument"),
    "reads_half_beyond": (["ld.global.u64 %d2, [%d0+60];"], "belongs to no argument"),
    "reads_misaligned": (["ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0+8];"], "not a multiple"),
    "reads_null": (["mov.u64 %d2, 0; ld.global.u32 %r1, [%d2];"], "belongs to no argument"),
    "reads_beyond_shared": (["ld.shared.u64 %d2, [memory+124];"], "reads 8 bytes of shared .* out"),
    "reads_shared_at_0": (["mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];"], "outside of what"),
    "writes_misaligned_shared": (["st.shared.u32 [memory+2], %r0;"], "writes 4 .* not a multiple"),
    "changes_beyond_shared": (["atom.shared.add.u32 %r1, [memory+128], 1;"], "changes 4 bytes"),
    "generic_is_not_shared": (["cvta.to.shared.u64 %d2, %d0;"], "not in the shared memory of"),
    "shared_is_not_global": (
        ["mov.u32 %r1, memory;", WINDOW, "cvta.to.global.u64 %d3, %d3;"],
        "is an address of shared memory",
    ),
    "reads_shared_as_global": (
        ["mov.u32 %r1, memory;", WINDOW, "ld.global.u32 %r1, [%d3];"],
        "is an address of shared memory",
    ),
    "reads_beyond_parameters": (
        ["mov.b64 %d2, reads_beyond_parameters_param_0; ld.param.u32 %r1, [%d2+8];"],
        "is in no parameter",
    ),
    "no_such_rank": (
        ["mov.u32 %r1, memory;", WINDOW, "mapa.u64 %d4, %d3, 1;"],
        "mapa with rank 1 in a cluster of 1",
    ),
    "reads_written_nowhere": ([f"st.global.u32 {LAST}, %r5;"], "the register r5_ is read"),
    "asks_an_unwritten_guard": (
        ["setp.ne.s32 %p1, %r0, 0; @%p1 setp.ne.s32 %p2, %r0, 9; @%p2 mov.u32 %r1, 7;"],
        "the register p2_ is read",
    ),
    "reads_unwritten": (
        ["setp.ne.s32 %p1, %r0, 0; @%p1 mov.u32 %r1, 7;", f"st.global.u32 {LAST}, %r1;"],
        "the register r1_ is read",
    ),
    "divides_by_zero": (
        [f"div.u32 %r1, 5, %r0; st.global.u32 {LAST}, %r1;"],
        "divides an integer by zero",
    ),
    "traps": (["trap;"], "__trap"),
    "copies_without_fence": ([MBARRIER, EXPECT, COPY, WAIT], "no fence.proxy.async before it"),
    "copies_without_bytes": ([MBARRIER, FENCE, COPY, WAIT], "the mbarrier expects 0"),
    "copies_other_bytes": (
        [MBARRIER, FENCE, EXPECT, "mov.u32 %r2, 48;", COPY, WAIT],
        "of 48 bytes, where the mbarrier expects 64",
    ),
    "copies_from_beyond": (
        [MBARRIER, FENCE, EXPECT, "add.s64 %d0, %d0, 16;", COPY, WAIT],
        "reads 64 bytes of global .* no argument",
    ),
    "copies_beyond_shared": (
        [MBARRIER, FENCE, EXPECT, COPY.replace("16;", "80;"), WAIT],
        "not all in the block's shared memory",
    ),
    "copies_for_nobody": ([MBARRIER, FENCE, EXPECT, COPY], "nobody waited"),
    "expects_twice": ([MBARRIER, FENCE, EXPECT, EXPECT], "for the second time"),
    "arrives_twice": ([MBARRIER.replace("], 1;", "], 2;")], "init for 2 arrivals"),
    "waits_for_ever": ([MBARRIER, FENCE, EXPECT, WAIT], "no thread can go on"),
    "waits_for_nothing": (["mov.u32 %r1, memory;", WAIT], "not made"),
    "arrives_alone": (["barrier.cluster.arrive.release;"], "between cluster_arrive and"),
    "another_barrier": (["bar.sync 1;"], "bar.sync with the barrier 1"),
}


@pytest.fixture(scope="module")
def wrong() -> compiled.Compiled:
    kernels = {name: lines for name, (lines, _) in WRONG.items()}
    text = HEAD + "".join(entry(name, lines) for name, lines in kernels.items())
    text += entry("writes", ["st.global.u32 [%d0], %r0;"], ".maxntid 2, 1, 1")
    text += entry("two_parameters", []).replace("\n)", ",\n\t.param .u64 another\n)", 1)
    return compiled.load_texts({"wrong": text}, with_operators=False)


class TestWrong:
    @pytest.mark.parametrize("name", WRONG)
    def test_is_told(self, wrong: compiled.Compiled, name: str) -> None:
        with pytest.raises(RuntimeError, match=WRONG[name][1]) as error:
            run(wrong, name, numbers(1), shared_bytes=128)
        assert str(error.value).startswith(name)

    def test_the_instruction_is_told(self, wrong: compiled.Compiled) -> None:
        with pytest.raises(RuntimeError, match=r"wrong.ptx:\d+: .*: ld.global.u32 %r1, \[%d0\+64"):
            run(wrong, "reads_beyond", numbers(1))

    def test_what_must_not_be_written_to(self, wrong: compiled.Compiled) -> None:
        assert run(wrong, "writes", numbers(2))[1, 0] == 1
        with pytest.raises(RuntimeError, match="writes 4 bytes of global"):
            run(wrong, "writes", numbers(2), writable=False)

    def test_launches_that_it_was_not_compiled_for(self, wrong: compiled.Compiled) -> None:
        with pytest.raises(RuntimeError, match="writes: 3 threads, and it was compiled for 2"):
            run(wrong, "writes", numbers(3))
        with pytest.raises(RuntimeError, match="1 parameters, and it was compiled for 2"):
            run(wrong, "two_parameters", numbers(1))
        with pytest.raises(RuntimeError, match="nothing was compiled of absent"):
            run(wrong, "absent", numbers(1))


def refusal(text: str) -> str:
    with pytest.raises(PtxError) as error:
        module = parse(text, "some.ptx")
        translate(module, list(module.functions.values()))
    return str(error.value)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("add.cc.u32 %r1, %r0, 1;", "add.cc.u32"),
        ("add.sat.s32 %r1, %r0, 1;", "add.sat.s32"),
        ("add.s32 %r1, %r0;", "add.s32 with 2 operands"),
        ("add.s32 %r1, %f1, 1;", "a register .f32 as a s32"),
        ("add.s32 %r1, %p1, 1;", "a register .pred as a s32"),
        ("add.f32 %f1, %f1, 1;", "1 as a f32"),
        ("add.s32 %r1, %r0, 0x1ffffffff;", "0x1ffffffff as a s32"),
        ("add.s32 %r1, %r99, 1;", "Special"),
        ("mov.u32 %r1, %clock;", "%clock"),
        ("mov.u32 %r1, nowhere;", "the address of nowhere"),
        ("ld.const.u32 %r1, [%d0];", "ld.const.u32"),
        ("ld.global.cv.u32 %r1, [%d0];", "ld.global.cv.u32"),
        ("ld.global.v2.u32 %r1, [%d0];", "ld.global.v2.u32 of 1 registers"),
        ("ld.global.u32 %r1, [%r0];", "an address in a register .b32"),
        ("st.param.u32 [a_param_0], %r0;", "st.param of this address"),
        ("bra $nowhere;", "this branch"),
        ("call.uni nobody, ();", "this call"),
        (".local .b32 x;", "'x', where"),
        ('.pragma "novector";', "this pragma"),
        ("@%r0 bra $L;", "a guard that is no predicate"),
        ("mov.u32 %r1, %r0 # 1;", "the character '#'"),
    ],
)
def test_what_is_not_known_is_refused(line: str, what: str) -> None:
    text = HEAD + entry("a", [line])
    number = text[: text.index(line)].count("\n") + 1
    assert re.match(rf"some\.ptx:{number}: .*{re.escape(what)}", refusal(text)), refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + ".global .b32 x;",
        HEAD + ".const .b32 x;",
        HEAD + ".shared .b8 x[16];",
        HEAD.replace("64\n", "32\n"),
        HEAD + entry("a", [], ".maxnreg 32"),
    ],
)
def test_directives_that_are_not_known_are_refused(text: str) -> None:
    assert "is not known to the translator" in refusal(text)
