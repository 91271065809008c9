# SPDX-License-Identifier: Apache-2.0
"""Floating-point arithmetic in f32, f64 and the half-precision formats, alone and packed.

`.approx` instructions return the correctly rounded value, which the hardware comes near to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim import numerics as n
from ptxsim.decode import CONTAINERS, Decoder, Run, dtype_of, op
from ptxsim.ops_compare import half_parts
from ptxsim.program import WIDTHS

ROUNDING = ("rn", "rz", "rm", "rp")


def _finish32(d: Decoder, type_name: str, compute: Callable[..., Any], count: int) -> Run:
    """Applies .ftz to operands and result and .sat to the result."""
    ftz, sat = d.flag("ftz"), d.flag("sat")
    d.done(count + 1)
    write = d.write(0, type_name)
    reads = [d.read(i + 1, type_name) for i in range(count)]

    def run(m: Any, mask: np.ndarray) -> None:
        values = [read(m) for read in reads]
        if ftz:
            values = [n.flush(value) for value in values]
        result = compute(*values)
        if sat:
            result = n.saturate(result)
        write(m, mask, n.flush(result) if ftz else result)

    return run


def _directed(exact_odd: Callable[..., Any], near: Callable[..., Any], mode: str) -> Any:
    """float32 arithmetic in a rounding mode, from a result in float64 that is rounded to odd."""
    if mode == "rn":
        return near
    return lambda *values: n.to_f32(exact_odd(*(v.astype(np.float64) for v in values)), mode)


def _fma_near(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return n.fma_odd(a, b, c).astype(np.float32)


_ARITHMETIC: dict[str, tuple[int, Any, Any]] = {
    "add": (2, np.add, n.sum_odd),
    "sub": (2, np.subtract, lambda a, b: n.sum_odd(a, -b)),
    "mul": (2, np.multiply, np.multiply),
    "fma": (3, _fma_near, n.fma_odd),
    "mad": (3, _fma_near, n.fma_odd),
}


@op("add", "sub", "mul", "fma", "mad", group="float")
def _arithmetic(d: Decoder) -> Run:
    type_name = d.take_type()
    mode = d.one_of(*ROUNDING, default="rn")
    count, near, odd = _ARITHMETIC[d.instr.base]
    if type_name == "f64":
        if mode != "rn":
            raise d.error("directed rounding of f64 is not executed")
        return _finish32(d, type_name, n.fma64 if count == 3 else near, count)
    return _finish32(d, type_name, _directed(odd, near, mode), count)


def _quotient_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b of float32 values as float64, made odd where it is inexact."""
    q = a / b
    inexact = np.isfinite(q) & (n.fma64(q, b, -a) != 0) & (q.view(np.int64) & 1 == 0)
    error = n.fma64(-q, b, a)
    return np.where(inexact, np.nextafter(q, np.where((error > 0) == (b > 0), np.inf, -np.inf)), q)


@op("div", group="float")
def _div(d: Decoder) -> Run:
    type_name = d.take_type()
    mode = d.one_of(*ROUNDING, "full", "approx")
    if mode in ("rn", "full", "approx"):
        return _finish32(d, type_name, np.divide, 2)
    if type_name == "f64":
        raise d.error("directed rounding of f64 is not executed")
    return _finish32(d, type_name, _directed(_quotient_odd, np.divide, mode), 2)


def _rcp(a: np.ndarray) -> np.ndarray:
    return a.dtype.type(1) / a


def _rsqrt(a: np.ndarray) -> np.ndarray:
    return (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype)


_UNARY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rcp": (_rcp, ("approx", "rn")),
    "sqrt": (np.sqrt, ("approx", "rn")),
    "rsqrt": (_rsqrt, ("approx",)),
    "ex2": (lambda a: np.exp2(a.astype(np.float64)).astype(a.dtype), ("approx",)),
    "lg2": (lambda a: np.log2(a.astype(np.float64)).astype(a.dtype), ("approx",)),
    "sin": (lambda a: np.sin(a.astype(np.float64)).astype(a.dtype), ("approx",)),
    "cos": (lambda a: np.cos(a.astype(np.float64)).astype(a.dtype), ("approx",)),
    "tanh": (lambda a: np.tanh(a.astype(np.float64)).astype(a.dtype), ("approx",)),
}


@op(*_UNARY, group="float")
def _unary(d: Decoder) -> Run:
    compute, modes = _UNARY[d.instr.base]
    type_name = d.take_type()
    d.one_of(*modes)
    return _finish32(d, type_name, compute, 1)


@op("ex2", "tanh", group="half")
def _unary_half(d: Decoder) -> Run:
    compute, modes = _UNARY[d.instr.base]
    type_name = d.take_type()
    d.one_of(*modes)
    d.ignore("ftz")
    return half(d, type_name, compute, 1)


@op("abs", "neg", group="float")
def _sign(d: Decoder) -> Run:
    type_name = d.take_type()
    return _finish32(d, type_name, np.abs if d.instr.base == "abs" else np.negative, 1)


@op("min", "max", group="float")
def _min_max(d: Decoder) -> Run:
    type_name = d.take_type()
    choose = n.minimum if d.instr.base == "min" else n.maximum
    nan = d.flag("NaN")
    if d.flag("xorsign"):
        raise d.error(".xorsign is not executed")
    count = len(d.ops) - 1
    if count == 3:
        return _finish32(d, type_name, lambda a, b, c: choose(choose(a, b, nan), c, nan), 3)
    return _finish32(d, type_name, lambda a, b: choose(a, b, nan), 2)


@op("copysign", group="float")
def _copysign(d: Decoder) -> Run:
    """The sign of the first operand on the second."""
    type_name = d.take_type()
    return _finish32(d, type_name, lambda a, b: np.copysign(b, a), 2)


_TESTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda a: ~np.isnan(a),
    "notanumber": np.isnan,
    "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
    "subnormal": lambda a: (np.abs(a) < np.finfo(a.dtype).tiny) & (a != 0),
}


@op("testp", group="float")
def _testp(d: Decoder) -> Run:
    type_name = d.take_type()
    test = _TESTS[d.one_of(*_TESTS)]
    d.done(2)
    write, a = d.write(0, "pred"), d.read(1, type_name)
    return lambda m, mask: write(m, mask, test(a(m)))


# Half precision: parts [lanes, 1 or 2] in float32, one rounding back.


def half(d: Decoder, kind: str, compute: Callable[..., Any], count: int) -> Run:
    """result = compute(operands) in float32 or float64, rounded once."""
    sat, relu = d.flag("sat"), d.flag("relu")
    d.done(count + 1)
    write = d.write(0, kind)
    reads = [d.read(i + 1, kind) for i in range(count)]
    container = CONTAINERS[WIDTHS[kind]]

    def run(m: Any, mask: np.ndarray) -> None:
        result = compute(*(half_parts(read(m), kind) for read in reads))
        if sat:
            result = n.saturate(result)
        if relu:
            result = n.maximum(result, result.dtype.type(0), nan=True)
        bits = np.ascontiguousarray(n.to_half(result, kind))
        write(m, mask, bits.view(container).reshape(-1))

    return run


_HALF_ARITHMETIC: dict[str, tuple[int, Any]] = {
    "add": (2, lambda a, b: n.sum_odd(a.astype(np.float64), b.astype(np.float64))),
    "sub": (2, lambda a, b: n.sum_odd(a.astype(np.float64), -b.astype(np.float64))),
    "mul": (2, lambda a, b: a.astype(np.float64) * b.astype(np.float64)),
    "fma": (3, n.fma_odd),
}


@op(*_HALF_ARITHMETIC, group="half")
def _half_arithmetic(d: Decoder) -> Run:
    kind = d.take_type()
    if kind.startswith("f16") and d.flag("ftz"):
        raise d.error(".ftz of f16 is not executed")
    d.one_of("rn", default="rn")
    count, compute = _HALF_ARITHMETIC[d.instr.base]
    return half(d, kind, compute, count)


@op("min", "max", group="half")
def _half_min_max(d: Decoder) -> Run:
    kind = d.take_type()
    choose = n.minimum if d.instr.base == "min" else n.maximum
    nan = d.flag("NaN")
    return half(d, kind, lambda a, b: choose(a, b, nan), 2)


@op("abs", "neg", group="half")
def _half_sign(d: Decoder) -> Run:
    kind = d.take_type()
    d.done(2)
    dtype: Any = dtype_of(kind)
    sign = dtype(0x8000 if WIDTHS[kind] == 16 else 0x80008000)
    write, a = d.write(0, kind), d.read(1, kind)
    if d.instr.base == "abs":
        return lambda m, mask: write(m, mask, a(m) & ~sign)
    return lambda m, mask: write(m, mask, a(m) ^ sign)
