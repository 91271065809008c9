# SPDX-License-Identifier: Apache-2.0
"""From a parsed instruction to a closure: types, readers and writers of operands, and the table of
instructions that the `ops_*` modules fill.

A closure gets the machine and the mask of lanes that execute. It computes for all lanes of the
block and writes only where the mask is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptxsim.errors import PtxError, Unsupported
from ptxsim.program import (
    WIDTHS,
    Imm,
    Instr,
    Not,
    Operand,
    Reg,
    Sink,
    Special,
    Sym,
    Vector,
)

if TYPE_CHECKING:
    from ptxsim.machine import Machine

Read = Callable[["Machine"], np.ndarray]
Write = Callable[["Machine", np.ndarray, Any], None]
Run = Callable[["Machine", np.ndarray], Any]
Builder = Callable[["Decoder"], Run]

CONTAINERS = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_KINDS = {"u": "uint", "s": "int", "b": "uint", "f": "float"}
HALVES = {"f16", "f16x2", "bf16", "bf16x2"}
FLOATS = {"f32", "f64"}


def dtype_of(name: str) -> Any:
    """The numpy type of a PTX type; of a half-precision type, that of its bits."""
    if name == "pred":
        return np.bool_
    if name in HALVES:
        return CONTAINERS[WIDTHS[name]]
    return np.dtype(f"{_KINDS[name[0]]}{WIDTHS[name]}").type


def group_of(name: str) -> str:
    """Which family of instructions a type selects."""
    if name in HALVES:
        return "half"
    if name in FLOATS:
        return "float"
    return "pred" if name == "pred" else "int"


TABLE: dict[tuple[str, str], Builder] = {}


def op(*bases: str, group: str = "") -> Callable[[Builder], Builder]:
    """Registers a builder for opcodes, for types of one group or (\"\") for all."""

    def register(builder: Builder) -> Builder:
        for base in bases:
            assert (base, group) not in TABLE, base
            TABLE[base, group] = builder
        return builder

    return register


SPECIALS: dict[str, Callable[[Any], np.ndarray]] = {
    "WARP_SZ": lambda m: m.constant32,
    "%laneid": lambda m: m.lane_in_warp,
    "%warpid": lambda m: m.warp_of_lane,
    "%nwarpid": lambda m: np.full(1, m.warps, np.uint32),
    "%smid": lambda m: np.zeros(1, np.uint32),
    "%clock": lambda m: np.full(1, m.steps & 0xFFFFFFFF, np.uint32),
    "%clock64": lambda m: np.full(1, m.steps, np.uint64),
    "%dynamic_smem_size": lambda m: np.full(1, m.dynamic_shared, np.uint32),
    "%total_smem_size": lambda m: np.full(1, m.shared.size, np.uint32),
    "%lanemask_eq": lambda m: np.left_shift(np.uint32(1), m.lane_in_warp),
    "%lanemask_lt": lambda m: np.left_shift(np.uint32(1), m.lane_in_warp) - np.uint32(1),
    "%lanemask_le": lambda m: np.left_shift(np.uint32(2), m.lane_in_warp) - np.uint32(1),
    "%lanemask_gt": lambda m: ~(np.left_shift(np.uint32(2), m.lane_in_warp) - np.uint32(1)),
    "%lanemask_ge": lambda m: ~(np.left_shift(np.uint32(1), m.lane_in_warp) - np.uint32(1)),
}


def _add_grid_registers() -> None:
    def part(name: str, axis: int) -> Callable[[Any], np.ndarray]:
        return lambda m: getattr(m, name)[axis]

    for name in ("tid", "ntid", "ctaid", "nctaid"):
        for axis, letter in enumerate("xyz"):
            SPECIALS[f"%{name}.{letter}"] = part(name, axis)


_add_grid_registers()


class Decoder:
    """One instruction while its closure is built; every modifier must be asked for."""

    def __init__(self, instr: Instr) -> None:
        self.instr = instr
        self.ops = instr.ops
        self.mods = list(instr.mods)
        self.type = next((mod for mod in reversed(self.mods) if mod in WIDTHS), "")

    def flag(self, name: str) -> bool:
        """Takes a modifier, if it is there."""
        if name in self.mods:
            self.mods.remove(name)
            return True
        return False

    def one_of(self, *names: str, default: str | None = None) -> str:
        """Takes the one modifier of `names` that is there."""
        for name in names:
            if self.flag(name):
                return name
        if default is None:
            raise Unsupported(f"{self.instr.opcode}: needs one of .{', .'.join(names)}")
        return default

    def take_type(self) -> str:
        """Takes the last type among the modifiers."""
        for i in range(len(self.mods) - 1, -1, -1):
            if self.mods[i] in WIDTHS:
                return self.mods.pop(i)
        raise Unsupported(f"{self.instr.opcode}: no known type")

    def ignore(self, *names: str) -> None:
        """Takes modifiers that change nothing that is modelled."""
        for name in names:
            self.flag(name)

    def ignore_prefix(self, *prefixes: str) -> None:
        self.mods = [mod for mod in self.mods if not mod.startswith(prefixes)]

    def done(self, *counts: int) -> None:
        """Raises for modifiers that nobody asked for and for a wrong number of operands."""
        if self.mods:
            raise Unsupported(f"{self.instr.opcode}: modifier .{self.mods[0]} is not known")
        if counts and len(self.ops) not in counts:
            raise Unsupported(f"{self.instr.opcode}: {len(self.ops)} operands")

    def error(self, text: str) -> PtxError:
        return Unsupported(f"{self.instr.opcode}: {text}")

    def read(self, index: int, type_name: str) -> Read:
        return self.reader(self.ops[index], type_name)

    def write(self, index: int, type_name: str) -> Write:
        return self.writer(self.ops[index], type_name)

    def reader(self, operand: Operand, type_name: str) -> Read:
        """How an operand is read as a type. The result has one element or one per lane."""
        dtype = dtype_of(type_name)
        width = 8 * np.dtype(dtype).itemsize if type_name != "pred" else 1
        if isinstance(operand, Reg):
            return self._register_reader(operand, dtype, width)
        if isinstance(operand, Not) and isinstance(operand.reg, Reg) and operand.reg.width == 1:
            index = operand.reg.index
            return lambda m: ~m.regs[index]
        if isinstance(operand, Imm):
            value = self._immediate(operand, type_name, width)
            return lambda m: value
        if isinstance(operand, Special):
            return self._special_reader(operand, dtype)
        if isinstance(operand, Sym):
            variable, offset = operand.variable, operand.offset
            if variable is None or width < 32:
                raise self.error(f"{operand.name} is no variable")
            return lambda m: np.full(1, variable.address + offset, CONTAINERS[width]).view(dtype)
        raise self.error("operand is not known")

    def _register_reader(self, reg: Reg, dtype: Any, width: int) -> Read:
        index = reg.index
        if reg.width == width:
            if width == 1:
                return lambda m: m.regs[index]
            return lambda m: m.regs[index].view(dtype)
        if reg.width < width or width == 1 or reg.width == 1:
            raise self.error(f"{reg.name} has {reg.width} bits, {width} are needed")
        narrow = CONTAINERS[width]
        return lambda m: m.regs[index].astype(narrow).view(dtype)

    def _immediate(self, operand: Imm, type_name: str, width: int) -> np.ndarray:
        dtype = dtype_of(type_name)
        bits = operand.bits
        if type_name == "pred":
            return np.array([bool(bits)])
        if operand.width == 64 and width == 32:
            return np.array([bits], np.uint64).view(np.float64).astype(np.float32).view(dtype)
        if operand.width == 32 and width == 64 and type_name == "f64":
            return np.array([bits], np.uint32).view(np.float32).astype(np.float64)
        if operand.width not in (0, width) or (type_name in FLOATS and not operand.width and bits):
            raise self.error("constant of another type")
        return np.array([bits & ((1 << width) - 1)], CONTAINERS[width]).view(dtype)

    def _special_reader(self, operand: Special, dtype: Any) -> Read:
        if operand.name not in SPECIALS:
            raise self.error(f"special register {operand.name} is not known")
        get = SPECIALS[operand.name]
        size = np.dtype(dtype).itemsize

        def read(m: Machine) -> np.ndarray:
            value = get(m)
            if value.dtype.itemsize != size:
                value = value.astype(f"u{size}")
            return value.view(dtype)

        return read

    def writer(self, operand: Operand, type_name: str) -> Write:
        """How a result of a type is written; into a wider register it is extended by its sign."""
        if isinstance(operand, Sink):
            return lambda m, mask, value: None
        if not isinstance(operand, Reg):
            raise self.error("result is no register")
        index, bits = operand.index, operand.width
        width = WIDTHS[type_name]
        if width == bits:
            dtype = dtype_of(type_name)
            if bits == 1:
                return lambda m, mask, value: np.copyto(m.regs[index], value, where=mask)

            def write(m: Machine, mask: np.ndarray, value: Any) -> None:
                np.copyto(m.regs[index].view(dtype), value, where=mask, casting="unsafe")

            return write
        if width > bits or bits == 1 or width == 1:
            raise self.error(f"{operand.name} has {bits} bits, the result has {width}")
        wide = np.dtype(f"{'int' if type_name[0] == 's' else 'uint'}{bits}").type

        def extend(m: Machine, mask: np.ndarray, value: Any) -> None:
            np.copyto(m.regs[index].view(wide), value.astype(wide), where=mask)

        return extend

    def items(self, index: int) -> list[Operand]:
        """An operand as a list: the items of a vector, or the operand alone."""
        operand = self.ops[index]
        return list(operand.items) if isinstance(operand, Vector) else [operand]


def decode(instr: Instr) -> Run:
    """The closure of an instruction that is no branch. Raises Unsupported, naming the line."""
    decoder = Decoder(instr)
    try:
        base = instr.base
        group = group_of(decoder.type) if decoder.type else ""
        builder = TABLE.get((base, group)) or TABLE.get((base, ""))
        if builder is None:
            raise Unsupported(f"instruction {instr.opcode} is not known")
        return builder(decoder)
    except PtxError as error:
        raise error.at(instr.location) from None
    except (IndexError, ValueError, AttributeError, KeyError) as error:
        raise Unsupported(f"{instr.opcode}: {error}").at(instr.location) from None
