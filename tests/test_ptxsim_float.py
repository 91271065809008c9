# SPDX-License-Identifier: Apache-2.0
"""Floating-point instructions of ptxsim against exact rational arithmetic and numpy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from ptx_lanes import floats, integers, lanes, one, ptxsim

FORMATS = {"f32": (24, -126, 127), "f16": (11, -14, 15), "bf16": (8, -126, 127)}
DTYPES = {"f32": np.float32, "f16": np.uint16, "bf16": np.uint16}


def rounded(value: Fraction, name: str, mode: str) -> float:
    """An exact value rounded to a binary format with subnormals: rn, rz, rm or rp."""
    bits, low, high = FORMATS[name]
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = max(_floor_log2(size), low)
    unit = Fraction(2) ** (exponent - bits + 1)
    whole = size // unit
    rest = size / unit - whole
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
        "rz": False,
        "rm": value < 0 and rest > 0,
        "rp": value > 0 and rest > 0,
    }[mode]
    result = (whole + up) * unit
    largest = (2 - Fraction(2) ** (1 - bits)) * Fraction(2) ** high
    if result > largest:
        away = {"rn": True, "rz": False, "rm": value < 0, "rp": value > 0}[mode]
        return (
            float("inf") * (1 if value > 0 else -1)
            if away
            else float(np.sign(float(value))) * (float(largest))
        )
    return float(result if value > 0 else -result)


def _floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def to_value(bits: np.ndarray, name: str) -> np.ndarray:
    """16-bit patterns, or float32, as float64."""
    if name == "f16":
        return bits.view(np.float16).astype(np.float64)
    if name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def operands(name: str, seed: int, count: int = 256) -> np.ndarray:
    """Finite values: random, near-cancelling and huge ones."""
    if name == "f32":
        x = floats(count=count, seed=seed)
        return np.where(np.isfinite(x), x, np.float32(1.5))
    raw = np.random.default_rng(seed).integers(0, 1 << 16, count).astype(np.uint16)
    return np.where(np.isfinite(to_value(raw, name)), raw, np.uint16(0x3C01))


def check(instruction: str, name: str, mode: str, exact, *values: np.ndarray) -> None:
    got = to_value(one(instruction, DTYPES[name], **dict(zip("abc", values, strict=False))), name)
    for i, row in enumerate(zip(*(to_value(v, name) for v in values), strict=True)):
        expected = rounded(exact(*map(Fraction, map(float, row))), name, mode)
        assert got[i] == expected, (instruction, row, got[i], expected)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_f32_rounding_modes(mode: str) -> None:
    a, b, c = (operands("f32", seed) for seed in (1, 2, 3))
    c[: len(c) // 2] = -(a * b)[: len(c) // 2]
    check(f"add.{mode}.f32 d, a, b", "f32", mode, lambda x, y: x + y, a, b)
    check(f"sub.{mode}.f32 d, a, b", "f32", mode, lambda x, y: x - y, a, b)
    check(f"mul.{mode}.f32 d, a, b", "f32", mode, lambda x, y: x * y, a, b)
    check(f"fma.{mode}.f32 d, a, b, c", "f32", mode, lambda x, y, z: x * y + z, a, b, c)
    divisor = np.where(b == 0, np.float32(3), b)
    check(f"div.{mode}.f32 d, a, b", "f32", mode, lambda x, y: x / y, a, divisor)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_half_rounds_once(name: str) -> None:
    a, b, c = (operands(name, seed, 512) for seed in (1, 2, 3))
    check(f"add.rn.{name} d, a, b", name, "rn", lambda x, y: x + y, a, b)
    check(f"sub.rn.{name} d, a, b", name, "rn", lambda x, y: x - y, a, b)
    check(f"mul.rn.{name} d, a, b", name, "rn", lambda x, y: x * y, a, b)
    check(f"fma.rn.{name} d, a, b, c", name, "rn", lambda x, y, z: x * y + z, a, b, c)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_packed_halves_equal_single_ones(name: str) -> None:
    parts = {key: operands(name, seed, 128) for seed, key in enumerate("abc")}
    pairs = {key: value.view(np.uint32) for key, value in parts.items()}
    for form in ("add.{} d, a, b", "mul.{} d, a, b", "fma.rn.{} d, a, b, c", "max.{} d, a, b"):
        packed = one(form.format(f"{name}x2"), np.uint32, **pairs)
        single = one(form.format(name), np.uint16, **parts)
        np.testing.assert_array_equal(packed.view(np.uint16), single, err_msg=form)
    relu = one(f"fma.rn.relu.{name}x2 d, a, b, c", np.uint32, **pairs).view(np.uint16)
    plain = one(f"fma.rn.{name} d, a, b, c", np.uint16, **parts)
    np.testing.assert_array_equal(relu, np.where(plain & 0x8000, 0, plain))
    negated = one(f"neg.{name}x2 d, a", np.uint32, **pairs).view(np.uint16)
    np.testing.assert_array_equal(negated, parts["a"] ^ 0x8000)


def test_f64() -> None:
    a, b, c = (operands("f32", seed).astype(np.float64) / 3 for seed in (1, 2, 3))
    np.testing.assert_array_equal(one("add.f64 d, a, b", np.float64, a=a, b=b), a + b)
    got = one("fma.rn.f64 d, a, b, c", np.float64, a=a, b=b, c=c)
    exact = [
        float(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(got, exact)


def test_ftz_and_sat() -> None:
    tiny = np.float32(1e-40)
    a = np.array([tiny, -tiny, 1e-30, 2.0, -3.0, np.nan, 0.25, np.inf] * 4, np.float32)
    b = np.array([1.0, 1.0, 1e-15, 1.0, 1.0, 1.0, 1.0, 1.0] * 4, np.float32)
    with np.errstate(all="ignore"):
        product = a * b
    got = one("mul.ftz.f32 d, a, b", np.float32, a=a, b=b)
    np.testing.assert_array_equal(got, np.where(np.abs(product) < 2.0**-126, 0, product))
    np.testing.assert_array_equal(np.signbit(got[:2]), [False, True])
    kept = one("mul.f32 d, a, b", np.float32, a=a, b=b)
    np.testing.assert_array_equal(kept, product)
    got = one("mul.sat.f32 d, a, b", np.float32, a=a, b=b)
    np.testing.assert_array_equal(got, np.clip(np.nan_to_num(product, nan=0.0), 0, 1))


def test_min_max_nan_and_zeros() -> None:
    nan = np.nan
    a = np.array([1, nan, 2, nan, 0.0, -0.0, -1, 5] * 4, np.float32)
    b = np.array([2, 1, nan, nan, -0.0, 0.0, -2, 5] * 4, np.float32)
    low, high = (
        one("min.f32 d, a, b", np.float32, a=a, b=b),
        one("max.f32 d, a, b", np.float32, a=a, b=b),
    )
    np.testing.assert_array_equal(low, np.array([1, 1, 2, nan, 0, 0, -2, 5] * 4))
    np.testing.assert_array_equal(high, np.array([2, 1, 2, nan, 0, 0, -1, 5] * 4))
    assert np.signbit(low[4:6]).all() and not np.signbit(high[4:6]).any()
    got = one("max.NaN.f32 d, a, b", np.float32, a=a, b=b)
    np.testing.assert_array_equal(np.isnan(got[:4]), [False, True, True, True])


FUNCTIONS = {
    "ex2.approx.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "rcp.approx.ftz.f32": lambda x: 1 / x,
    "rcp.rn.f32": lambda x: 1 / x,
    "sqrt.rn.f32": np.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "sin.approx.f32": np.sin,
    "cos.approx.f32": np.cos,
    "tanh.approx.f32": np.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    a = np.random.default_rng(0).uniform(0.01, 20, 256).astype(np.float32)
    got = one(f"{name} d, a", np.float32, a=a)
    np.testing.assert_allclose(got, FUNCTIONS[name](a.astype(np.float64)), rtol=1e-7)


def test_functions_at_special_values() -> None:
    a = np.array([-np.inf, np.inf, 0, -0.0, np.nan, -200, 200, 1] * 4, np.float32)
    got = one("ex2.approx.ftz.f32 d, a", np.float32, a=a)
    np.testing.assert_array_equal(got[:8], [0, np.inf, 1, 1, np.nan, 0, np.inf, 2])
    got = one("rcp.approx.f32 d, a", np.float32, a=a)
    np.testing.assert_array_equal(got[:4], [0, 0, np.inf, -np.inf])


def test_float_to_integer_clamps() -> None:
    a = np.array([1.5, -1.5, 2.5, -0.5, 3e9, -3e9, np.nan, np.inf], np.float32)
    cases = {
        ("rni", "s32", np.int32): [2, -2, 2, 0, 2**31 - 1, -(2**31), 0, 2**31 - 1],
        ("rzi", "s32", np.int32): [1, -1, 2, 0, 2**31 - 1, -(2**31), 0, 2**31 - 1],
        ("rmi", "s32", np.int32): [1, -2, 2, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1],
        ("rpi", "s32", np.int32): [2, -1, 3, 0, 2**31 - 1, -(2**31), 0, 2**31 - 1],
        ("rni", "u32", np.uint32): [2, 0, 2, 0, 3000000000, 0, 0, 2**32 - 1],
        ("rni", "u16", np.uint16): [2, 0, 2, 0, 65535, 0, 0, 65535],
        ("rzi", "s64", np.int64): [1, -1, 2, 0, 3 * 10**9, -3 * 10**9, -(2**63), 2**63 - 1],
    }
    for (mode, kind, dtype), expected in cases.items():
        got = one(f"cvt.{mode}.{kind}.f32 d, a", dtype, a=np.tile(a, 4))
        np.testing.assert_array_equal(got[:8], np.array(expected, dtype), err_msg=f"{mode} {kind}")


def test_integer_conversions() -> None:
    a = integers(np.int32)
    cases = {
        ("cvt.s64.s32", np.int64): a.astype(np.int64),
        ("cvt.u64.u32", np.uint64): a.view(np.uint32).astype(np.uint64),
        ("cvt.u16.u32", np.uint16): a.astype(np.uint16),
        ("cvt.s32.s8", np.int32): a.astype(np.int8).astype(np.int32),
        ("cvt.sat.s8.s32", np.int16): np.clip(a, -128, 127),
        ("cvt.sat.u8.s32", np.uint16): np.clip(a, 0, 255),
        ("cvt.rn.f32.s32", np.float32): a.astype(np.float32),
        ("cvt.rn.f32.u32", np.float32): a.view(np.uint32).astype(np.float32),
        ("cvt.rn.f64.s32", np.float64): a.astype(np.float64),
        ("cvt.rn.f16.s32", np.float16): a.astype(np.float64).astype(np.float16),
    }
    for (instruction, dtype), expected in cases.items():
        with np.errstate(over="ignore"):
            got = one(f"{instruction} d, a", dtype, a=a)
        np.testing.assert_array_equal(got, expected.astype(dtype), err_msg=instruction)


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_half_conversions(name: str, mode: str) -> None:
    a, b = operands("f32", 1), operands("f32", 2)
    got = to_value(one(f"cvt.{mode}.{name}.f32 d, a", np.uint16, a=a), name)
    expected = [rounded(Fraction(float(x)), name, mode) for x in a]
    np.testing.assert_array_equal(got, expected)
    pair = one(f"cvt.{mode}.{name}x2.f32 d, a, b", np.uint32, a=a, b=b).view(np.uint16)
    high, low = to_value(pair[1::2], name), to_value(pair[::2], name)
    np.testing.assert_array_equal(high, expected)
    np.testing.assert_array_equal(low, [rounded(Fraction(float(x)), name, mode) for x in b])
    half = operands(name, 3)
    np.testing.assert_array_equal(
        one(f"cvt.f32.{name} d, a", np.float32, a=half), to_value(half, name)
    )


def test_packed_conversion_relu() -> None:
    a, b = operands("f32", 1), operands("f32", 2)
    got = one("cvt.rn.relu.bf16x2.f32 d, a, b", np.uint32, a=a, b=b)
    plain = one("cvt.rn.bf16x2.f32 d, a, b", np.uint32, a=np.maximum(a, 0), b=np.maximum(b, 0))
    np.testing.assert_array_equal(got, plain)


def test_tf32() -> None:
    a = floats()
    bits = one("cvt.rna.tf32.f32 d, a", np.uint32, a=a)
    assert not (bits[np.isfinite(a)] & 0x1FFF).any()
    finite = np.isfinite(a)
    error = np.abs(bits.view(np.float32)[finite].astype(np.float64) - a[finite])
    assert (error <= np.maximum(np.abs(a[finite]) * 2.0**-11, 2.0**-137)).all()


def test_comparisons_with_nan() -> None:
    a, b = floats(seed=1), floats(seed=2)
    b[::3] = a[::3]
    nan = np.isnan(a) | np.isnan(b)
    cases = {
        "lt": (a < b) & ~nan,
        "ltu": (a < b) | nan,
        "eq": (a == b) & ~nan,
        "equ": (a == b) | nan,
        "ne": (a != b) & ~nan,
        "neu": (a != b) | nan,
        "ge": (a >= b) & ~nan,
        "gtu": (a > b) | nan,
        "num": ~nan,
        "nan": nan,
    }
    for name, expected in cases.items():
        body = f".reg .pred p;\nsetp.{name}.f32 p, a, b;\nselp.b32 d, 1, 0, p;"
        got = lanes(body, {"a": a, "b": b}, {"d": np.int32})["d"]
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_setp_combinations_and_slct() -> None:
    a, b = integers(np.int32, seed=1), integers(np.int32, seed=2)
    body = """
    .reg .pred p, q, r;
    setp.gt.s32 r, a, 5;
    setp.lt.and.s32 p|q, a, b, !r;
    selp.b32 d, 1, 0, p;
    selp.b32 e, 1, 0, q;
    setp.hs.or.u32 p, a, b, r;
    selp.b32 f, 1, 0, p;
    slct.s32.s32 g, a, b, a;
    set.le.u32.s32 h, a, b;
    """
    names = {name: np.int32 for name in "defgh"}
    got = lanes(body, {"a": a, "b": b}, names)
    np.testing.assert_array_equal(got["d"], (a < b) & ~(a > 5))
    np.testing.assert_array_equal(got["e"], ~(a < b) & ~(a > 5))
    np.testing.assert_array_equal(got["f"], (a.view(np.uint32) >= b.view(np.uint32)) | (a > 5))
    np.testing.assert_array_equal(got["g"], np.where(a >= 0, a, b))
    np.testing.assert_array_equal(got["h"], -(a <= b).astype(np.int32))


def test_directed_rounding_of_f64_is_refused() -> None:
    with pytest.raises(ptxsim.Unsupported, match="directed"):
        one("add.rz.f64 d, a, a", np.float64, a=np.ones(32))
