# SPDX-License-Identifier: Apache-2.0
"""Comparison, selection and data movement between registers: setp, set, selp, slct, mov."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim.decode import CONTAINERS, FLOATS, HALVES, Decoder, Read, Run, op
from ptxsim.numerics import flush, from_half
from ptxsim.program import WIDTHS, Both, Reg, Sink, Vector

_INT = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
_COMBINE: dict[str, Callable[..., Any]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def float_compare(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """An ordered comparison, false for NaN, or with the suffix u, true for NaN; num and nan."""
    nan = np.isnan(a) | np.isnan(b)
    if name == "num":
        return ~nan
    if name == "nan":
        return nan
    if name in _ORDERED:
        return _INT[name](a, b) & ~nan
    return _INT[name[:-1]](a, b) | nan


def half_parts(value: np.ndarray, kind: str) -> np.ndarray:
    """16- or 32-bit registers as float32 [lanes, 1 or 2]."""
    parts = np.ascontiguousarray(value).view(np.uint16).reshape(len(value), -1)
    return from_half(parts, kind)


def _comparison(d: Decoder, kind: str, first: int) -> Read:
    """The comparison of operands first and first + 1: bool [lanes], or [lanes, parts] of halves."""
    floating = kind in FLOATS or kind in HALVES
    if floating:
        names = [*_ORDERED, *(f"{name}u" for name in _ORDERED), "num", "nan"]
        name = d.one_of(*names)
    else:
        name = d.one_of(*_INT)
    ftz = d.flag("ftz")
    a, b = d.read(first, kind), d.read(first + 1, kind)
    if kind in HALVES:
        return lambda m: float_compare(name, half_parts(a(m), kind), half_parts(b(m), kind))
    if kind == "f32" and ftz:
        return lambda m: float_compare(name, flush(a(m)), flush(b(m)))
    if floating:
        return lambda m: float_compare(name, a(m), b(m))
    return lambda m: _INT[name](a(m), b(m))


def _combined(d: Decoder, first: int) -> Callable[[Any, np.ndarray], np.ndarray]:
    """What .and/.or/.xor with one more predicate makes of a comparison."""
    name = d.one_of(*_COMBINE, default="")
    if not name:
        return lambda m, value: value
    extra = d.read(first + 2, "pred")
    combine = _COMBINE[name]
    return lambda m, value: combine(value, extra(m))


@op("setp")
def _setp(d: Decoder) -> Run:
    kind = d.take_type()
    compare = _comparison(d, kind, 1)
    combined = _combined(d, 1)
    d.done(3, 4)
    target = d.ops[0]
    pair = isinstance(target, Both)
    first = d.writer(target.first if isinstance(target, Both) else target, "pred")
    second = d.writer(target.second, "pred") if isinstance(target, Both) else None
    packed = kind.endswith("x2")

    def run(m: Any, mask: np.ndarray) -> None:
        value = compare(m)
        if packed:
            one, two = value[:, 0], value[:, 1]
        else:
            one = value[:, 0] if value.ndim == 2 else value
            two = ~one
        # Both results are computed before either is written: an operand may be one of them.
        one, two = combined(m, one), combined(m, two)
        first(m, mask, one)
        if second is not None:
            second(m, mask, two)

    if packed != pair and packed:
        raise d.error("packed comparison needs two predicates")
    return run


@op("set")
def _set(d: Decoder) -> Run:
    kind = d.take_type()
    result = d.take_type()
    compare = _comparison(d, kind, 1)
    combined = _combined(d, 1)
    d.done(3, 4)
    write = d.write(0, result)
    width = CONTAINERS[WIDTHS[result] // (2 if result.endswith("x2") else 1)]
    ones = {"f32": 0x3F800000, "f16": 0x3C00, "f16x2": 0x3C00, "bf16": 0x3F80, "bf16x2": 0x3F80}
    yes = width(ones.get(result, (1 << WIDTHS[result]) - 1))
    if kind.endswith("x2") and not result.endswith("x2"):
        yes = np.uint16(0xFFFF)
    container = CONTAINERS[WIDTHS[result]]

    def run(m: Any, mask: np.ndarray) -> None:
        value = compare(m)
        if value.ndim == 2 and value.shape[1] == 2:
            parts = np.stack([combined(m, value[:, i]) for i in (0, 1)], axis=1)
            packed = np.where(parts, yes, yes.dtype.type(0))
            write(m, mask, np.ascontiguousarray(packed).view(container).reshape(-1))
            return
        value = combined(m, value.reshape(len(value)))
        bits = np.where(value, yes, yes.dtype.type(0))
        write(m, mask, bits.view(np.float32) if result == "f32" else bits)

    return run


@op("selp")
def _selp(d: Decoder) -> Run:
    kind = d.take_type()
    d.done(4)
    write, a, b, p = d.write(0, kind), d.read(1, kind), d.read(2, kind), d.read(3, "pred")
    return lambda m, mask: write(m, mask, np.where(p(m), a(m), b(m)))


@op("slct")
def _slct(d: Decoder) -> Run:
    selector = d.take_type()
    kind = d.take_type()
    ftz = d.flag("ftz")
    d.done(4)
    write, a, b = d.write(0, kind), d.read(1, kind), d.read(2, kind)
    c = d.read(3, selector)

    def run(m: Any, mask: np.ndarray) -> None:
        value = flush(c(m)) if ftz else c(m)
        write(m, mask, np.where(value >= 0, a(m), b(m)))

    return run


@op("mov")
def _mov(d: Decoder) -> Run:
    kind = d.take_type()
    d.done(2)
    target, source = d.ops
    if isinstance(source, Vector):
        return _pack(d, kind)
    if isinstance(target, Vector):
        return _unpack(d, kind)
    write, read = d.write(0, kind), d.read(1, kind)
    return lambda m, mask: write(m, mask, read(m))


def _element_bits(d: Decoder, kind: str, index: int) -> int:
    items = d.items(index)
    bits = WIDTHS[kind] // len(items)
    if any(isinstance(item, Reg) and item.width != bits for item in items):
        raise d.error("elements of another size")
    return bits


def _pack(d: Decoder, kind: str) -> Run:
    bits = _element_bits(d, kind, 1)
    reads = [d.reader(item, f"b{bits}") for item in d.items(1)]
    container = CONTAINERS[WIDTHS[kind]]
    write = d.writer(d.ops[0], f"b{WIDTHS[kind]}")

    def run(m: Any, mask: np.ndarray) -> None:
        value: Any = container(0)
        for i, read in enumerate(reads):
            value = value | read(m).astype(container) << container(bits * i)
        write(m, mask, value)

    return run


def _unpack(d: Decoder, kind: str) -> Run:
    bits = _element_bits(d, kind, 0)
    read = d.read(1, f"b{WIDTHS[kind]}")
    element = CONTAINERS[bits]
    count = WIDTHS[kind] // bits
    writes = [
        (i, d.writer(item, f"b{bits}"))
        for i, item in enumerate(d.items(0))
        if not isinstance(item, Sink)
    ]

    def run(m: Any, mask: np.ndarray) -> None:
        # A copy: a result may be the register that is read.
        parts = read(m).copy().view(element).reshape(-1, count)
        for i, write in writes:
            write(m, mask, parts[:, i])

    return run
