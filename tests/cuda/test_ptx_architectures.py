"""The compiled kernels of the architectures whose PTX is not run by the tests of the kernels."""

from __future__ import annotations

from dataclasses import replace

import kernels_on_host
import pytest
from inputs import make
from ptx_on_host import compiled
from ptx_on_host.ptx import Function, Immediate, Instruction, Label, Vector, parse
from test_kernels_on_host import FEW_WAYS, assert_right

pytestmark = [pytest.mark.slow, pytest.mark.nvcc]

# Each, and one with the same code.
SAME_AS = {"sm_80": "sm_90", "sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_100"}
OF_CLUSTERS = "_staged_kernel"  # of compute capability 9.0 and up; below, they trap


def functions(architecture: str) -> dict[tuple[str, str], Function]:
    texts = compiled.ptx(architecture)
    modules = {file: parse(text, f"{file}.ptx") for file, text in texts.items()}
    return {(file, name): f for file, m in modules.items() for name, f in m.functions.items()}


def without_line(statement: Instruction | Label) -> Instruction | Label:
    """Also, a bfloat16 is the upper half of a float before the instruction that says so."""
    statement = replace(statement, line=0)
    if isinstance(statement, Instruction) and statement.opcode == "cvt.f32.bf16":
        target, source = statement.operands
        halves = Vector((Immediate("0"), source))
        return replace(statement, opcode="mov.b32", operands=(target, halves))
    return statement


@pytest.mark.sweep
@pytest.mark.parametrize("architecture", SAME_AS)
def test_the_same_code(architecture: str) -> None:
    """Where this fails, compiled.ARCHITECTURES needs the architecture, and SAME_AS does not."""
    other = SAME_AS[architecture]
    texts = compiled.ptx(other).items()
    if compiled.ptx(architecture) == {n: t.replace(other, architecture) for n, t in texts}:
        return
    found, wanted = functions(architecture), functions(other)
    assert found.keys() == wanted.keys()
    for name, function in found.items():
        if OF_CLUSTERS in name[1] and int(architecture[3:]) < 90:
            continue
        twin = wanted[name]
        assert function.parameters == twin.parameters and function.results == twin.results
        assert function.max_threads == twin.max_threads
        assert [*map(without_line, function.body)] == [*map(without_line, twin.body)], name


@pytest.mark.sweep
def test_below_9_0_there_are_no_clusters() -> None:
    kernels = [f for (_, name), f in functions("sm_80").items() if OF_CLUSTERS in name]
    assert kernels
    for kernel in kernels:
        opcodes = {s.opcode for s in kernel.body if isinstance(s, Instruction)}
        assert "trap" in opcodes and not [o for o in opcodes if o.startswith(("cp.", "mbarrier"))]


def test_approximations_at_their_bound(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by up to two units in the last place, as the PTX ISA allows ex2.approx."""
    code = compiled.load(architecture)
    monkeypatch.setattr(kernels_on_host, "code", code)
    logits, labels = make(9, 4099)
    exact = FEW_WAYS[0](logits, labels)
    code.approximate(2)
    try:
        assert not exact.gradient.equal(FEW_WAYS[0](logits, labels).gradient)
        for trap in ("normal", "probability_one_minus_1e-6"):
            assert_right(*make(9, 4099, trap=trap), FEW_WAYS)
    finally:
        code.approximate(0)
