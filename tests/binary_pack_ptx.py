# SPDX-License-Identifier: Apache-2.0
"""Packing by the CUDA kernels: their launches by the C++ plan, and what the definition makes of the
same numbers.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ptxsim
from fastbb import _C
from fastbb.reference.binary_linear import pack
from fastbb.reference.binary_pack import bit_row_bytes, pack_bool, pack_sign, unpack_bits

SOURCE = Path(__file__).resolve().parent.parent / "csrc/ops/binary_pack/binary_pack_cuda.cu"
KINDS = {"plus": 0, "minus": 1, "ternary": 2, "unsigned": 3}
VALUES = {"signed": 0, "ternary": 2, "unsigned": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ELEMENTS = {torch.float32: "If", torch.bfloat16: "__nv_bfloat16", torch.float16: "6__half"}

_POINTER, _LONG, _INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32


class PackParams(ctypes.Structure):
    """`BinaryPackParams`."""

    _fields_ = [
        ("dtype", _INT),
        ("kind", _INT),
        ("x", _POINTER),
        ("x_row", _LONG),
        ("shift", _POINTER),
        ("center", _POINTER),
        ("center_row", _LONG),
        ("alpha", _POINTER),
        ("bits", _POINTER),
        ("rows", _LONG),
        ("k", _LONG),
    ]


class StatsParams(ctypes.Structure):
    """`BinaryStatsParams`."""

    _fields_ = [
        ("dtype", _INT),
        ("x", _POINTER),
        ("x_row", _LONG),
        ("sums", _POINTER),
        ("rows", _LONG),
        ("k", _LONG),
    ]


class MeansParams(ctypes.Structure):
    """`BinaryMeansParams`."""

    _fields_ = [
        ("sums", _POINTER),
        ("rows", _LONG),
        ("k", _LONG),
        ("center", _POINTER),
        ("center_rows", ctypes.c_bool),
        ("scale", _POINTER),
        ("scale_rows", ctypes.c_bool),
    ]


class UnpackParams(ctypes.Structure):
    """`BinaryUnpackParams`."""

    _fields_ = [
        ("dtype", _INT),
        ("kind", _INT),
        ("bits", _POINTER),
        ("bits_row", _LONG),
        ("bit_rows", _LONG),
        ("index", _POINTER),
        ("scale", _POINTER),
        ("scale_row", _LONG),
        ("out", _POINTER),
        ("rows", _LONG),
        ("k", _LONG),
    ]


def raw(x: Tensor) -> np.ndarray:
    """The elements as numpy has them: 16-bit floats as integers."""
    return (x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()


def numbers(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers with zeros, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 0.5, -0.5, 1e-30])
    where = torch.rand(rows, k, generator=generator) < 0.2
    draws = torch.randint(len(special), (rows, k), generator=generator)
    return torch.where(where, special[draws], x).to(dtype)


class Memory:
    """Global memory of some launches, of which `run` makes one, here by ptxsim.

    Attributes:
        results: of all launches.
    """

    def __init__(self, module: ptxsim.Module | None = None, **options: Any) -> None:
        self.arena = ptxsim.Arena()
        self.module = module
        self.options = options
        self.results: list[ptxsim.Result] = []

    def add(self, x: Tensor | None, mode: str = "in") -> int:
        return 0 if x is None else self.arena.add(raw(x.contiguous()), mode)

    def read(self, address: int, like: Tensor) -> Tensor:
        assert self.arena.written(address).all(), "not all written"
        return torch.from_numpy(np.array(self.arena.get(address))).view(like.dtype).view(like.shape)

    def run(self, names: tuple[str, ...], launch: dict[str, int], params: ctypes.Structure,
            *plan: bytes) -> None:  # fmt: skip
        """Launches the kernel whose mangled name contains all of `names`."""
        assert self.module is not None
        (kernel,) = (each for each in self.module.kernels if all(part in each for part in names))
        sizes = {"grid": launch["grid"], "block": launch["block"]}
        arguments: dict[str, Any] = {"args": [params, *plan], "arena": self.arena, **self.options}
        self.results.append(self.module.launch(kernel, **sizes, **arguments))


def packed(
    memory: Memory,
    x: Tensor,
    kind: str,
    shift: Tensor | None = None,
    alpha: Tensor | None = None,
    center: int = 0,
    center_row: int = 0,
) -> Tensor:
    """Bits of x, whose rows may be apart; `center` is an address."""
    rows, k = x.shape
    planes = (2,) if kind == "ternary" else ()
    bits = torch.empty(rows, *planes, bit_row_bytes(k), dtype=torch.uint8)
    width = x.stride(0)
    whole = x.as_strided((max(rows - 1, 0) * width + k,), (1,))
    p = PackParams(DTYPES[x.dtype], KINDS[kind], memory.add(whole), width, memory.add(shift))
    p.center, p.center_row, p.alpha = center, center_row, memory.add(alpha)
    p.bits, p.rows, p.k = memory.add(bits, "out"), rows, k
    plan = _C.binary_pack_cuda_plan(rows, k)
    memory.run(("11binary_pack", ELEMENTS[x.dtype]), plan["launch"], p, plan["bytes"])
    return memory.read(p.bits, bits)


def packed_weight(
    memory: Memory, weight: Tensor, center: str, scale: str, kind: str
) -> tuple[Tensor, Tensor]:
    """Bits and scales of a weight, by sums, means and packing."""
    rows, k = weight.shape
    plan = _C.binary_pack_cuda_plan(rows, k)
    sums = memory.add(torch.empty(rows, 2, dtype=torch.float64), "out")
    stats = StatsParams(DTYPES[weight.dtype], memory.add(weight), k, sums, rows, k)
    names = ("binary_stats", ELEMENTS[weight.dtype])
    memory.run(names, plan["stats"], stats, plan["stats_bytes"])
    scales = torch.empty(rows if scale == "row" else 1)
    centers = torch.empty(rows if center == "row" else 1)
    means = MeansParams(sums, rows, k)
    means.center = 0 if center == "none" else memory.add(centers, "out")
    means.center_rows, means.scale_rows = center == "row", scale == "row"
    means.scale = memory.add(scales, "out")
    memory.run(("binary_means",), plan["means"], means)
    bits = packed(memory, weight, kind, center=means.center, center_row=center == "row")
    return bits, memory.read(means.scale, scales)


def unpacked(
    memory: Memory,
    bits: Tensor,
    k: int,
    kind: str,
    dtype: torch.dtype,
    index: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Values [rows, k] of bits [V, bytes] or [V, 2, bytes]."""
    rows = bits.shape[0] if index is None else len(index)
    out = torch.empty(rows, k, dtype=dtype)
    p = UnpackParams(DTYPES[dtype], VALUES[kind], memory.add(bits), bits.stride(0), bits.shape[0])
    p.index, p.scale = memory.add(index), memory.add(scale)
    p.scale_row = scale is not None and len(scale) > 1
    p.out, p.rows, p.k = memory.add(out, "out"), rows, k
    plan = _C.binary_pack_cuda_plan(rows, k)
    memory.run(("binary_unpack", ELEMENTS[dtype]), plan["launch"], p, plan["bytes"])
    return memory.read(p.out, out)


def check_packed(
    memory: Memory, rows: int, k: int, kind: str, dtype: torch.dtype, shift: bool, gap: int
) -> None:
    x = numbers(rows, k + gap, dtype)[:, :k]
    offsets = torch.randn(k) if shift else None
    alpha = torch.tensor([0.8]) if kind == "unsigned" else None
    assert torch.equal(packed(memory, x, kind, offsets, alpha), pack(x, kind, alpha, offsets))


def check_weight(
    memory: Memory, rows: int, k: int, center: str, scale: str, kind: str, dtype: torch.dtype
) -> None:
    """Means are of float64, and rounded once: another order gives the same, but for chance."""
    weight = (torch.randn(rows, k) + 0.3).to(dtype)
    bits, scales = packed_weight(memory, weight, center, scale, kind)
    wide = weight.double()
    dims = {"row": {"dim": 1, "keepdim": True}, "tensor": {}, "none": None}
    middle = 0.0 if dims[center] is None else wide.mean(**dims[center]).float()
    torch.testing.assert_close(scales.double(), wide.abs().mean(**dims[scale]).flatten(),
                               rtol=1e-7, atol=0)  # fmt: skip
    assert torch.equal(bits, pack_sign(weight.float() - middle, None, kind))


def check_unpacked(
    memory: Memory, rows: int, k: int, kind: str, dtype: torch.dtype, scales: int, index: bool
) -> None:
    planes = (2,) if kind == "ternary" else ()
    bits = pack_bool(torch.rand(rows, *planes, k) < 0.5)
    scale = torch.randn(rows if scales > 1 else 1) if scales else None
    ids = torch.tensor([0, rows - 1, rows, -1, 1 << 40, rows // 2]) if index else None
    out = unpacked(memory, bits, k, kind, dtype, ids, scale)
    values = unpack_bits(bits, k, kind)
    values = values if scale is None else values * scale[:, None]
    if ids is not None:
        valid = (ids >= 0) & (ids < rows)
        values = values[torch.where(valid, ids, 0)].masked_fill(~valid[:, None], torch.nan)
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out.nan_to_num(7.0), values.to(dtype).nan_to_num(7.0))


def launch_of(kernel: str) -> dict[str, int]:
    """The plan's launch of a kernel."""
    plan = _C.binary_pack_cuda_plan(8, 1000)
    parts = {"binary_stats": "stats", "binary_means": "means"}
    return plan[next((part for name, part in parts.items() if kernel.startswith(name)), "launch")]
