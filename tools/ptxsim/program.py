# SPDX-License-Identifier: Apache-2.0
"""A parsed PTX file as data: registers, operands, variables, instructions, functions."""

from __future__ import annotations

from dataclasses import dataclass, field

WIDTHS = {
    **{f"{kind}{bits}": bits for kind in "usb" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64, "pred": 1},
}


@dataclass(frozen=True)
class Reg:
    """A register: its index within the module and its width in bits (1 for a predicate)."""

    index: int
    width: int
    name: str


@dataclass(frozen=True)
class Imm:
    """A constant: an integer, or the bits of a float of `width`."""

    bits: int
    width: int = 0


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Sink:
    """The operand `_`: a result that is dropped."""


@dataclass
class Variable:
    """A variable of a state space; `address` is set when the module or the block is laid out."""

    name: str
    space: str
    align: int
    size: int
    data: bytes | None = None
    symbols: list[tuple[int, str, int]] = field(default_factory=list)
    extern: bool = False
    address: int = -1


@dataclass(frozen=True)
class Sym:
    """A name that is not a register: a label, a function, or a variable when `variable` is set."""

    name: str
    variable: Variable | None = None
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Both:
    """p|q: two results."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """!p: a negated predicate."""

    reg: Operand


@dataclass(frozen=True)
class Group:
    """(a, b): the arguments of a call."""

    items: tuple[Operand, ...]


Operand = Reg | Imm | Special | Sink | Sym | Address | Vector | Both | Not | Group


@dataclass
class Instr:
    """One instruction: `opcode` as written, split into `base` and `mods`, and where it stands."""

    opcode: str
    ops: list[Operand]
    line: int
    text: str
    source: str = ""
    guard: Reg | None = None
    guard_not: bool = False

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def mods(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def location(self) -> str:
        where = f"PTX line {self.line}: {self.text}"
        return f"{where} ({self.source})" if self.source else where


@dataclass
class Function:
    """A kernel (`entry`) or a device function."""

    name: str
    entry: bool
    params: list[Variable]
    results: list[Variable]
    body: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    limits: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Unit:
    """A PTX file: its functions and variables, and how many registers they use together."""

    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    register_widths: list[int] = field(default_factory=list)
