# SPDX-License-Identifier: Apache-2.0
"""Floating-point arithmetic as PTX defines it, on numpy arrays: rounding modes, exact fused
multiply-add, half precision, conversion to integers.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

TINY = np.float32(2.0**-126)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 become zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def saturate(x: np.ndarray) -> np.ndarray:
    """To [0, 1], NaN to 0 (.sat)."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def _step(x: np.ndarray, up: Any) -> np.ndarray:
    """The neighbour of x towards +inf where `up`, towards -inf elsewhere."""
    return np.nextafter(x, np.where(up, np.inf, -np.inf).astype(x.dtype))


def sum_odd(p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """p + c of float64, rounded to odd: rounding that once more to a shorter type is exact."""
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    inexact = np.isfinite(s) & np.isfinite(error) & (error != 0) & (s.view(np.int64) & 1 == 0)
    return np.where(inexact, _step(s, error > 0), s) if inexact.any() else s


def fma_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of short floats as float64, rounded to odd."""
    return sum_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float64 with one rounding, lane by lane in rational numbers."""
    a, b, c = np.broadcast_arrays(a, b, c)
    plain = a * b + c
    result = plain.copy()
    for i in np.nonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))[0]:
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:
            try:
                result[i] = float(exact)
            except OverflowError:
                result[i] = np.inf if exact > 0 else -np.inf
    return result


def to_f32(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float64 to float32 in a rounding mode: rn, rz, rm (down), rp (up)."""
    near = x.astype(np.float32)
    if mode == "rn":
        return near
    back = near.astype(np.float64)
    toward_zero = np.abs(back) > np.abs(x)
    wrong = {
        "rz": toward_zero,
        "rm": back > x,
        "rp": back < x,
    }[mode]
    up = {"rz": x < 0, "rm": False, "rp": True}[mode]
    return np.where(wrong & np.isfinite(x), _step(near, up), near)


def f16_to_f32(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f64_to_f16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Bits of float16."""
    near = x.astype(np.float16)
    if mode == "rz":
        back = near.astype(np.float64)
        near = np.where(np.abs(back) > np.abs(x), _step(near, x < 0), near)
    return np.where(np.isnan(x), np.uint16(0x7FFF), near.view(np.uint16))


def f64_to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Bits of bfloat16; through float32 rounded to odd, so there is one rounding."""
    short = to_f32(x, "rz")
    bits = short.view(np.uint32).copy()
    inexact = np.isfinite(x) & (short.astype(np.float64) != x)
    bits |= inexact.astype(np.uint32)
    if mode == "rn":
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    result = (bits >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), result)


def from_half(bits: np.ndarray, kind: str) -> np.ndarray:
    """f16 or bf16 bits to float32."""
    return f16_to_f32(bits) if kind.startswith("f16") else bf16_to_f32(bits)


def to_half(x: np.ndarray, kind: str, mode: str = "rn") -> np.ndarray:
    """float32 or float64 to f16 or bf16 bits."""
    wide = x.astype(np.float64)
    return f64_to_f16(wide, mode) if kind.startswith("f16") else f64_to_bf16(wide, mode)


def minimum(a: np.ndarray, b: np.ndarray, nan: bool = False) -> np.ndarray:
    """The smaller; a NaN loses, or wins if `nan`; -0 is smaller than +0."""
    result = np.minimum(a, b) if nan else np.fmin(a, b)
    return np.where((a == b) & np.signbit(a), a, result)


def maximum(a: np.ndarray, b: np.ndarray, nan: bool = False) -> np.ndarray:
    """The larger; a NaN loses, or wins if `nan`; +0 is larger than -0."""
    result = np.maximum(a, b) if nan else np.fmax(a, b)
    return np.where((a == b) & np.signbit(b), a, result)


ROUNDERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: np.ndarray, dtype: Any, mode: str) -> np.ndarray:
    """A float to an integer type: rounded, clamped to its range, NaN as PTX says."""
    info = np.iinfo(dtype)
    whole = ROUNDERS[mode](x.astype(np.float64))
    with np.errstate(all="ignore"):
        inside = np.clip(np.nan_to_num(whole), float(info.min), float(info.max))
        # float(max) of a 64-bit type is one too many, so the top is set by hand.
        result = np.where(inside >= float(info.max), 0, inside).astype(dtype)
    result = np.where(inside >= float(info.max), dtype(info.max), result)
    wide_nan = info.bits == 64 or x.dtype == np.float64
    nan_value = dtype(0)
    if wide_nan and info.bits == 64:
        nan_value = np.array([1 << 63], np.uint64).view(dtype)[0]
    return np.where(np.isnan(x), nan_value, result).astype(dtype)
