"""Writes C++ for PTX: a function for each of its functions, a statement for each instruction.

Registers are local variables; the places of the shim's messages are the lines of the PTX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

from ptx_on_host.flow import effects, maybe_unwritten
from ptx_on_host.opcodes import CACHE_HINTS, OPCODES, SPACES, SPECIAL_REGISTERS
from ptx_on_host.ptx import (
    SIZES,
    Address,
    Function,
    Immediate,
    Instruction,
    Label,
    Module,
    Operand,
    Pair,
    PtxError,
    Register,
    Special,
    Symbol,
    Vector,
)

_BRANCHES = ("bra", "bra.uni")
_FLOATS = ("f32", "f64")

# What an instruction is counted as, in the order of counters.h: the first that fits.
_CLASSES = [
    ("memory", r"(ld|st|atom|cp)\b.*"),
    ("special", r"(ex2|rcp|div\.rn)\b.*"),
    ("float64", r".*\.f64"),
    ("float32", r".*\.f32"),
    ("other", r"(bra|call|ret|trap|bar|barrier|vote|redux|shfl|fence|mbarrier|mapa|cvta)\b.*"),
    ("integer", r".*"),
]
_ORDER = ("integer", "float32", "float64", "special", "memory", "other")
_NOT_COUNTED = re.compile(r"(ld|st)\.param\b.*|mov\b.*")  # ptxas makes most of them nothing


class _Translator:
    """One function of a module."""

    def __init__(self, module: Module, function: Function, counting: bool) -> None:
        self.counting = counting
        self.module = module
        self.function = function
        self.line = function.line
        self.labels = {s.name for s in function.body if isinstance(s, Label)}
        self.registers: dict[str, str] = {}
        self.watched: set[str] = set()  # registers whose writing is kept book of
        # Of which bytes, and of how many: a call's, the own ones, the own results.
        own = [] if function.is_entry else function.parameters + function.results
        self.bytes = {v.name: v.bytes for v in function.locals + own}
        self.parameters = {v.name: i for i, v in enumerate(function.parameters)}

    def refuse(self, what: str) -> NoReturn:
        raise PtxError(f"{self.module.file}:{self.line}: {what} is not known to the translator")

    # ---- Operands.

    def register(self, register: Register) -> str:
        self.registers[register.name] = register.type
        return register.name

    def immediate(self, text: str, kind: str) -> str:
        """A number, or the bits of one, as a value of that type."""
        is_float = re.match("0[fFdD]", text)
        if kind == "pred" and text in ("0", "1", "-1"):
            return "false" if text == "0" else "true"
        if kind not in SIZES:
            self.refuse(f"{text} as a {kind}")
        bits = 8 * SIZES[kind]
        if is_float:
            if 4 * len(text[2:]) != bits or kind not in (*_FLOATS, f"b{bits}"):
                self.refuse(f"{text} as a {kind}")
            return f"as<{kind}>(b{bits}{{0x{text[2:]}u}})"
        value = int(text, 0)
        if kind in _FLOATS or not -(2 ** (bits - 1)) <= value < 2**bits:
            self.refuse(f"{text} as a {kind}")
        return f"static_cast<{kind}>(0x{value % 2**bits:x}u)"

    def value(self, operand: Operand, kind: str, *, may_be_wider: bool = False) -> str:
        """The value of an operand, as the type that the instruction takes it for."""
        match operand:
            case Immediate(text):
                return self.immediate(text, kind)
            case Special(name) if name in SPECIAL_REGISTERS and kind == "u32":
                return SPECIAL_REGISTERS[name]
            case Symbol(name) if kind in ("u32", "b32", "u64", "b64"):
                return f"static_cast<{kind}>({self.symbol(name)})"
            case Register(name, declared):
                self.register(operand)
                self.check_kind(declared, kind)
                if kind == "pred":
                    return name
                if may_be_wider and SIZES[declared] > SIZES[kind]:
                    return f"low<{kind}>({name})"
                return f"as<{kind}>({name})"
        self.refuse(f"{operand} as a {kind}")

    def check_kind(self, declared: str, kind: str) -> None:
        """A register of floats is for them or for bits, a predicate for nothing else."""
        wrong = (declared == "pred") != (kind == "pred")
        wrong |= declared in _FLOATS and kind[0] not in "fb"
        if wrong:
            self.refuse(f"a register .{declared} as a {kind}")

    def symbol(self, name: str) -> str:
        """The address that a name stands for."""
        if name in self.module.shared:
            return "kSharedBegin"
        if self.function.is_entry and name in self.parameters:
            return f"parameter_address({self.parameters[name]})"
        self.refuse(f"the address of {name}")

    def address(self, operand: Operand, size: int = 8) -> str:
        """Of memory, by a register of that many bytes."""
        if not isinstance(operand, Address):
            self.refuse(f"{operand} as an address")
        if isinstance(operand.base, Symbol):
            base = self.symbol(operand.base.name)
        elif SIZES.get(operand.base.type) not in (size, 8):
            self.refuse(f"an address in a register .{operand.base.type}")
        else:
            base = self.register(operand.base)
            if SIZES[operand.base.type] == 4:  # then addresses wrap at 2^32
                return f"static_cast<b32>({base} + {operand.offset % 2**32}u)"
        return f"({base} + {operand.offset % 2**64}u)"

    def source(self, operand: Operand, kind: str, *, may_be_wider: bool) -> str:
        if kind == "shared":
            return self.address(operand, size=4)
        if kind == "global":
            return self.address(operand)
        return self.value(operand, kind, may_be_wider=may_be_wider)

    def assign(self, target: Operand, kind: str, value: str, *, may_be_wider: bool = False) -> str:
        if not isinstance(target, Register):
            self.refuse(f"{target} as a result")
        self.register(target)
        self.check_kind(target.type, kind)
        if kind == "pred":
            return f"{target.name} = {value};"
        convert = "as"
        if may_be_wider and SIZES[target.type] > SIZES[kind]:
            convert = "widened"
        return f"{target.name} = {convert}<{target.type}>(static_cast<{kind}>({value}));"

    # ---- Instructions.

    def statement(self, instruction: Instruction) -> str:
        self.line = instruction.line
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in _BRANCHES:
            return self.branch(operands)
        if opcode == "ret":
            return "return;"
        if opcode == "call.uni":
            return self.call(operands)
        if opcode.startswith(("ld.", "st.")):
            return self.access(opcode, operands)
        if opcode.startswith("mov.b") and any(isinstance(o, Vector) for o in operands):
            return self.pack(opcode, operands)
        if opcode not in OPCODES:
            self.refuse(opcode)
        meaning = OPCODES[opcode]
        has_result = meaning.result != "-"
        sources = operands[1:] if has_result else operands
        if len(sources) != len(meaning.sources) or (has_result and not operands):
            self.refuse(f"{opcode} with {len(operands)} operands")
        is_conversion = opcode.startswith("cvt.")
        values = {
            letter: self.source(operand, kind, may_be_wider=is_conversion)
            for letter, operand, kind in zip("abcd", sources, meaning.sources, strict=False)
        }
        result = re.sub(r"\b[abcd]\b", lambda m: values[m[0]], meaning.expression)
        if meaning.result == "-":
            return f"{result};"
        target = operands[0]
        if meaning.result == "_":
            return f"{result};" if target == Symbol("_") else self.refuse(f"{opcode} with a result")
        if meaning.result == "shuffled":
            if isinstance(target, Pair):
                predicate = self.assign(target.predicate, "pred", "shuffled.in_range")
                target = target.value
            else:
                predicate = ""
            value = self.assign(target, "b32", "shuffled.value")
            return f"{{ const Shuffled shuffled = {result}; {value} {predicate} }}"
        return self.assign(target, meaning.result, result, may_be_wider=is_conversion)

    def branch(self, operands: Sequence[Operand]) -> str:
        match operands:
            case (Symbol(name),) if name in self.labels:
                return f"goto {name};"
        self.refuse("this branch")

    def call(self, operands: Sequence[Operand]) -> str:
        results: Sequence[Operand] = ()
        if isinstance(operands[0], Vector):
            results, operands = operands[0].items, operands[1:]
        match operands:
            case (Symbol(name), Vector(arguments)) if name in self.module.functions:
                callee = self.module.functions[name]
            case _:
                self.refuse("this call")
        given = [self.local(operand) for operand in (*arguments, *results)]
        wanted = callee.parameters + callee.results
        if [self.bytes[g] for g in given] != [v.bytes for v in wanted]:
            self.refuse(f"a call of {name} with other parameters")
        return f"{name}({', '.join(given)});"

    def local(self, operand: Operand) -> str:
        if isinstance(operand, Symbol) and operand.name in self.bytes:
            return operand.name
        self.refuse(f"{operand} as a parameter of a call")

    def pack(self, opcode: str, operands: Sequence[Operand]) -> str:
        """Several registers as one, or one as several."""
        kind = opcode.removeprefix("mov.")
        if len(operands) != 2 or kind not in SIZES:
            self.refuse(opcode)
        target, source = operands
        vector = target if isinstance(target, Vector) else source
        if not isinstance(vector, Vector) or SIZES[kind] % len(vector.items):
            self.refuse(f"{opcode} of these operands")
        part = f"b{8 * SIZES[kind] // len(vector.items)}"
        several = f"Several<{part}, {len(vector.items)}>"
        if vector is source:
            values = ", ".join(self.value(item, part) for item in vector.items)
            return self.assign(target, kind, f"as<{kind}>({several}{{{{{values}}}}})")
        parts = " ".join(
            self.assign(item, part, f"parts.items[{i}]") for i, item in enumerate(vector.items)
        )
        return f"{{ const auto parts = as<{several}>({self.value(source, kind)}); {parts} }}"

    # ---- Loads and stores.

    def access(self, opcode: str, operands: Sequence[Operand]) -> str:
        name, *modifiers, kind = opcode.split(".")
        space = modifiers.pop(0) if modifiers and modifiers[0] in SPACES else "generic"
        if modifiers and modifiers[0] in CACHE_HINTS:
            modifiers.pop(0)
        width = int(modifiers.pop(0)[1:]) if modifiers and modifiers[0] in ("v2", "v4") else 1
        if modifiers or kind not in SIZES or len(operands) != 2:
            self.refuse(opcode)
        is_load = name == "ld"
        target, source = operands
        memory, registers = (source, target) if is_load else (target, source)
        items = registers.items if isinstance(registers, Vector) else (registers,)
        if len(items) != width or isinstance(registers, Vector) != (width > 1):
            self.refuse(f"{opcode} of {len(items)} registers")
        whole = kind if width == 1 else f"Several<{kind}, {width}>"
        reach = self.memory(name, space, memory, whole, width * SIZES[kind])
        if is_load:
            if width == 1:
                return self.assign(items[0], kind, f"{reach})", may_be_wider=True)
            parts = " ".join(
                self.assign(item, kind, f"parts.items[{i}]", may_be_wider=True)
                for i, item in enumerate(items)
            )
            return f"{{ const {whole} parts = {reach}); {parts} }}"
        values = [self.value(item, kind, may_be_wider=True) for item in items]
        given = values[0] if width == 1 else f"{whole}{{{{{', '.join(values)}}}}}"
        return f"{reach}, {given});"

    def memory(self, name: str, space: str, memory: Operand, whole: str, size: int) -> str:
        """The beginning of the call that reads or writes there."""
        if space == "param" and isinstance(memory, Address) and isinstance(memory.base, Symbol):
            local, offset = memory.base.name, memory.offset
            if local in self.bytes:
                if not 0 <= offset <= self.bytes[local] - size or offset % size:
                    self.refuse(f"{size} bytes at {offset} of the parameter {local}")
                function = "from_bytes" if name == "ld" else "to_bytes"
                return f"{function}<{whole}>({local} + {offset}"
        if space == "param":
            if name != "ld" or not self.function.is_entry:
                self.refuse(f"{name}.param of this address")
            count = len(self.parameters)
            return f"load_parameter<{whole}>(parameters, {count}, {self.address(memory)}"
        function = "load" if name == "ld" else "store"
        address = self.address(memory, size=4 if space == "shared" else 8)
        return f"{function}_{space}<{whole}>({address}"

    # ---- The function.

    def watch(self, instruction: Instruction, statement: str) -> str:
        """The statement, that also keeps book of registers that may be unwritten."""
        read, written = effects(instruction)
        checks = [f'need_written(written_{n}, "{n}");' for n in read if n in self.watched]
        notes = [f"written_{n} = true;" for n in written if n in self.watched]
        return " ".join([*checks, statement, *notes])

    def basic_blocks(self) -> dict[int, list[int]]:
        """Where each begins in the body, and its instructions by class."""
        counts: dict[int, list[int]] = {}
        begins = True
        for at, statement in enumerate(self.function.body):
            if isinstance(statement, Label):
                begins = True
                continue
            if begins:
                begin, begins = at, False
                counts[begin] = [0] * len(_ORDER)
            if not _NOT_COUNTED.fullmatch(statement.opcode):
                name = next(n for n, p in _CLASSES if re.fullmatch(p, statement.opcode))
                counts[begin][_ORDER.index(name)] += 1
            begins = statement.opcode in _BRANCHES
        return counts

    def lines(self) -> list[str]:
        # First all of them, which also checks them: only then is there a flow.
        texts = {i: self.statement(i) for i in self.function.body if isinstance(i, Instruction)}
        self.watched = maybe_unwritten(self.function)
        body: list[str] = []
        counts = self.basic_blocks() if self.counting else {}
        for at, statement in enumerate(self.function.body):
            if at in counts:
                numbers = ", ".join(map(str, counts[at]))
                body.append(f"count_instructions<{numbers}>({statement.line});")
            if isinstance(statement, Label):
                body.append(f"{statement.name}:;")
                continue
            text = self.watch(statement, texts[statement])
            if statement.guard is not None:
                guard = self.value(statement.guard, "pred")
                # Also where it says that nothing is done.
                name = statement.guard.name
                check = f'need_written(written_{name}, "{name}"); ' if name in self.watched else ""
                text = f"{check}if ({'!' if statement.negated else ''}{guard}) {{ {text} }}"
            body += [f'#line {statement.line} "{self.module.file}"', text]
        declared = [f"{kind} {name};" for name, kind in self.registers.items()]
        declared += [f"bool written_{name} = false;" for name in sorted(self.watched)]
        declared += [f"unsigned char {v.name}[{v.bytes}];" for v in self.function.locals]
        return [f"{signature(self.function)} {{", *declared, *body, "}"]


def signature(function: Function) -> str:
    if function.is_entry:
        return f"void {function.name}(const cuda_on_host::Argument* parameters)"
    pointers = [f"const unsigned char* {v.name}" for v in function.parameters]
    pointers += [f"unsigned char* {v.name}" for v in function.results]
    return f"void {function.name}({', '.join(pointers)})"


def namespace(module: Module) -> str:
    """Modules have functions of the same names."""
    return module.file.partition(".")[0]


def translate(module: Module, functions: Sequence[Function], *, counting: bool = False) -> str:
    """A C++ file with these functions of the module. ``counting``: for counters.h."""
    names = [f"{signature(function)};" for function in module.functions.values()]
    text = [line for f in functions for line in _Translator(module, f, counting).lines()]
    begin = f"namespace ptx_on_host::{namespace(module)} {{"
    return "\n".join(['#include "ptx_on_host.h"', begin, *names, *text, "}", ""])


def entries(modules: Sequence[Module]) -> str:
    """A C++ file with the list of all kernels."""
    names, rows = [], []
    for module in modules:
        for f in filter(lambda f: f.is_entry, module.functions.values()):
            names.append(f"namespace {namespace(module)} {{ {signature(f)}; }}")
            sizes = ", ".join(str(v.bytes) for v in f.parameters)
            rows.append(
                f'{{"{f.name}", {namespace(module)}::{f.name}, {f.max_threads or 0}, '
                f"{len(f.parameters)}, {{{sizes}}}}},"
            )
    table = ["const Entry kEntries[] = {", *rows, "};"]
    table += [f"const size_t kNumEntries = {len(rows)};"]
    begin = ['#include "entries.h"', "namespace ptx_on_host {"]
    return "\n".join([*begin, *names, *table, "}", ""])
