# SPDX-License-Identifier: Apache-2.0
"""Integer and bitwise instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim.decode import CONTAINERS, Decoder, Run, dtype_of, op
from ptxsim.program import WIDTHS, Imm

_U32 = np.uint32


def simple(d: Decoder, type_name: str, compute: Callable[..., Any], count: int) -> Run:
    """result = compute(operands), all of one type."""
    d.done(count + 1)
    write = d.write(0, type_name)
    reads = [d.read(i + 1, type_name) for i in range(count)]
    if count == 1:
        (a,) = reads
        return lambda m, mask: write(m, mask, compute(a(m)))
    if count == 2:
        a, b = reads
        return lambda m, mask: write(m, mask, compute(a(m), b(m)))
    return lambda m, mask: write(m, mask, compute(*[read(m) for read in reads]))


def _saturating(type_name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    info = np.iinfo(dtype_of(type_name))

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        wide = compute(a.astype(np.int64), b.astype(np.int64))
        return np.clip(wide, info.min, info.max).astype(info.dtype)

    return run


@op("add", "sub", group="int")
def _add_sub(d: Decoder) -> Run:
    compute: Any = np.add if d.instr.base == "add" else np.subtract
    type_name = d.take_type()
    if d.flag("sat"):
        if type_name != "s32":
            raise d.error(".sat is for .s32")
        compute = _saturating(type_name, compute)
    return simple(d, type_name, compute, 2)


@op("min", "max", group="int")
def _min_max(d: Decoder) -> Run:
    compute = np.minimum if d.instr.base == "min" else np.maximum
    type_name = d.take_type()
    if d.flag("relu"):
        return simple(d, type_name, lambda a, b: np.maximum(compute(a, b), 0), 2)
    return simple(d, type_name, compute, 2)


@op("abs", group="int")
def _abs(d: Decoder) -> Run:
    return simple(d, d.take_type(), np.abs, 1)


@op("neg", group="int")
def _neg(d: Decoder) -> Run:
    return simple(d, d.take_type(), np.negative, 1)


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@op("and", "or", "xor")
def _logic(d: Decoder) -> Run:
    return simple(d, d.take_type(), _LOGIC[d.instr.base], 2)


@op("not")
def _not(d: Decoder) -> Run:
    return simple(d, d.take_type(), np.invert, 1)


@op("cnot")
def _cnot(d: Decoder) -> Run:
    return simple(d, d.take_type(), lambda a: (a == 0).astype(a.dtype), 1)


def mul_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of two integers of one type."""
    bits = 8 * a.dtype.itemsize
    signed = a.dtype.kind == "i"
    if bits < 64:
        wide = np.dtype(f"{'int' if signed else 'uint'}{2 * bits}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(a.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
    if signed:
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def _mul24(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    eight = a.dtype.type(8)
    return ((a << eight) >> eight) * ((b << eight) >> eight)


@op("mul", "mad", group="int")
def _mul(d: Decoder) -> Run:
    type_name = d.take_type()
    part = d.one_of("lo", "hi", "wide")
    third = d.instr.base == "mad"
    d.done(4 if third else 3)
    a, b = d.read(1, type_name), d.read(2, type_name)
    bits = WIDTHS[type_name]
    result = f"{type_name[0]}{2 * bits}" if part == "wide" else type_name
    write = d.write(0, result)
    wide = dtype_of(result)

    def product(m: Any) -> np.ndarray:
        if part == "hi":
            return mul_high(a(m), b(m))
        if part == "wide":
            return a(m).astype(wide) * b(m).astype(wide)
        return a(m) * b(m)

    if not third:
        return lambda m, mask: write(m, mask, product(m))
    c = d.read(3, result)
    return lambda m, mask: write(m, mask, product(m) + c(m))


@op("mul24", "mad24", group="int")
def _mul_24(d: Decoder) -> Run:
    type_name = d.take_type()
    d.one_of("lo")
    if d.instr.base == "mul24":
        return simple(d, type_name, _mul24, 2)
    return simple(d, type_name, lambda a, b, c: _mul24(a, b) + c, 3)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Division towards zero; what is divided by zero becomes all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = (a - np.fmod(a, safe)) // safe
    return np.where(b == 0, np.invert(np.zeros_like(quotient)), quotient)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The remainder with the sign of a; a itself where b is zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, np.fmod(a, safe))


@op("div", group="int")
def _div(d: Decoder) -> Run:
    return simple(d, d.take_type(), divide, 2)


@op("rem", group="int")
def _rem(d: Decoder) -> Run:
    return simple(d, d.take_type(), remainder, 2)


@op("sad", group="int")
def _sad(d: Decoder) -> Run:
    return simple(d, d.take_type(), lambda a, b, c: np.where(a > b, a - b, b - a) + c, 3)


@op("shl", "shr")
def _shift(d: Decoder) -> Run:
    """Shifts by the width or more give zero, or the sign."""
    type_name = d.take_type()
    d.done(3)
    left = d.instr.base == "shl"
    bits = WIDTHS[type_name]
    signed = type_name[0] == "s"
    dtype = dtype_of(type_name)
    write, a, b = d.write(0, type_name), d.read(1, type_name), d.read(2, "u32")

    def run(m: Any, mask: np.ndarray) -> None:
        amount = b(m)
        inside = np.minimum(amount, bits - 1).astype(dtype)
        value = a(m) << inside if left else a(m) >> inside
        if left or not signed:
            value = np.where(amount >= bits, dtype(0), value)
        write(m, mask, value)

    return run


@op("shf")
def _funnel_shift(d: Decoder) -> Run:
    d.take_type()
    left = d.one_of("l", "r") == "l"
    wrap = d.one_of("wrap", "clamp") == "wrap"

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        amount = (c & _U32(31) if wrap else np.minimum(c, _U32(32))).astype(np.uint64)
        pair = b.astype(np.uint64) << np.uint64(32) | a
        if left:
            return (pair << amount >> np.uint64(32)).astype(_U32)
        return (pair >> amount).astype(_U32)

    return simple(d, "b32", compute, 3)


@op("bfe")
def _extract(d: Decoder) -> Run:
    type_name = d.take_type()
    d.done(4)
    bits, dtype = WIDTHS[type_name], dtype_of(type_name)
    unsigned = CONTAINERS[bits]
    write, a = d.write(0, type_name), d.read(1, type_name)
    position, length = d.read(2, "u32"), d.read(3, "u32")

    def run(m: Any, mask: np.ndarray) -> None:
        raw: np.ndarray = a(m).view(unsigned)
        at, size = (x(m).astype(np.int64) & 255 for x in (position, length))
        kept = _low_mask(np.minimum(size, bits - at), unsigned)
        field = np.where(at >= bits, unsigned(0), raw >> _at_most(at, bits - 1, unsigned)) & kept
        if dtype is not unsigned:
            top = raw >> _at_most(np.maximum(at + size - 1, 0), bits - 1, unsigned)
            negative = (size > 0) & (top & unsigned(1) == 1)
            field = np.where(negative, field | ~kept, field)
        write(m, mask, field.view(dtype))

    return run


def _at_most(count: np.ndarray, limit: int, dtype: Any) -> np.ndarray:
    return np.minimum(count, limit).astype(dtype)


def _low_mask(count: np.ndarray, dtype: Any) -> np.ndarray:
    """Masks of the `count` lowest bits."""
    bits = 8 * np.dtype(dtype).itemsize
    ones = np.invert(dtype(0))
    shifted = ones >> np.clip(bits - count, 0, bits - 1).astype(dtype)
    return np.where(count <= 0, dtype(0), shifted)


@op("bfi")
def _insert(d: Decoder) -> Run:
    type_name = d.take_type()
    d.done(5)
    dtype, bits = dtype_of(type_name), WIDTHS[type_name]
    write = d.write(0, type_name)
    a, b = d.read(1, type_name), d.read(2, type_name)
    position, length = d.read(3, "u32"), d.read(4, "u32")

    def run(m: Any, mask: np.ndarray) -> None:
        at, size = (x(m).astype(np.int64) & 255 for x in (position, length))
        field = _low_mask(np.minimum(size, bits - np.minimum(at, bits)), dtype)
        shift = np.minimum(at, bits - 1).astype(dtype)
        field = np.where(at >= bits, dtype(0), field << shift)
        write(m, mask, (b(m) & ~field) | ((a(m) << shift) & field))

    return run


@op("lop3")
def _lop3(d: Decoder) -> Run:
    d.take_type()
    table = d.ops[4]
    if not isinstance(table, Imm):
        raise d.error("the table must be a constant")
    terms = [i for i in range(8) if table.bits >> i & 1]
    d.done(5)
    write, *reads = d.write(0, "b32"), *(d.read(i, "b32") for i in (1, 2, 3))

    def run(m: Any, mask: np.ndarray) -> None:
        a, b, c = (read(m) for read in reads)
        result: Any = _U32(0)
        for term in terms:
            part = (a if term & 4 else ~a) & (b if term & 2 else ~b) & (c if term & 1 else ~c)
            result = result | part
        write(m, mask, result)

    return run


@op("prmt")
def _permute(d: Decoder) -> Run:
    """Bytes of b:a by four selectors; bit 3 of a selector spreads the sign of the byte."""
    d.take_type()

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        pair = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros(1, np.uint64)
        for i in range(4):
            selector = (c >> _U32(4 * i)).astype(np.uint64)
            byte = pair >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            sign = np.where(byte >= 128, np.uint64(0xFF), np.uint64(0))
            byte = np.where(selector & np.uint64(8), sign, byte)
            result = result | byte << np.uint64(8 * i)
        return result.astype(_U32)

    return simple(d, "b32", compute, 3)


@op("popc")
def _popc(d: Decoder) -> Run:
    type_name = d.take_type()
    d.done(2)
    write, a = d.write(0, "u32"), d.read(1, type_name)
    return lambda m, mask: write(m, mask, np.bitwise_count(a(m)).astype(_U32))


def leading_zeros(a: np.ndarray) -> np.ndarray:
    """Of unsigned integers; the width for zero."""
    bits = 8 * a.dtype.itemsize
    filled = a.copy()
    shift = 1
    while shift < bits:
        filled |= filled >> a.dtype.type(shift)
        shift *= 2
    return (bits - np.bitwise_count(filled).astype(np.int64)).astype(_U32)


@op("clz")
def _clz(d: Decoder) -> Run:
    type_name = d.take_type()
    d.done(2)
    write, a = d.write(0, "u32"), d.read(1, type_name)
    return lambda m, mask: write(m, mask, leading_zeros(a(m)))


@op("bfind")
def _find(d: Decoder) -> Run:
    """Position of the highest bit that is no sign; all ones if there is none."""
    type_name = d.take_type()
    shift = d.flag("shiftamt")
    d.done(2)
    bits = WIDTHS[type_name]
    write, a = d.write(0, "u32"), d.read(1, type_name)

    def run(m: Any, mask: np.ndarray) -> None:
        value = a(m)
        zeros = leading_zeros(np.where(value < 0, ~value, value).view(CONTAINERS[bits]))
        found = zeros if shift else _U32(bits - 1) - zeros
        write(m, mask, np.where(zeros == bits, _U32(0xFFFFFFFF), found))

    return run


@op("brev")
def _brev(d: Decoder) -> Run:
    type_name = d.take_type()

    def compute(a: np.ndarray) -> np.ndarray:
        size = a.dtype.itemsize
        raw = np.ascontiguousarray(a).view(np.uint8).reshape(-1, size)
        bits = np.unpackbits(raw, axis=1, bitorder="little")[:, ::-1]
        return np.packbits(bits, axis=1, bitorder="little").reshape(-1).view(a.dtype)

    return simple(d, type_name, compute, 1)


@op("dp4a")
def _dp4a(d: Decoder) -> Run:
    b_type = d.take_type()
    a_type = d.take_type()
    d.done(4)
    signed = "s" in (a_type[0], b_type[0])
    write = d.write(0, "s32" if signed else "u32")
    a, b = d.read(1, a_type), d.read(2, b_type)
    c = d.read(3, "s32" if signed else "u32")

    def parts(value: np.ndarray, type_name: str) -> np.ndarray:
        small = np.int8 if type_name[0] == "s" else np.uint8
        return np.ascontiguousarray(value).view(small).reshape(-1, 4).astype(np.int64)

    def run(m: Any, mask: np.ndarray) -> None:
        total = (parts(a(m), a_type) * parts(b(m), b_type)).sum(axis=1) + c(m).astype(np.int64)
        write(m, mask, total.astype(np.int32 if signed else np.uint32))

    return run
