"""What each opcode means: its operands' types, and its result as an expression of C++.

By the sections of the PTX ISA, chapter 9.7. In a row, T is each of the types it is for, W the type
of twice its width; a, b, c, d are the values of the sources in their order. The first type is the
result's, or - where there is none. The functions are those of the headers in this folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}

_INTEGERS = "s16 u16 s32 u32 s64 u64"
_WORDS = "b32 b64"
_BITS = "b16 b32 b64"

# Opcode, the types that T is, the operands, the result.
_SECTIONS: dict[str, list[tuple[str, str, str, str]]] = {
    "Integer Arithmetic": [
        ("add.T", _INTEGERS, "T T T", "a + b"),
        ("sub.T", _INTEGERS, "T T T", "a - b"),
        ("mul.lo.T", _INTEGERS, "T T T", "a * b"),
        ("mul.hi.T", "s32 u32", "T T T", "W(a) * W(b) >> 32"),
        ("mul.wide.T", "s16 u16 s32 u32", "W T T", "W(a) * W(b)"),
        ("mad.lo.T", _INTEGERS, "T T T T", "a * b + c"),
        ("div.T", _INTEGERS, "T T T", "a / b"),
        ("rem.T", _INTEGERS, "T T T", "a % b"),
        ("neg.T", "s16 s32 s64", "T T", "-a"),
        ("min.T", _INTEGERS, "T T T", "a < b ? a : b"),
        ("max.T", _INTEGERS, "T T T", "a > b ? a : b"),
        ("popc.b32", "", "u32 b32", "__builtin_popcount(a)"),
        ("clz.b32", "", "u32 b32", "a == 0 ? 32 : __builtin_clz(a)"),
        ("clz.b64", "", "u32 b64", "a == 0 ? 64 : __builtin_clzll(a)"),
        ("bfind.shiftamt.u32", "", "u32 u32", "shift_of_highest(a)"),
        ("brev.b32", "", "b32 b32", "__brev(a)"),
        ("bfi.T", _WORDS, "T T T u32 u32", "insert_bits(a, b, c, d)"),
    ],
    "Floating Point": [
        ("add.f32", "", "f32 f32 f32", "number(a + b)"),
        ("sub.f32", "", "f32 f32 f32", "number(a - b)"),
        ("mul.f32", "", "f32 f32 f32", "number(a * b)"),
        ("add.f64", "", "f64 f64 f64", "a + b"),
        ("add.rn.f64", "", "f64 f64 f64", "a + b"),
        ("sub.f64", "", "f64 f64 f64", "a - b"),
        ("mul.f64", "", "f64 f64 f64", "a * b"),
        ("mul.rn.f64", "", "f64 f64 f64", "a * b"),
        ("fma.rn.f32", "", "f32 f32 f32 f32", "number(__builtin_fmaf(a, b, c))"),
        ("fma.rm.f32", "", "f32 f32 f32 f32", "number(fused_downward(a, b, c))"),
        ("fma.rn.f64", "", "f64 f64 f64 f64", "__builtin_fma(a, b, c)"),
        ("div.rn.f64", "", "f64 f64 f64", "a / b"),
        ("div.approx.f32", "", "f32 f32 f32", "number(approximately(a / b, a))"),
        ("rcp.rn.f64", "", "f64 f64", "1.0 / a"),
        ("rcp.approx.ftz.f64", "", "f64 f64", "reciprocal_approximate(a)"),
        ("abs.f32", "", "f32 f32", "__builtin_fabsf(a)"),
        ("abs.f64", "", "f64 f64", "__builtin_fabs(a)"),
        ("copysign.f32", "", "f32 f32 f32", "__builtin_copysignf(b, a)"),
        ("neg.T", "f32 f64", "T T", "-a"),
        ("max.f32", "", "f32 f32 f32", "number(cuda_on_host::max_float(a, b))"),
        ("min.f32", "", "f32 f32 f32", "number(cuda_on_host::min_float(a, b))"),
        ("ex2.approx.f32", "", "f32 f32", "exp2_approximate(a)"),
        ("ex2.approx.ftz.f32", "", "f32 f32", "exp2_approximate_flushed(a)"),
    ],
    "Half Precision Floating Point": [
        ("max.f16x2", "", "f16x2 f16x2 f16x2", "__hmax2(a, b)"),
        ("max.bf16x2", "", "bf16x2 bf16x2 bf16x2", "__hmax2(a, b)"),
    ],
    "Comparison and Selection": [
        ("setp.eq.T", f"{_INTEGERS} {_BITS}", "pred T T", "a == b"),
        ("setp.ne.T", f"{_INTEGERS} {_BITS}", "pred T T", "a != b"),
        ("setp.lt.T", f"{_INTEGERS} f32 f64", "pred T T", "a < b"),
        ("setp.le.T", f"{_INTEGERS} f32 f64", "pred T T", "a <= b"),
        ("setp.gt.T", f"{_INTEGERS} f32 f64", "pred T T", "a > b"),
        ("setp.ge.T", f"{_INTEGERS} f32 f64", "pred T T", "a >= b"),
        ("setp.eq.T", "f32 f64", "pred T T", "a == b"),
        ("setp.ne.T", "f32 f64", "pred T T", "a < b || a > b"),
        ("setp.equ.T", "f32 f64", "pred T T", "!(a < b || a > b)"),
        ("setp.neu.T", "f32 f64", "pred T T", "a != b"),
        ("setp.ltu.T", "f32 f64", "pred T T", "!(a >= b)"),
        ("setp.leu.T", "f32 f64", "pred T T", "!(a > b)"),
        ("setp.gtu.T", "f32 f64", "pred T T", "!(a <= b)"),
        ("setp.geu.T", "f32 f64", "pred T T", "!(a < b)"),
        ("setp.num.T", "f32 f64", "pred T T", "a == a && b == b"),
        ("setp.nan.T", "f32 f64", "pred T T", "a != a || b != b"),
        ("selp.T", f"{_INTEGERS} {_BITS} f32 f64", "T T T pred", "c ? a : b"),
    ],
    "Logic and Shift": [
        ("and.T", f"pred {_BITS}", "T T T", "a & b"),
        ("or.T", f"pred {_BITS}", "T T T", "a | b"),
        ("xor.T", f"pred {_BITS}", "T T T", "a ^ b"),
        ("not.pred", "", "pred pred", "!a"),
        ("not.T", _BITS, "T T", "~a"),
        ("shl.T", _BITS, "T T u32", "shift_left(a, b)"),
        ("shr.T", f"{_INTEGERS} {_BITS}", "T T u32", "shift_right(a, b)"),
        ("shf.l.wrap.b32", "", "b32 b32 b32 u32", "funnel_shift_left(a, b, c)"),
    ],
    "Data Movement and Conversion": [
        ("mov.T", f"pred {_INTEGERS} {_BITS} f32 f64", "T T", "a"),
        ("shfl.sync.up.b32", "", "shuffled b32 u32 u32 u32", "shuffle<Shuffle::kUp>(a, b, c, d)"),
        (
            "shfl.sync.down.b32",
            "",
            "shuffled b32 u32 u32 u32",
            "shuffle<Shuffle::kDown>(a, b, c, d)",
        ),
        (
            "shfl.sync.bfly.b32",
            "",
            "shuffled b32 u32 u32 u32",
            "shuffle<Shuffle::kXor>(a, b, c, d)",
        ),
        (
            "shfl.sync.idx.b32",
            "",
            "shuffled b32 u32 u32 u32",
            "shuffle<Shuffle::kIndex>(a, b, c, d)",
        ),
        ("cvta.shared.u64", "", "u64 u64", "generic_from_shared(a)"),
        ("cvta.to.shared.u64", "", "u64 u64", "shared_from_generic(a)"),
        ("cvta.to.global.u64", "", "u64 u64", "global_from_generic(a)"),
        ("mapa.u64", "", "u64 u64 u32", "address_of_rank(a, b)"),
        ("cvt.u16.u32", "", "u16 u32", "a"),
        ("cvt.u32.u16", "", "u32 u16", "a"),
        ("cvt.u32.u64", "", "u32 u64", "a"),
        ("cvt.u64.u32", "", "u64 u32", "a"),
        ("cvt.s32.s8", "", "s32 s8", "a"),
        ("cvt.s64.s32", "", "s64 s32", "a"),
        ("cvt.rn.f32.s64", "", "f32 s64", "a"),
        ("cvt.rn.f64.s32", "", "f64 s32", "a"),
        ("cvt.rn.f64.s64", "", "f64 s64", "a"),
        ("cvt.rn.f32.f64", "", "f32 f64", "number(static_cast<f32>(a))"),
        ("cvt.f64.f32", "", "f64 f32", "a"),
        ("cvt.rni.f32.f32", "", "f32 f32", "number(std::nearbyintf(a))"),
        ("cvt.rzi.f64.f64", "", "f64 f64", "std::trunc(a)"),
        ("cvt.sat.f32.f32", "", "f32 f32", "saturated(a)"),
        ("cvt.f32.f16", "", "f32 f16", "number(__half2float(a))"),
        ("cvt.f32.bf16", "", "f32 bf16", "number(__bfloat162float(a))"),
        ("cvt.rn.f16.f32", "", "f16 f32", "__float2half_rn(a)"),
        ("cvt.rn.bf16.f32", "", "bf16 f32", "__float2bfloat16_rn(a)"),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
            "",
            "- shared global u32 shared",
            "bulk_copy(a, b, c, d)",
        ),
    ],
    "Control Flow": [
        ("trap", "", "-", "__trap()"),
    ],
    "Parallel Synchronization and Communication": [
        ("bar.sync", "", "- u32", "barrier(a)"),
        ("bar.red.or.pred", "", "pred u32 pred", "barrier_or(a, b)"),
        ("bar.warp.sync", "", "- u32", "warp_barrier(a)"),
        ("barrier.cluster.arrive.release", "", "-", "eaft_ext::cuda::cluster_arrive()"),
        ("barrier.cluster.arrive.relaxed", "", "-", "eaft_ext::cuda::cluster_arrive_relaxed()"),
        ("barrier.cluster.wait.acquire", "", "-", "eaft_ext::cuda::cluster_wait()"),
        ("fence.proxy.async.shared::cta", "", "-", "fence_async()"),
        ("atom.shared.add.u32", "", "u32 shared u32", "atomic_add_shared<u32>(a, b)"),
        ("vote.sync.ballot.b32", "", "b32 pred u32", "ballot(a, b)"),
        ("vote.sync.any.pred", "", "pred pred u32", "any(a, b)"),
        ("redux.sync.add.T", "u32 s32", "T T u32", "__reduce_add_sync(b, a)"),
        ("redux.sync.max.T", "u32 s32", "T T u32", "__reduce_max_sync(b, a)"),
        ("redux.sync.min.T", "u32 s32", "T T u32", "__reduce_min_sync(b, a)"),
        ("redux.sync.and.b32", "", "b32 b32 u32", "__reduce_and_sync(b, a)"),
        ("redux.sync.or.b32", "", "b32 b32 u32", "__reduce_or_sync(b, a)"),
        ("mbarrier.init.shared::cta.b64", "", "- shared u32", "mbarrier_init(a, b)"),
        (
            "mbarrier.arrive.expect_tx.shared::cta.b64",
            "",
            "_ shared u32",
            "mbarrier_expect(a, b)",
        ),
        (
            "mbarrier.try_wait.parity.shared::cta.b64",
            "",
            "pred shared u32",
            "mbarrier_wait(a, b)",
        ),
    ],
}


@dataclass(frozen=True)
class Meaning:
    row: tuple[str, str, str, str]  # of the table
    result: str
    sources: tuple[str, ...]
    expression: str


def _table() -> dict[str, Meaning]:
    found: dict[str, Meaning] = {}
    for row in ROWS:
        opcode, types, operands, expression = row
        for one in types.split() or [""]:
            names = {"T": one, "W": _WIDE.get(one, "")}
            opcode_of_type, operands_of_type, result = (
                re.sub(r"\b[TW]\b", lambda m, names=names: names[m[0]], text)
                for text in (opcode, operands, expression)
            )
            kind, *sources = operands_of_type.split()
            found[opcode_of_type] = Meaning(row, kind, tuple(sources), result)
    return found


ROWS = [row for rows in _SECTIONS.values() for row in rows]
OPCODES = _table()

# Loads and stores: what stands between `ld` or `st` and the type is a space, and hints to caches.
SPACES = ("global", "shared", "param", "generic")
CACHE_HINTS = ("L1::no_allocate", "cs")

SPECIAL_REGISTERS = {
    "%tid.x": "threadIdx.x",
    "%ntid.x": "blockDim.x",
    "%ctaid.x": "blockIdx.x",
    "%nctaid.x": "gridDim.x",
    "%cluster_ctarank": "cluster_rank()",
    "%cluster_nctarank": "cluster_size()",
}
