"""Reads PTX: functions, their registers and parameters, and one Instruction for each statement.

As much of the language as nvcc writes for these kernels (PTX ISA, chapters 4, 5 and 11). Anything
else is refused with its line: what is not understood must not run as something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|//[^\n]*)
      | (?P<newline>\n)
      | (?P<string>"[^"\n]*")
      | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|-?0[xX][0-9a-fA-F]+\b|-?\d[\d.]*\b)
      | (?P<word>[A-Za-z_$%.][\w$.%]*(?:::[\w.]+)*)
      | (?P<mark>[{}()\[\]<>,;:|@!+])""",
    re.VERBOSE,
)
SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
SIZES |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4}
SIZES |= {"b64": 8, "u64": 8, "s64": 8, "f64": 8}

# What a kernel asks of its launch, and what only speaks to ptxas.
_BOUNDS = {".maxntid", ".reqntid"}
_HINTS = {".minnctapersm"}
_PRAGMAS = re.compile(r'"(nounroll|used_bytes_mask \d+)"')


class PtxError(Exception):
    """What the translator does not know, with its place."""


@dataclass(frozen=True)
class Register:
    name: str  # of C++: unique in its function
    type: str  # as declared: pred, b32, f32


@dataclass(frozen=True)
class Symbol:
    """A name that stands for an address: of shared memory, of a parameter."""

    name: str


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Special:
    """A register of the machine, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b}: elements of a vector, or a call's parameters."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """d|p: a result and the predicate beside it."""

    value: Register
    predicate: Register


Operand = Register | Symbol | Immediate | Special | Address | Vector | Pair


@dataclass(frozen=True)
class Variable:
    """A parameter, or a block's shared memory: bytes 0 are as many as the launch gives."""

    name: str
    bytes: int
    align: int


@dataclass(frozen=True)
class Instruction:
    line: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None = None
    negated: bool = False


@dataclass(frozen=True)
class Label:
    line: int
    name: str


@dataclass
class Function:
    name: str
    line: int
    is_entry: bool
    results: list[Variable]
    parameters: list[Variable]
    max_threads: int | None = None
    body: list[Instruction | Label] = field(default_factory=list)
    locals: list[Variable] = field(default_factory=list)  # parameters of the calls that it makes


@dataclass
class Module:
    file: str
    target: str = ""
    shared: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)


@dataclass
class _Scope:
    """The names between two braces."""

    registers: dict[str, Register] = field(default_factory=dict)
    counted: dict[str, tuple[int, str]] = field(default_factory=dict)  # %r<5>
    variables: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


def _identifier(name: str) -> str:
    return name.replace("%", "").replace("$", "").replace(".", "_")


class _Parser:
    def __init__(self, text: str, module: Module) -> None:
        self.module = module
        self.line = 1
        self.tokens = list(self._tokens(text))
        self.at = 0
        self.scopes: list[_Scope] = []
        self.num_scopes = 0

    def _tokens(self, text: str) -> Iterator[tuple[str, str, int]]:
        line, at = 1, 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                self.line = line
                self.refuse(f"the character {text[at]!r}")
            at = match.end()
            if match.lastgroup == "newline":
                line += 1
            elif match.lastgroup != "skip":
                yield str(match.lastgroup), match[0], line
        yield "end", "", line

    def refuse(self, what: str) -> NoReturn:
        raise PtxError(f"{self.module.file}:{self.line}: {what} is not known to the translator")

    # ---- Tokens.

    def peek(self) -> str:
        return self.tokens[self.at][1]

    def next(self, kind: str | None = None) -> str:
        found, text, self.line = self.tokens[self.at]
        if kind is not None and found != kind:
            self.refuse(f"{text!r}, where a {kind} should stand,")
        self.at += 1
        return text

    def take(self, text: str) -> bool:
        if self.peek() != text:
            return False
        self.next()
        return True

    def need(self, text: str) -> None:
        if not self.take(text):
            self.line = self.tokens[self.at][2]
            self.refuse(f"{self.peek()!r}, where {text!r} should stand,")

    def integer(self) -> int:
        return int(self.next("number"), 0)

    # ---- The file.

    def parse(self) -> None:
        self.need(".version")
        self.next("number")
        self.need(".target")
        self.module.target = self.next("word")
        self.need(".address_size")
        if self.integer() != 64:
            self.refuse("an address size other than 64")
        while self.peek():
            word = self.next("word")
            if word == ".extern" and self.take(".shared"):
                variable = self.variable()
                self.need("]") if self.take("[") else self.refuse("shared memory of a fixed size")
                self.need(";")
                self.module.shared[variable.name] = variable
            elif word == ".visible" and self.take(".entry"):
                self.function(is_entry=True)
            elif word == ".func":
                self.function(is_entry=False)
            else:
                self.refuse(word)

    def variable(self) -> Variable:
        """[.align N] .type name, without what may follow in brackets."""
        align = self.integer() if self.take(".align") else 0
        kind = self.next("word")[1:]
        if kind not in SIZES:
            self.refuse(f"the type .{kind}")
        return Variable(self.next("word"), SIZES[kind], align or SIZES[kind])

    def parameter(self) -> Variable:
        one = self.variable()
        if not self.take("["):
            return one
        count = self.integer()
        self.need("]")
        return Variable(one.name, one.bytes * count, one.align)

    def parameters(self) -> list[Variable]:
        found: list[Variable] = []
        if not self.take("("):
            return found
        while not self.take(")"):
            if found:
                self.need(",")
            self.need(".param")
            found.append(self.parameter())
        return found

    def function(self, is_entry: bool) -> None:
        line = self.line
        results = self.parameters()
        name = self.next("word")
        function = Function(name, line, is_entry, results, self.parameters())
        while (word := self.peek()) in _BOUNDS | _HINTS:
            self.next()
            product = self.integer()
            while self.take(","):
                product *= self.integer()
            if word in _BOUNDS:
                function.max_threads = product
        if self.take(";"):
            return  # declared; defined further on
        self.need("{")
        self.scopes = [_Scope()]
        self.num_scopes = 0
        self.body(function)
        self.module.functions[name] = function

    # ---- What stands between the braces of a function.

    def body(self, function: Function) -> None:
        depth = len(self.scopes)
        self.find_labels()
        while True:
            if self.take("}"):
                self.scopes.pop()
                if len(self.scopes) < depth:
                    return
            elif self.take("{"):
                self.num_scopes += 1
                self.scopes.append(_Scope())
                self.find_labels()
            elif self.tokens[self.at + 1][1] == ":":
                name = self.next("word")
                self.need(":")
                function.body.append(Label(self.line, self.scopes[-1].labels[name]))
            elif self.peek() in (".reg", ".param", ".pragma"):
                self.declaration(function)
            else:
                function.body.append(self.instruction())

    def find_labels(self) -> None:
        """Of the scope that begins here: they may be used before they stand."""
        depth, at = 0, self.at
        while depth >= 0:
            kind, text, _ = self.tokens[at]
            if kind == "end":
                self.refuse("a brace without its other one")
            depth += (text == "{") - (text == "}")
            if depth == 0 and self.tokens[at + 1][1] == ":":
                self.scopes[-1].labels[text] = f"{_identifier(text)}{self.suffix()}"
            at += 1

    def suffix(self) -> str:
        return f"_{self.num_scopes}" if len(self.scopes) > 1 else ""

    def declaration(self, function: Function) -> None:
        word = self.next()
        if word == ".pragma":
            if not _PRAGMAS.fullmatch(self.next("string")):
                self.refuse("this pragma")
        elif word == ".param":
            one = self.parameter()
            name = f"{one.name}{self.suffix()}"
            self.scopes[-1].variables[one.name] = name
            function.locals.append(Variable(name, one.bytes, one.align))
        else:
            kind = self.next("word")[1:]
            if kind != "pred" and kind not in SIZES:
                self.refuse(f"the type .{kind}")
            while True:
                name = self.next("word")
                if self.take("<"):
                    self.scopes[-1].counted[name] = (self.integer(), kind)
                    self.need(">")
                else:
                    register = Register(f"{_identifier(name)}{self.suffix()}", kind)
                    self.scopes[-1].registers[name] = register
                if not self.take(","):
                    break
        self.need(";")

    def instruction(self) -> Instruction:
        guard, negated = None, False
        if self.take("@"):
            negated = self.take("!")
            guard = self.name(self.next("word"))
            if not isinstance(guard, Register) or guard.type != "pred":
                self.refuse("a guard that is no predicate")
        opcode = self.next("word")
        line = self.line
        operands: list[Operand] = []
        while not self.take(";"):
            if operands:
                self.need(",")
            operands.append(self.operand())
        return Instruction(line, opcode, tuple(operands), guard, negated)

    def operand(self) -> Operand:
        if self.take("["):
            base = self.name(self.next("word"))
            offset = self.integer() if self.take("+") else 0
            self.need("]")
            if not isinstance(base, Register | Symbol):
                self.refuse("this address")
            return Address(base, offset)
        for begin, end in ("{}", "()"):
            if self.take(begin):
                items: list[Operand] = []
                while not self.take(end):
                    if items:
                        self.need(",")
                    items.append(self.operand())
                return Vector(tuple(items))
        if self.tokens[self.at][0] == "number":
            return Immediate(self.next())
        value = self.name(self.next("word"))
        if self.take("|"):
            predicate = self.name(self.next("word"))
            if isinstance(value, Register) and isinstance(predicate, Register):
                return Pair(value, predicate)
            self.refuse("this pair")
        return value

    def name(self, text: str) -> Register | Symbol | Special:
        counted = re.fullmatch(r"(%[a-z]+)(\d+)", text)
        for scope in reversed(self.scopes):
            if text in scope.registers:
                return scope.registers[text]
            if counted and counted[1] in scope.counted:
                count, kind = scope.counted[counted[1]]
                if int(counted[2]) < count:
                    return Register(f"{text[1:]}_", kind)  # f32 is a type, too
            if text in scope.variables:
                return Symbol(scope.variables[text])
            if text in scope.labels:
                return Symbol(scope.labels[text])
        if text.startswith("%"):
            return Special(text)
        return Symbol(text)


def parse(text: str, file: str) -> Module:
    """The module of a PTX text. ``file`` is its name in errors."""
    module = Module(file)
    _Parser(text, module).parse()
    return module
