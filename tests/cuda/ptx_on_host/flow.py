"""What a function reads that some way through it has not written.

nvcc leaves such a register now and then, where the value is not used; all others are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

from ptx_on_host.opcodes import OPCODES
from ptx_on_host.ptx import Address, Function, Instruction, Label, Operand, Pair, Register, Symbol
from ptx_on_host.ptx import Vector as Several

ENDS = ("ret", "trap")


def _names(operand: Operand) -> Iterator[str]:
    """Of registers, and of the parameters of calls."""
    match operand:
        case Register(name) | Symbol(name):
            yield name
        case Address(base):
            yield from _names(base)
        case Several(items):
            for item in items:
                yield from _names(item)
        case Pair(value, predicate):
            yield from (value.name, predicate.name)


def _registers(operand: Operand) -> Iterator[str]:
    """Of these names, those that have to be written before they are read."""
    match operand:
        case Register(name):
            yield name
        case Address(base):
            yield from _registers(base)
        case Several(items):
            for item in items:
                yield from _registers(item)
        case Pair(value, predicate):
            yield from (value.name, predicate.name)


def effects(instruction: Instruction) -> tuple[list[str], list[str]]:
    """What is read and what is written."""
    opcode, operands = instruction.opcode, list(instruction.operands)
    written: list[Operand] = []
    if opcode == "call.uni":
        if isinstance(operands[0], Several):
            written = [operands.pop(0)]
        operands = operands[1:]
    elif opcode.startswith(("st.param", "ld.", "mov.")) or (
        opcode in OPCODES and OPCODES[opcode].result not in ("-", "_")
    ):
        written = [operands.pop(0)]
    read = [name for operand in operands for name in _names(operand)]
    if instruction.guard is not None:
        read.append(instruction.guard.name)
    return read, [name for operand in written for name in _names(operand)]


def _successors(body: list[Instruction | Label], places: dict[str, int], at: int) -> list[int]:
    statement = body[at]
    if isinstance(statement, Instruction):
        if statement.opcode in ENDS and statement.guard is None:
            return []
        if statement.opcode in ("bra", "bra.uni"):
            (target,) = _names(statement.operands[0])
            return [places[target]] + ([at + 1] if statement.guard is not None else [])
    return [at + 1]


def maybe_unwritten(function: Function) -> set[str]:
    """The registers, and parameters of calls, that may be read before they are written."""
    body = function.body
    places = {s.name: at for at, s in enumerate(body) if isinstance(s, Label)}
    bits: dict[str, int] = {}
    reads: list[list[str]] = []
    writes: list[int] = []
    for statement in body:
        read, written = effects(statement) if isinstance(statement, Instruction) else ([], [])
        reads.append(read)
        if isinstance(statement, Instruction):
            guards = [] if statement.guard is None else [statement.guard]
            for operand in (*statement.operands, *guards):
                for name in _registers(operand):  # also one that is written nowhere
                    bits.setdefault(name, 1 << len(bits))
        guarded = isinstance(statement, Instruction) and statement.guard is not None
        sum_of_bits = 0
        for name in written:
            bit = bits.setdefault(name, 1 << len(bits))
            sum_of_bits |= 0 if guarded else bit
        writes.append(sum_of_bits)

    # Written on every way to a statement; None: no way was found yet.
    before: list[int | None] = [None] * (len(body) + 1)
    before[0] = 0
    pending = [0]
    while pending:
        at = pending.pop()
        known = before[at]
        if at == len(body) or known is None:
            continue
        for successor in _successors(body, places, at):
            old = before[successor]
            new = known | writes[at] if old is None else old & (known | writes[at])
            if new != old:
                before[successor] = new
                pending.append(successor)

    return {
        name
        for read, known in zip(reads, before[:-1], strict=True)
        if known is not None
        for name in read
        if name in bits and not known & bits[name]
    }
