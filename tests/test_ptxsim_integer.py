# SPDX-License-Identifier: Apache-2.0
"""Integer instructions of ptxsim against Python's unbounded integers, one lane at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ptx_lanes import integers, one

TYPES = {
    f"{kind}{bits}": np.dtype(f"{'int' if kind == 's' else 'uint'}{bits}")
    for kind in "us"
    for bits in (16, 32, 64)
}


def wrapped(values: list[int], dtype: np.dtype) -> np.ndarray:
    """Python integers modulo the width of a type."""
    bits = 8 * dtype.itemsize
    raw = [value & ((1 << bits) - 1) for value in values]
    return np.array(raw, f"u{dtype.itemsize}").view(dtype)


def truncated(a: int, b: int) -> int:
    """Division towards zero."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str, kind: str) -> None:
    a, b = integers(TYPES[kind], seed=1), integers(TYPES[kind], seed=2)[::-1].copy()
    got = one(f"{name}.{kind} d, a, b", TYPES[kind], a=a, b=b)
    expected = [BINARY[name](int(x), int(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(got, wrapped(expected, TYPES[kind]))


@pytest.mark.parametrize("kind", TYPES)
def test_mul_hi(kind: str) -> None:
    a, b = integers(TYPES[kind], seed=1), integers(TYPES[kind], seed=2)[::-1].copy()
    got = one(f"mul.hi.{kind} d, a, b", TYPES[kind], a=a, b=b)
    bits = 8 * TYPES[kind].itemsize
    expected = [int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(got, wrapped(expected, TYPES[kind]))


@pytest.mark.parametrize("kind", TYPES)
def test_div_rem_towards_zero(kind: str) -> None:
    a, b = integers(TYPES[kind], seed=1), integers(TYPES[kind], seed=2)[::-1].copy()
    b = np.where(b == 0, TYPES[kind].type(3), b)
    b = np.where((b == -1) & (TYPES[kind].kind == "i"), TYPES[kind].type(5), b)
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    quotient = one(f"div.{kind} d, a, b", TYPES[kind], a=a, b=b)
    np.testing.assert_array_equal(quotient, [truncated(x, y) for x, y in pairs])
    rest = one(f"rem.{kind} d, a, b", TYPES[kind], a=a, b=b)
    np.testing.assert_array_equal(rest, [x - y * truncated(x, y) for x, y in pairs])


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind: str) -> None:
    dtype = TYPES[kind]
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    a, b = integers(dtype, seed=1), integers(dtype, seed=2)[::-1].copy()
    c = integers(wide, seed=3)
    got = one(f"mul.wide.{kind} d, a, b", wide, a=a, b=b)
    np.testing.assert_array_equal(got, a.astype(wide) * b.astype(wide))
    got = one(f"mad.wide.{kind} d, a, b, c", wide, a=a, b=b, c=c)
    products = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(got, wrapped(products, wide))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("part", ["lo", "hi"])
def test_mad(kind: str, part: str) -> None:
    dtype = TYPES[kind]
    a, b, c = (integers(dtype, seed=i) for i in (1, 2, 3))
    got = one(f"mad.{part}.{kind} d, a, b, c", dtype, a=a, b=b, c=c)
    shift = 8 * dtype.itemsize if part == "hi" else 0
    values = [(int(x) * int(y) >> shift) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(got, wrapped(values, dtype))


def test_add_saturates() -> None:
    a, b = integers(np.int32, seed=1), integers(np.int32, seed=2)[::-1].copy()
    got = one("add.sat.s32 d, a, b", np.int32, a=a, b=b)
    expected = np.clip(a.astype(np.int64) + b, -(1 << 31), (1 << 31) - 1)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ["shl.b", "shr.u", "shr.s"])
def test_shifts_clamp(name: str, bits: int) -> None:
    dtype = np.dtype(f"{'int' if name == 'shr.s' else 'uint'}{bits}")
    a = integers(dtype)
    amount = np.random.default_rng(0).integers(0, bits + 9, len(a)).astype(np.uint32)
    got = one(f"{name}{bits} d, a, n", dtype, a=a, n=amount)
    pairs = zip(a, amount, strict=True)
    expected = [int(x) << int(n) if "shl" in name else int(x) >> int(n) for x, n in pairs]
    np.testing.assert_array_equal(got, wrapped(expected, dtype))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("side", ["l", "r"])
def test_funnel_shift(side: str, mode: str) -> None:
    a, b = integers(np.uint32, seed=1), integers(np.uint32, seed=2)
    c = np.random.default_rng(0).integers(0, 70, len(a)).astype(np.uint32)
    got = one(f"shf.{side}.{mode}.b32 d, a, b, c", np.uint32, a=a, b=b, c=c)
    expected = []
    for x, y, n in zip(a, b, c, strict=True):
        shift = int(n) & 31 if mode == "wrap" else min(int(n), 32)
        pair = int(y) << 32 | int(x)
        expected.append(pair << shift >> 32 if side == "l" else pair >> shift)
    np.testing.assert_array_equal(got, wrapped(expected, np.dtype(np.uint32)))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind: str) -> None:
    dtype = TYPES[kind]
    bits = 8 * dtype.itemsize
    a = integers(dtype)
    random = np.random.default_rng(0)
    at, size = (random.integers(0, bits + 8, len(a)).astype(np.uint32) for _ in range(2))
    got = one(f"bfe.{kind} d, a, at_, size", dtype, a=a, at_=at, size=size)
    expected = []
    for x, p, n in zip(a, at, size, strict=True):
        raw = int(x) & ((1 << bits) - 1)
        bit = [raw >> i & 1 for i in range(bits)]
        sign = bit[min(int(p) + int(n) - 1, bits - 1)] if n and kind[0] == "s" else 0
        field = [bit[p + i] if i < n and p + i < bits else sign for i in range(bits)]
        expected.append(sum(b << i for i, b in enumerate(field)))
    np.testing.assert_array_equal(got, wrapped(expected, dtype))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    dtype = np.dtype(f"uint{bits}")
    a, b = integers(dtype, seed=1), integers(dtype, seed=2)
    random = np.random.default_rng(0)
    at, size = (random.integers(0, bits + 8, len(a)).astype(np.uint32) for _ in range(2))
    got = one(f"bfi.b{bits} d, a, b, at_, size", dtype, a=a, b=b, at_=at, size=size)
    expected = []
    for x, y, p, n in zip(a, b, at, size, strict=True):
        field = ((1 << int(n)) - 1) << int(p) & ((1 << bits) - 1)
        expected.append((int(y) & ~field) | ((int(x) << int(p)) & field))
    np.testing.assert_array_equal(got, wrapped(expected, dtype))


def test_lop3_all_tables() -> None:
    a, b, c = (integers(np.uint32, 32, seed=i) for i in (1, 2, 3))
    for table in range(0, 256, 5):
        got = one(f"lop3.b32 d, a, b, c, {table:#x}", np.uint32, a=a, b=b, c=c)
        index = [[4 * (int(x) >> i & 1) for i in range(32)] for x in a]
        expected = [
            sum(
                (table >> (index[j][i] + 2 * (int(b[j]) >> i & 1) + (int(c[j]) >> i & 1)) & 1) << i
                for i in range(32)
            )
            for j in range(32)
        ]
        np.testing.assert_array_equal(got, np.array(expected, np.uint32), err_msg=hex(table))


def test_permute_bytes() -> None:
    a, b, c = (integers(np.uint32, seed=i) for i in (1, 2, 3))
    c = np.random.default_rng(4).integers(0, 1 << 16, len(a)).astype(np.uint32)
    got = one("prmt.b32 d, a, b, c", np.uint32, a=a, b=b, c=c)
    expected = []
    for x, y, s in zip(a, b, c, strict=True):
        source = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        chosen = [int(s) >> 4 * i & 15 for i in range(4)]
        parts = [(255 if source[n & 7] & 128 else 0) if n & 8 else source[n & 7] for n in chosen]
        expected.append(int.from_bytes(bytes(parts), "little"))
    np.testing.assert_array_equal(got, np.array(expected, np.uint32))


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(bits: int) -> None:
    dtype = np.dtype(f"uint{bits}")
    a = integers(dtype)
    values = [int(x) for x in a]
    cases = {
        "popc": [bin(x).count("1") for x in values],
        "clz": [bits - x.bit_length() for x in values],
    }
    for name, expected in cases.items():
        got = one(f"{name}.b{bits} d, a", np.uint32, a=a)
        np.testing.assert_array_equal(got, expected, err_msg=name)
    got = one(f"brev.b{bits} d, a", dtype, a=a)
    np.testing.assert_array_equal(got, [int(f"{x:0{bits}b}"[::-1], 2) for x in values])
    got = one(f"bfind.u{bits} d, a", np.uint32, a=a)
    np.testing.assert_array_equal(got, [(x.bit_length() - 1) & 0xFFFFFFFF for x in values])


def test_bfind_of_negative_numbers() -> None:
    a = np.array([0, -1, -2, -129, 128, 1, -(1 << 31), 5] * 4, np.int32)
    got = one("bfind.s32 d, a", np.uint32, a=a)
    values = [int(x) if x >= 0 else ~int(x) for x in a]
    np.testing.assert_array_equal(got, [(x.bit_length() - 1) & 0xFFFFFFFF for x in values])


def test_logic_and_unary() -> None:
    a, b, c = (integers(np.int32, seed=i) for i in (1, 2, 3))
    cases = {
        "and.b32 d, a, b": a & b,
        "or.b32 d, a, b": a | b,
        "xor.b32 d, a, b": a ^ b,
        "not.b32 d, a": ~a,
        "cnot.b32 d, a": (a == 0).astype(np.int32),
        "abs.s32 d, a": np.abs(a),
        "neg.s32 d, a": -a,
        "sad.s32 d, a, b, c": np.where(a > b, a - b, b - a) + c,
        "max.s32 d, a, -7": np.maximum(a, -7),
        "sub.s32 d, a, 0x10": a - 16,
    }
    for instruction, expected in cases.items():
        got = one(instruction, np.int32, a=a, b=b, c=c)
        np.testing.assert_array_equal(got, expected, err_msg=instruction)


@pytest.mark.parametrize("types", ["s32.s32", "u32.u32", "s32.u32", "u32.s32"])
def test_dp4a(types: str) -> None:
    a, b, c = (integers(np.uint32, seed=i) for i in (1, 2, 3))
    got = one(f"dp4a.{types} d, a, b, c", np.uint32, a=a, b=b, c=c)
    kinds = [np.int8 if name[0] == "s" else np.uint8 for name in types.split(".")]
    x, y = (v.view(k).reshape(-1, 4).astype(np.int64) for v, k in zip((a, b), kinds, strict=True))
    np.testing.assert_array_equal(got, ((x * y).sum(axis=1) + c).astype(np.uint32))
