# SPDX-License-Identifier: Apache-2.0
"""Reads PTX text: variables, functions, and instructions with their operands resolved to registers.

The parser knows the grammar, not the instruction set: opcodes and modifiers are strings here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from ptxsim.errors import PtxError, Unsupported
from ptxsim.program import (
    WIDTHS,
    Address,
    Both,
    Function,
    Group,
    Imm,
    Instr,
    Not,
    Operand,
    Reg,
    Sink,
    Special,
    Sym,
    Unit,
    Variable,
    Vector,
)


class Scope:
    """Names of one pair of braces; unknown names are looked up further out."""

    def __init__(self, parent: Scope | None) -> None:
        self.parent = parent
        self.names: dict[str, Reg | Variable] = {}

    def find(self, name: str) -> Reg | Variable | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


_TOKEN = re.compile(r'"[^"]*"|[;{}\n]|[^;{}\n"]+')
_LABEL = re.compile(r"\s*([\w$]+)\s*:(?!:)")
_INSTR = re.compile(
    r"(?:@(?P<no>!?)(?P<guard>[%\w$]+)\s+)?(?P<op>[A-Za-z_][\w.:]*)\s*(?P<rest>.*)", re.S
)
_INT = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_VARIABLE = re.compile(
    r"(?P<space>\.(?:global|const|shared|local|param))\s+(?P<attrs>(?:\.\w+(?:\s+\d+(?=\s))?\s+)*)"
    r"\.(?P<type>[busf]\d+|bf16)\s+(?P<ptr>(?:\.\w+\s+(?:\d+\s+)?)*)(?P<rest>[\w$%].*)$",
    re.S,
)
_DIRECTIVES = {"maxntid", "reqntid", "minnctapersm", "maxnreg", "noreturn", "pragma"}


def _strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def integer(text: str) -> int | None:
    """The value of an integer literal, or None."""
    match = _INT.match(text.strip())
    if match is None:
        return None
    digits = match[2]
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    value = int(digits, 8 if octal else 0)
    return -value if match[1] == "-" else value


def split_commas(text: str) -> list[str]:
    """Splits at commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


class Parser:
    """Turns PTX text into a Unit. Use `parse`."""

    def __init__(self, text: str) -> None:
        self.unit = Unit()
        self.files: dict[str, str] = {}
        self.source = ""
        self.function: Function | None = None
        self.globals = Scope(None)
        self.scope = self.globals
        # .loc and .file end with their line; a semicolon lets the statement loop see them end.
        text = re.sub(r"(?m)^(\s*\.(?:loc|file)\s[^\n]*)$", r"\1;", _strip_comments(text))
        self.tokens = self._tokens(text)

    @staticmethod
    def _tokens(text: str) -> Iterator[tuple[str, int]]:
        line = 1
        for match in _TOKEN.finditer(text):
            if match[0] == "\n":
                line += 1
                yield " ", line
            else:
                yield match[0], line

    def run(self) -> Unit:
        buffer, line, braces = "", 0, 0
        for token, at in self.tokens:
            if not buffer.strip():
                line = at
                buffer = ""
            if token == "{" and braces == 0:
                if self._opens_block(buffer, line):
                    buffer = ""
                    continue
                braces = 1
                buffer += token
            elif token == "{":
                braces += 1
                buffer += token
            elif token == "}" and braces > 0:
                braces -= 1
                buffer += token
            elif token == "}":
                self._labels(buffer, line)
                self._close()
                buffer = ""
            elif token == ";" and braces == 0:
                self._statement(buffer, line)
                buffer = ""
            else:
                buffer += token
                buffer = self._header_line(buffer)
        if self.function is not None:
            raise PtxError(f"function {self.function.name} does not end")
        return self.unit

    def _header_line(self, buffer: str) -> str:
        """Drops directives of the module that end with their line."""
        if self.function is None and re.match(r"\s*\.(version|target|address_size)\s+\S+", buffer):
            return re.sub(
                r"^\s*\.(version\s+[\d.]+|target\s+[\w, ]+|address_size\s+\d+)", "", buffer
            )
        return buffer

    def _opens_block(self, buffer: str, line: int) -> bool:
        """Handles a `{` that begins a function, a section or a scope; False for a vector."""
        head = buffer.strip()
        if self.function is None:
            if ".section" in head:
                self._skip_section()
                return True
            if re.search(r"\.(entry|func)\b", head):
                self._begin_function(head, line)
                return True
            return False
        rest = self._labels(buffer, line)
        if rest.strip():
            return False
        self.scope = Scope(self.scope)
        return True

    def _skip_section(self) -> None:
        depth = 1
        for token, _ in self.tokens:
            depth += {"{": 1, "}": -1}.get(token, 0)
            if depth == 0:
                return

    def _close(self) -> None:
        assert self.scope.parent is not None
        self.scope = self.scope.parent
        if self.scope is self.globals and self.function is not None:
            self.unit.functions[self.function.name] = self.function
            self.function = None

    def _labels(self, buffer: str, line: int) -> str:
        """Takes labels off the front."""
        while self.function is not None and (match := _LABEL.match(buffer)):
            if match[1] in self.function.labels:
                raise PtxError(f"label {match[1]} is defined twice, line {line}")
            self.function.labels[match[1]] = len(self.function.body)
            buffer = buffer[match.end() :]
        return buffer

    def _statement(self, buffer: str, line: int) -> None:
        text = " ".join(self._labels(buffer, line).split())
        if not text:
            return
        try:
            if text.startswith("."):
                self._directive(text, line)
            else:
                self._instruction(text, line)
        except PtxError as error:
            raise error.at(f"PTX line {line}: {text}") from None

    def _directive(self, text: str, line: int) -> None:
        word = re.split(r"[\s.]", text[1:], maxsplit=1)[0]
        if word == "loc":
            self._loc(text)
        elif word == "file":
            match = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', text)
            if match:
                self.files[match[1]] = Path(match[2]).name
        elif word == "reg":
            self._registers(text)
        elif word == "branchtargets" and self.function is not None:
            here = len(self.function.body)
            label = [name for name, at in self.function.labels.items() if at == here][-1]
            self.function.tables[label] = [x.strip() for x in text.split(None, 1)[1].split(",")]
        elif word not in _DIRECTIVES and not re.search(r"\.func\b", text):
            stripped = re.sub(r"^(?:\.(?:visible|weak|common)\s+)+", "", text)
            extern = stripped.startswith(".extern")
            self._declare(self._variable(stripped.removeprefix(".extern").strip(), extern))

    def _loc(self, text: str) -> None:
        match = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", text)
        if match:
            self.source = f"@{match[1]}:{match[2]}"
            if inlined:
                self.source += f" inlined at @{inlined[1]}:{inlined[2]}"

    def _registers(self, text: str) -> None:
        match = re.match(r"\.reg\s*\.(\w+)\s+(.*)$", text)
        if match is None or match[1] not in WIDTHS:
            raise Unsupported("register declaration is not known")
        for name in split_commas(match[2]):
            many = re.match(r"([\w$%]+)<(\d+)>$", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            for each in names:
                reg = Reg(len(self.unit.register_widths), WIDTHS[match[1]], each)
                self.unit.register_widths.append(reg.width)
                self.scope.names[each] = reg

    def _variable(self, text: str, extern: bool = False) -> Variable:
        match = _VARIABLE.match(text)
        if match is None:
            raise Unsupported(f"directive is not known: {text}")
        space = match["space"][1:]
        element = WIDTHS[match["type"]] // 8
        align = element
        aligned = re.search(r"\.align\s+(\d+)", match["attrs"])
        if aligned:
            align = int(aligned[1])
        name_part, _, value = match["rest"].partition("=")
        shape = re.match(r"([\w$%]+)\s*((?:\[\s*\d*\s*\]\s*)*)$", name_part.strip())
        if shape is None:
            raise Unsupported(f"declaration is not known: {text}")
        count = 1
        for dim in re.findall(r"\[\s*(\d*)\s*\]", shape[2]):
            count *= int(dim) if dim else 0
        variable = Variable(shape[1], space, align, element * count, extern=extern)
        if value:
            self._initialise(variable, value, element)
        return variable

    def _initialise(self, variable: Variable, value: str, element: int) -> None:
        data = bytearray(variable.size)
        for i, item in enumerate(split_commas(value.replace("{", " ").replace("}", " "))):
            number = self._literal(item)
            if number is not None:
                raw = number.bits & ((1 << 8 * element) - 1)
                data[i * element : (i + 1) * element] = raw.to_bytes(element, "little")
            else:
                match = re.match(r"(?:generic\()?([\w$]+)\)?\s*(?:\+\s*(\d+))?$", item.strip())
                if match is None or element != 8:
                    raise Unsupported(f"initialiser is not known: {item}")
                variable.symbols.append((i * element, match[1], int(match[2] or 0)))
        variable.data = bytes(data)

    def _declare(self, variable: Variable) -> None:
        self.scope.names[variable.name] = variable
        if self.function is None:
            self.unit.variables[variable.name] = variable
        else:
            self.function.variables.append(variable)

    def _begin_function(self, head: str, line: int) -> None:
        match = re.search(
            r"\.(?P<kind>entry|func)\s*(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*"
            r"(?:\((?P<params>[^)]*)\))?(?P<limits>.*)$",
            head,
            re.S,
        )
        if match is None:
            raise PtxError(f"function header is not known, line {line}: {head}")
        lists = []
        for key in ("params", "results"):
            parts = [" ".join(part.split()) for part in split_commas(match[key] or "")]
            lists.append([self._variable(part) for part in parts])
        self.function = Function(match["name"], match["kind"] == "entry", lists[0], lists[1])
        for word, numbers in re.findall(r"\.(\w+)((?:\s*,?\s*\d+)*)", match["limits"]):
            if word not in _DIRECTIVES:
                raise Unsupported(f"directive .{word} of {match['name']} is not known")
            self.function.limits[word] = tuple(map(int, re.findall(r"\d+", numbers)))
        self.scope = Scope(self.globals)
        for variable in [*lists[0], *lists[1]]:
            self.scope.names[variable.name] = variable
        self.source = ""

    def _instruction(self, text: str, line: int) -> None:
        match = _INSTR.match(text)
        if match is None or self.function is None:
            raise PtxError("statement is not known")
        instr = Instr(match["op"], self._operands(match["rest"]), line, text, self.source)
        if match["guard"]:
            guard = self.scope.find(match["guard"])
            if not isinstance(guard, Reg) or guard.width != 1:
                raise PtxError(f"{match['guard']} is no predicate")
            instr.guard, instr.guard_not = guard, match["no"] == "!"
        self.function.body.append(instr)

    def _operands(self, text: str) -> list[Operand]:
        return [self._operand(part) for part in split_commas(text)]

    @staticmethod
    def _literal(text: str) -> Imm | None:
        text = text.strip()
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return Imm(int(text[2:], 16), 32)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Imm(int(text[2:], 16), 64)
        if re.match(r"[+-]?\d+\.\d*(?:[eE][+-]?\d+)?$", text):
            return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
        number = integer(text)
        return None if number is None else Imm(number)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operands(text[1:-1])))
        if text.startswith("("):
            return Group(tuple(self._operands(text[1:-1])))
        if text.startswith("["):
            base, offset = self._plus(text[1:-1])
            return Address(base, offset)
        if text.startswith("!"):
            return Not(self._operand(text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Both(self._operand(first), self._operand(second))
        if text == "_":
            return Sink()
        literal = self._literal(text)
        if literal is not None:
            return literal
        base, offset = self._plus(text)
        if isinstance(base, Sym):
            return Sym(base.name, base.variable, offset)
        if offset:
            raise PtxError(f"operand is not known: {text}")
        return base

    def _plus(self, text: str) -> tuple[Operand, int]:
        name, plus, rest = text.partition("+")
        if not plus and (match := re.match(r"\s*([\w$%.]+)\s*-\s*(\d+)\s*$", text)):
            name, rest = match[1], f"-{match[2]}"
        name = name.strip()
        offset = integer(rest) if rest.strip() else 0
        if offset is None:
            raise PtxError(f"operand is not known: {text}")
        literal = self._literal(name)
        if literal is not None:
            return literal, offset
        found = self.scope.find(name)
        if isinstance(found, Reg):
            return found, offset
        if isinstance(found, Variable):
            return Sym(name, found), offset
        if name.startswith("%") or name == "WARP_SZ":
            return Special(name), offset
        if not re.match(r"[\w$]+$", name):
            raise PtxError(f"operand is not known: {text}")
        return Sym(name), offset


def parse(text: str) -> Unit:
    """The functions and variables of PTX text.

    Raises PtxError, with the line, for what does not parse.
    """
    parser = Parser(text)
    unit = parser.run()
    for function in unit.functions.values():
        for instr in function.body:
            instr.source = re.sub(
                r"@(\d+):", lambda m: f"{parser.files.get(m[1], m[1])}:", instr.source
            )
    return unit
