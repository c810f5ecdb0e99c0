"""The opcodes that ``ptx_on_host`` knows, each against values by hand: one thread for each."""

from __future__ import annotations

import math
import re
import struct

import pytest
import torch
from cuda_on_host import build
from ptx_on_host import compiled
from ptx_on_host.opcodes import OPCODES, ROWS
from ptx_on_host.ptx import SIZES
from ptx_text import HEAD, SLOT, SLOTS, entry, run

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

INF, NAN = math.inf, math.nan
F32_NAN = 0x7FFFFFFF
TINY = 2.0**-140  # subnormal in float32

Value = int | float

# Sources, and the result last.
CASES: dict[str, list[tuple[Value, ...]]] = {
    "add.s32": [(2**31 - 1, 1, -(2**31)), (-5, 3, -2)],
    "add.s64": [(2**63 - 1, 2, -(2**63) + 1), (2**32, -1, 2**32 - 1)],
    "sub.s32": [(-(2**31), 1, 2**31 - 1), (3, 5, -2)],
    "sub.u64": [(0, 1, 2**64 - 1)],
    "mul.lo.s32": [(-3, 7, -21), (65536, 65537, 65536)],
    "mul.lo.s64": [(2**33, -(2**30), -(2**63))],
    "mul.hi.s32": [(-(2**31), 2, -1), (2**30, 8, 2)],
    "mul.hi.u32": [(2**31, 2, 1), (2**32 - 1, 2**32 - 1, 2**32 - 2)],
    "mul.wide.s32": [(-(2**31), 4, -(2**33)), (-7, -6, 42)],
    "mul.wide.u32": [(2**32 - 1, 4, 2**34 - 4)],
    "mul.wide.u16": [(0xFFFF, 0xFFFF, 0xFFFE0001)],
    "mad.lo.s32": [(-3, 7, 22, 1)],
    "mad.lo.s64": [(2**32, 2**31, -1, 2**63 - 1)],
    "div.s32": [(-7, 2, -3), (7, -2, -3)],
    "div.u32": [(2**32 - 1, 10, 429496729)],
    "div.u16": [(0xFFFF, 7, 9362)],
    "div.s64": [(-(2**40), 3, -366503875925)],
    "rem.s32": [(-7, 2, -1), (7, -2, 1)],
    "rem.u32": [(2**32 - 1, 10, 5)],
    "neg.s32": [(5, -5), (-(2**31), -(2**31))],
    "neg.s64": [(2**40, -(2**40))],
    "min.s32": [(-1, 1, -1), (4, 3, 3)],
    "min.u32": [(-1, 1, 1)],
    "max.s32": [(-1, 1, 1)],
    "max.u32": [(-1, 1, 2**32 - 1)],
    "max.u64": [(-1, 2**63, 2**64 - 1)],
    "popc.b32": [(0xF0F00001, 9), (0, 0)],
    "clz.b32": [(0, 32), (1, 31), (2**31, 0)],
    "clz.b64": [(0, 64), (2**32, 31)],
    "bfind.shiftamt.u32": [(0, 2**32 - 1), (1, 31), (2**31, 0), (0x00010000, 15)],
    "brev.b32": [(1, 2**31), (0x0000000D, 0xB0000000)],
    "bfi.b32": [(3, 0, 1, 1, 2), (0, 0xFF, 4, 8, 0x0F), (7, 0, 30, 8, 0xC0000000), (1, 8, 0, 0, 8)],
    "bfi.b64": [(0xABCD, 1, 32, 32, 0xABCD_0000_0001)],
    "add.f32": [
        (1.5, 2.25, 3.75),
        (INF, -INF, F32_NAN),
        (NAN, 1.0, F32_NAN),
        (TINY, TINY, 2 * TINY),
    ],
    "sub.f32": [(1.0, 2.0**-24, 1.0 - 2.0**-24), (INF, INF, F32_NAN)],
    "mul.f32": [(3.0, -0.5, -1.5), (2.0**-100, 2.0**-40, TINY), (INF, 0.0, F32_NAN)],
    "add.f64": [(1.0, 2.0**-52, 1.0 + 2.0**-52)],
    "add.rn.f64": [(1.0, 2.0**-53, 1.0)],
    "sub.f64": [(1.0, 0.25, 0.75)],
    "mul.f64": [(3.0, -0.5, -1.5)],
    "mul.rn.f64": [(-3.0, -0.5, 1.5)],
    # A product of 2^-46 less than 1: lost if it is rounded before the sum.
    "fma.rn.f32": [(1 + 2.0**-23, 1 - 2.0**-23, -1.0, -(2.0**-46)), (INF, 0.0, 1.0, F32_NAN)],
    "fma.rm.f32": [(1.0, 1.0, 2.0**-30, 1.0), (1.0, 1.0, -(2.0**-30), 1.0 - 2.0**-24)],
    "fma.rn.f64": [(1 + 2.0**-52, 1 - 2.0**-52, -1.0, -(2.0**-104))],
    "div.rn.f64": [(1.0, 3.0, 1 / 3), (-1.0, 0.0, -INF)],
    "rcp.rn.f64": [(3.0, 1 / 3), (-0.0, -INF)],
    "rcp.approx.ftz.f64": [(4.0, 0.25), (2.0**-1060, INF), (-INF, -0.0), (3.0, 0x3FD5555500000000)],
    "abs.f32": [(-2.5, 2.5), (-0.0, 0.0), (-INF, INF)],
    "abs.f64": [(-2.5, 2.5)],
    "neg.f32": [(0.0, -0.0), (3.0, -3.0)],
    "neg.f64": [(3.0, -3.0)],
    "max.f32": [(NAN, 2.0, 2.0), (-0.0, 0.0, 0.0), (NAN, NAN, F32_NAN), (-INF, -3.0, -3.0)],
    "min.f32": [(NAN, 2.0, 2.0), (0.0, -0.0, -0.0), (-INF, -3.0, -INF)],
    "ex2.approx.f32": [(3.0, 8.0), (-INF, 0.0), (INF, INF), (NAN, F32_NAN), (-140.0, TINY)],
    "div.approx.f32": [(1.0, 4.0, 0.25), (-3.0, 2.0, -1.5), (NAN, 1.0, F32_NAN)],
    "copysign.f32": [(-2.0, 3.0, -3.0), (0.5, -INF, INF)],
    "ex2.approx.ftz.f32": [(-1.0, 0.5), (-140.0, 0.0), (TINY, 1.0), (-INF, 0.0), (NAN, F32_NAN)],
    "max.f16x2": [(0x3C00_BC00, 0x7E00_4000, 0x3C00_4000)],
    "max.bf16x2": [(0x3F80_BF80, 0x7FC0_4000, 0x3F80_4000)],
    "setp.eq.s32": [(-1, 2**32 - 1, 1), (1, 2, 0)],
    "setp.eq.f32": [(0.0, -0.0, 1), (NAN, NAN, 0)],
    "setp.ne.s64": [(1, 2**32 + 1, 1), (4, 4, 0)],
    "setp.ne.f32": [(1.0, 2.0, 1), (NAN, 1.0, 0), (1.0, 1.0, 0)],
    "setp.lt.s32": [(-1, 0, 1), (0, 0, 0)],
    "setp.lt.u32": [(-1, 0, 0), (0, 1, 1)],
    "setp.lt.f32": [(1.0, 2.0, 1), (NAN, 2.0, 0)],
    "setp.le.s64": [(-1, -1, 1), (2**40, 1, 0)],
    "setp.gt.u64": [(-1, 1, 1), (1, 1, 0)],
    "setp.gt.s32": [(-1, 1, 0), (2, 1, 1)],
    "setp.ge.s32": [(1, 1, 1), (-2, 1, 0)],
    "setp.ge.u32": [(-2, 1, 1)],
    "setp.equ.f32": [(NAN, 1.0, 1), (2.0, 1.0, 0), (1.0, 1.0, 1)],
    "setp.neu.f64": [(NAN, NAN, 1), (1.0, 1.0, 0)],
    "setp.ltu.f32": [(NAN, 1.0, 1), (2.0, 1.0, 0), (0.0, 1.0, 1)],
    "setp.leu.f32": [(NAN, 1.0, 1), (2.0, 1.0, 0), (1.0, 1.0, 1)],
    "setp.gtu.f64": [(NAN, 1.0, 1), (1.0, 1.0, 0), (2.0, 1.0, 1)],
    "setp.geu.f32": [(NAN, 1.0, 1), (0.5, 1.0, 0), (1.0, 1.0, 1)],
    "setp.num.f64": [(NAN, 1.0, 0), (1.0, 1.0, 1)],
    "setp.nan.f32": [(1.0, NAN, 1), (1.0, 1.0, 0)],
    "selp.b32": [(7, 9, 1, 7), (7, 9, 0, 9)],
    "selp.f64": [(1.5, 2.5, 0, 2.5)],
    "selp.u16": [(7, 9, 1, 7)],
    "and.b32": [(0b1100, 0b1010, 0b1000)],
    "and.pred": [(1, 0, 0), (1, 1, 1)],
    "or.b16": [(0b1100, 0b1010, 0b1110)],
    "or.pred": [(1, 0, 1), (0, 0, 0)],
    "xor.b64": [(2**40 + 5, 3, 2**40 + 6)],
    "not.pred": [(1, 0), (0, 1)],
    "not.b32": [(0, 2**32 - 1)],
    "not.b64": [(1, 2**64 - 2)],
    "shl.b32": [(1, 31, 2**31), (1, 32, 0), (3, 31, 2**31)],
    "shl.b64": [(1, 40, 2**40), (1, 64, 0)],
    "shr.s32": [(-8, 1, -4), (-8, 40, -1), (8, 40, 0)],
    "shr.u32": [(2**31, 31, 1), (-1, 32, 0)],
    "shr.s64": [(-(2**40), 39, -2)],
    "shf.l.wrap.b32": [(0x80000001, 0x12345678, 4, 0x23456788), (5, 6, 32, 6)],
    "mov.b32": [(0xDEADBEEF, 0xDEADBEEF)],
    "mov.pred": [(1, 1), (0, 0)],
    "mov.f64": [(-0.0, -0.0)],
    "mov.u16": [(0xFFFF, 0xFFFF)],
    "cvt.u16.u32": [(0x12345678, 0x5678)],
    "cvt.u32.u16": [(0xFFFF, 0xFFFF)],
    "cvt.u32.u64": [(2**40 + 3, 3)],
    "cvt.u64.u32": [(2**32 - 1, 2**32 - 1)],
    "cvt.s32.s8": [(0x80, -128), (0x17F, 127)],
    "cvt.s64.s32": [(-1, -1)],
    "cvt.rn.f32.s64": [(2**24 + 1, 2.0**24), (-3, -3.0)],
    "cvt.rn.f64.s32": [(-3, -3.0)],
    "cvt.rn.f64.s64": [(-3, -3.0), (2**53 + 1, 2.0**53)],
    "cvt.rn.f32.f64": [(1 + 2.0**-24, 1.0), (1 + 3 * 2.0**-24, 1 + 2.0**-22), (NAN, F32_NAN)],
    "cvt.f64.f32": [(TINY, TINY), (-INF, -INF)],
    "cvt.rni.f32.f32": [(2.5, 2.0), (-3.5, -4.0), (0.4, 0.0)],
    "cvt.rzi.f64.f64": [(2.9, 2.0), (-2.9, -2.0)],
    "cvt.sat.f32.f32": [(1.5, 1.0), (-2.0, 0.0), (0.25, 0.25), (NAN, 0.0)],
    "cvt.f32.f16": [(0x3C01, 1 + 2.0**-10), (0x0001, 2.0**-24), (0xFE00, F32_NAN)],
    "cvt.f32.bf16": [(0x3F81, 1 + 2.0**-7), (0xFFC1, F32_NAN)],
    "cvt.rn.f16.f32": [(1 + 2.0**-11, 0x3C00), (65520.0, 0x7C00), (2.0**-25, 0), (NAN, 0x7FFF)],
    "cvt.rn.bf16.f32": [(1 + 2.0**-8, 0x3F80), (1 + 3 * 2.0**-8, 0x3F82), (NAN, 0x7FFF)],
}

REGISTERS = {"pred": "p", "f32": "f", "f64": "g"} | dict.fromkeys(
    ["s16", "u16", "b16", "f16", "bf16"], "h"
)


def register_of(kind: str) -> str:
    default = "r" if SIZES.get(kind, 4) <= 4 else "d"
    return REGISTERS.get(kind, default)


def kernel(opcode: str, name: str) -> str:
    """Each thread's sources from its slots, the result to its last one."""
    meaning = OPCODES[opcode]
    access = {"h": "u16", "r": "u32", "d": "u64", "f": "f32", "g": "f64", "p": "u32"}
    lines, sources = [], []
    for i, kind in enumerate(meaning.sources):
        letter = register_of(kind)
        to = "r" if letter == "p" else letter
        lines.append(f"ld.global.{access[letter]} %{to}{i + 1}, [%d0+{SLOT * i}];")
        if letter == "p":
            lines.append(f"setp.ne.s32 %p{i + 1}, %r{i + 1}, 0;")
        sources.append(f"%{letter}{i + 1}")
    letter = register_of(meaning.result)
    lines.append(f"{opcode} %{letter}9, {', '.join(sources)};")
    if letter == "p":
        lines.append("selp.u32 %r9, 1, 0, %p9;")
    to = "r" if letter == "p" else letter
    lines.append(f"st.global.{access[letter]} [%d0+{SLOT * (SLOTS - 1)}], %{to}9;")
    return entry(name, lines)


def bits(value: Value, kind: str) -> int:
    if isinstance(value, int):
        return value % 2 ** (8 * SIZES.get(kind, 4))
    # -inf and NaN, too, to the nearest.
    return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", value), "little")


@pytest.fixture(scope="module")
def code() -> compiled.Compiled:
    text = HEAD + "".join(kernel(opcode, name_of(opcode)) for opcode in CASES)
    return compiled.load_texts({"opcodes": text}, with_operators=False)


def name_of(opcode: str) -> str:
    return "test_" + re.sub(r"\W", "_", opcode)


@pytest.mark.parametrize("opcode", CASES)
def test_values_by_hand(opcode: str, code: compiled.Compiled) -> None:
    meaning = OPCODES[opcode]
    cases = CASES[opcode]
    slots = torch.zeros(len(cases), SLOTS, dtype=torch.int64)
    for row, (*sources, _) in zip(slots, cases, strict=True):
        for i, (value, kind) in enumerate(zip(sources, meaning.sources, strict=True)):
            row[i] = bits(value, kind) - (2**64 if bits(value, kind) >= 2**63 else 0)
    found = run(code, name_of(opcode), slots)[:, -1]
    size = 8 * SIZES.get(meaning.result, 4)
    wanted = [bits(case[-1], meaning.result) for case in cases]
    assert [int(value) % 2**size for value in found] == wanted


# Those that need more than one thread, or memory: test_ptx_on_host.py has them.
OF_OTHER_TESTS = re.compile(
    r"(bar|barrier|fence|atom|vote|redux|mbarrier|shfl|cvta|mapa|cp|trap)\b.*"
)


def test_every_opcode_is_tested() -> None:
    """Of each row of the table, one type at least."""
    for row in ROWS:
        if not OF_OTHER_TESTS.fullmatch(row[0]):
            assert any(opcode in CASES for opcode in OPCODES if OPCODES[opcode].row == row), row
