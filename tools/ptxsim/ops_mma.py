# SPDX-License-Identifier: Apache-2.0
"""Matrix multiply-accumulate of a warp, dense and 2:4 sparse.

Floating-point products are summed in float64 and rounded once. The hardware's order and rounding
of sums are not specified, so results are compared with tolerances. Integers and bits are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptxsim import numerics as n
from ptxsim.decode import Decoder, Run, op
from ptxsim.errors import PtxError
from ptxsim.fragments import WARP, a_fragment, b_fragment, c_fragment, gather_index
from ptxsim.program import Imm

_SHAPES = {
    "f16": (8, 16),
    "bf16": (8, 16),
    "tf32": (4, 8),
    "s8": (16, 32),
    "u8": (16, 32),
    "b1": (128, 256),
}
_SPARSE_SHAPES = {"f16": (16, 32), "bf16": (16, 32)}
_PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "b1": 32}


def _decode_bits(words: np.ndarray) -> np.ndarray:
    raw = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(raw, axis=-1, bitorder="little").astype(np.float64)


def _view(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda words: np.ascontiguousarray(words).view(dtype).astype(np.float64)


_ELEMENTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f16": _view(np.float16),
    "bf16": lambda w: n.bf16_to_f32(np.ascontiguousarray(w).view(np.uint16)).astype(np.float64),
    "tf32": lambda w: (w & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64),
    "s8": _view(np.int8),
    "u8": _view(np.uint8),
    "b1": _decode_bits,
}


@dataclass
class Shape:
    """An mma: sizes, types, and where elements stand in registers."""

    k: int
    a_type: str
    b_type: str
    d_type: str
    c_type: str
    sparse: bool

    def __post_init__(self) -> None:
        per = _PER_REGISTER[self.a_type]
        stored = self.k // 2 if self.sparse else self.k
        self.a_registers = 16 * stored // WARP // per
        self.b_registers = 8 * self.k // WARP // per
        self.a_index = gather_index(*a_fragment(self.a_registers, per), stored)
        self.b_index = gather_index(*b_fragment(self.b_registers, per), 8)
        per_c = 2 if self.c_type == "f16" else 1
        per_d = 2 if self.d_type == "f16" else 1
        self.c_registers, self.d_registers = 4 // per_c, 4 // per_d
        self.c_index = gather_index(*c_fragment(per_c), 8)
        rows, cols = c_fragment(per_d)
        self.d_place = (rows * 8 + cols).reshape(-1)


def _shape(d: Decoder) -> Shape:
    sparse = "sp" in d.mods or "sp::ordered_metadata" in d.mods
    types = d.mods[d.mods.index("col") + 1 :][:4]
    if len(types) != 4:
        raise d.error("needs four types")
    d_type, a_type, b_type, c_type = types
    tile = next((mod for mod in d.mods if mod.startswith("m16n8k")), "m16n8k0")
    k = int(tile.removeprefix("m16n8k"))
    if k not in (_SPARSE_SHAPES if sparse else _SHAPES).get(a_type, ()):
        raise d.error("shape and type are not known")
    integer = a_type in ("s8", "u8", "b1")
    same = a_type == b_type or {a_type, b_type} == {"s8", "u8"}
    results = ("s32",) if integer else ("f32", "f16") if a_type == "f16" else ("f32",)
    if not same or d_type not in results or c_type not in results:
        raise d.error("types are not known")
    for word in ("sync", "aligned", tile, "row", "col", *types):
        d.one_of(word)
    return Shape(k, a_type, b_type, d_type, c_type, sparse)


@op("mma")
def _mma(d: Decoder) -> Run:
    ordered = "sp::ordered_metadata" in d.mods
    shape = _shape(d)
    d.ignore("sp", "sp::ordered_metadata")
    exclusive = False
    if shape.a_type == "b1":
        exclusive = d.one_of("and", "xor") == "xor"
        d.one_of("popc")
    saturate = d.flag("satfinite")
    d.done(6 if shape.sparse else 4)
    results = [d.writer(item, "b32") for item in d.items(0)]
    a, b, c = ([d.reader(item, "b32") for item in d.items(i)] for i in (1, 2, 3))
    sizes = [len(x) for x in (results, a, b, c)]
    wanted = [shape.d_registers, shape.a_registers, shape.b_registers, shape.c_registers]
    if sizes != wanted:
        raise d.error(f"fragments of {sizes} registers, {wanted} are needed")
    expand = _expander(d, shape, ordered) if shape.sparse else None

    def run(m: Any, mask: np.ndarray) -> None:
        warps = m.whole_warps(mask)
        left = _matrix(m, a, warps, shape.a_type, shape.a_index, shape.k // (1 + shape.sparse))
        if expand is not None:
            left = expand(m, warps, left)
        right = _matrix(m, b, warps, shape.b_type, shape.b_index, 8)
        total = np.matmul(left, right)
        if exclusive:
            total = left.sum(axis=2)[:, :, None] + right.sum(axis=1)[:, None, :] - 2 * total
        words = _accumulate(shape, _words(m, c, warps), total, saturate)
        for i, write in enumerate(results):
            full = np.zeros(m.lanes, np.uint32)
            full[mask] = words[:, :, i].reshape(-1)
            write(m, mask, full)

    return run


def _words(m: Any, reads: list, warps: np.ndarray) -> np.ndarray:
    """Registers of the warps, [warp, lane, register]."""
    stacked = np.stack([np.broadcast_to(read(m), m.lanes) for read in reads], axis=1)
    return stacked.reshape(-1, WARP, len(reads))[warps]


def _matrix(
    m: Any, reads: list, warps: np.ndarray, kind: str, index: np.ndarray, width: int
) -> np.ndarray:
    """The matrix whose fragment the registers hold, [warp, rows, width] in float64."""
    elements = _ELEMENTS[kind](_words(m, reads, warps))
    return elements.reshape(len(warps), -1)[:, index].reshape(len(warps), -1, width)


def _accumulate(shape: Shape, c: np.ndarray, total: np.ndarray, saturate: bool) -> np.ndarray:
    """C + total as registers [warp, lane, register]."""
    warps = len(c)
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[shape.c_type]
    start = np.ascontiguousarray(c).view(dtype).reshape(warps, -1)[:, shape.c_index]
    result = start.astype(np.float64) + total.reshape(warps, -1)
    placed = result[:, shape.d_place]
    if shape.d_type == "s32":
        whole = placed.astype(np.int64)
        if saturate:
            whole = np.clip(whole, -(1 << 31), (1 << 31) - 1)
        bits = whole.astype(np.uint32)
    elif shape.d_type == "f32":
        bits = placed.astype(np.float32).view(np.uint32)
    else:
        bits = placed.astype(np.float16).view(np.uint32)
    return bits.reshape(warps, WARP, shape.d_registers)


def _expander(d: Decoder, shape: Shape, ordered: bool) -> Callable[..., np.ndarray]:
    """Puts the stored half of A to its columns by the metadata.

    A pair of lanes (k = 32) or one lane (k = 16) of every four, chosen by the selector, holds the
    indices: the low 16 bits for row g, the high ones for row g + 8, 8 indices of 2 bits each.
    """
    selector = d.ops[5]
    words = shape.k // 16
    if not isinstance(selector, Imm) or not 0 <= selector.bits < 4 // words:
        raise d.error("sparsity selector out of range")
    first = selector.bits * words
    metadata = d.read(4, "b32")

    def run(m: Any, warps: np.ndarray, stored: np.ndarray) -> np.ndarray:
        held = np.broadcast_to(metadata(m), m.lanes).reshape(-1, 8, 4)[warps]
        chosen = held[:, :, first : first + words]
        halves = np.stack([chosen & np.uint32(0xFFFF), chosen >> np.uint32(16)], axis=1)
        shifts = np.arange(0, 16, 2, dtype=np.uint32)
        index = (halves[..., None] >> shifts & np.uint32(3)).reshape(len(warps), 16, -1)
        pairs = index.reshape(len(warps), 16, -1, 2)
        wrong = pairs[..., 0] >= pairs[..., 1] if ordered else pairs[..., 0] == pairs[..., 1]
        if wrong.any():
            warp, row, chunk = np.argwhere(wrong)[0]
            found = pairs[warp, row, chunk].tolist()
            raise PtxError(f"sparse metadata of row {row}, chunk {chunk}: indices {found}")
        column = 4 * (np.arange(stored.shape[2]) // 2) + index.astype(np.int64)
        full = np.zeros((len(warps), 16, shape.k))
        np.put_along_axis(full, column, stored, axis=2)
        return full

    return run
