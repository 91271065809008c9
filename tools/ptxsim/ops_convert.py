# SPDX-License-Identifier: Apache-2.0
"""Conversions: cvt between integers and floats of all widths, and address conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim import numerics as n
from ptxsim.arena import FIRST_WINDOW, WINDOW_BITS
from ptxsim.decode import CONTAINERS, FLOATS, HALVES, Decoder, Run, dtype_of, op
from ptxsim.ops_compare import half_parts
from ptxsim.program import WIDTHS, Reg

# Generic addresses of memory that is not global. Shared, local and parameter space each have a
# window of 4 GiB below those of the buffers.
WINDOWS = {"shared": 1, "local": 2, "param": 3}
_INT_ROUND = ("rni", "rzi", "rmi", "rpi")
_FLOAT_ROUND = ("rna", "rn", "rz", "rm", "rp")


def _source(d: Decoder, kind: str, ftz: bool) -> Callable[[Any], np.ndarray]:
    read = d.read(1, kind)
    if kind in HALVES:
        return lambda m: half_parts(read(m), kind)[:, 0]
    if kind == "f32" and ftz:
        return lambda m: n.flush(read(m))
    return read


def _int_to_int(target: str, sat: bool) -> Callable[[np.ndarray], np.ndarray]:
    dtype: Any = dtype_of(target)
    if not sat:
        return lambda a: a.astype(dtype)
    info = np.iinfo(dtype)

    def clamp(a: np.ndarray) -> np.ndarray:
        low = max(int(info.min), int(np.iinfo(a.dtype).min))
        high = min(int(info.max), int(np.iinfo(a.dtype).max))
        return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(dtype)

    return clamp


def _to_float(target: str, mode: str, round_whole: str) -> Callable[[np.ndarray], np.ndarray]:
    """From an integer or a float (float32 values for halves) to the bits of a float type."""

    def run(a: np.ndarray) -> np.ndarray:
        if round_whole:
            a = n.ROUNDERS[round_whole](a)
        if target == "f64":
            return a.astype(np.float64)
        if target == "f32":
            if a.dtype.kind in "iu" and a.dtype.itemsize == 8 and mode == "rn":
                return a.astype(np.float32)
            return n.to_f32(a.astype(np.float64), mode)
        wide = a.astype(np.float64)
        return n.to_half(wide, target, mode)

    return run


@op("cvt")
def _cvt(d: Decoder) -> Run:
    if "tf32" in d.mods:
        return _to_tf32(d)
    source = d.take_type()
    target = d.take_type()
    if target.endswith("x2"):
        return _pack_halves(d, source, target)
    if source.endswith("x2"):
        raise d.error("packed sources are not executed")
    whole = d.one_of(*_INT_ROUND, default="")
    mode = d.one_of(*_FLOAT_ROUND, default="")
    ftz, sat, relu = d.flag("ftz"), d.flag("sat"), d.flag("relu")
    d.done(2)
    read = _source(d, source, ftz)
    write = d.write(0, target)
    float_target = target in FLOATS or target in HALVES
    float_source = source in FLOATS or source in HALVES
    if mode == "rna" or (mode not in ("", "rn") and source in ("s64", "u64")):
        raise d.error(f".{mode} from .{source} is not executed")
    if not float_target and not float_source:
        convert = _int_to_int(target, sat)
        return lambda m, mask: write(m, mask, convert(read(m)))
    if not float_target:
        if not whole:
            raise d.error("needs a rounding to integers")
        dtype = dtype_of(target)
        return lambda m, mask: write(m, mask, n.to_integer(read(m), dtype, whole))
    back = _to_float(target, mode or "rn", whole)

    def run(m: Any, mask: np.ndarray) -> None:
        value = read(m)
        if sat:
            value = n.saturate(value.astype(np.float64))
        if relu:
            value = n.maximum(value, value.dtype.type(0), nan=True)
        result = back(value)
        write(m, mask, n.flush(result) if ftz and target == "f32" else result)

    return run


def _pack_halves(d: Decoder, source: str, target: str) -> Run:
    """Two f32 to one register; the first operand becomes the upper half."""
    mode = d.one_of("rn", "rz")
    relu = d.flag("relu")
    if source != "f32":
        raise d.error("packs f32")
    d.done(3)
    write, high, low = d.write(0, target), d.read(1, "f32"), d.read(2, "f32")

    def run(m: Any, mask: np.ndarray) -> None:
        parts = []
        for read in (low, high):
            value = read(m)
            if relu:
                value = n.maximum(value, np.float32(0), nan=True)
            parts.append(n.to_half(value, target, mode).astype(np.uint32))
        write(m, mask, parts[0] | parts[1] << np.uint32(16))

    return run


def round_tf32(bits: np.ndarray) -> np.ndarray:
    """float32 bits to the nearest tf32, ties away from zero (.rna); the low 13 bits become zero."""
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(special, bits, rounded)


def _to_tf32(d: Decoder) -> Run:
    d.one_of("tf32")
    d.one_of("rna")
    d.ignore("satfinite")
    if d.take_type() != "f32":
        raise d.error("converts f32")
    d.done(2)
    write, a = d.write(0, "b32"), d.read(1, "b32")
    return lambda m, mask: write(m, mask, round_tf32(a(m)))


@op("cvta")
def _cvta(d: Decoder) -> Run:
    to = d.flag("to")
    space = d.one_of("global", "shared::cta", "shared", "local", "const", "param::entry", "param")
    kind = d.take_type()
    d.done(2)
    write, a = d.write(0, kind), d.read(1, kind)
    window = WINDOWS.get(space.split("::")[0], 0) << WINDOW_BITS
    if window and WIDTHS[kind] != 64:
        raise d.error("needs 64-bit addresses")
    dtype = CONTAINERS[WIDTHS[kind]]
    shift = dtype(window)
    if to:
        return lambda m, mask: write(m, mask, a(m) - shift)
    return lambda m, mask: write(m, mask, a(m) + shift)


@op("isspacep")
def _isspacep(d: Decoder) -> Run:
    space = d.one_of("global", "shared::cta", "shared", "local", "const", "param")
    d.done(2)
    source = d.ops[1]
    if not isinstance(source, Reg) or source.width != 64:
        raise d.error("needs a 64-bit register")
    write, a = d.write(0, "pred"), d.read(1, "u64")
    number = WINDOWS.get(space.split("::")[0])

    def run(m: Any, mask: np.ndarray) -> None:
        window = a(m) >> np.uint64(WINDOW_BITS)
        write(m, mask, window >= FIRST_WINDOW if number is None else window == number)

    return run
