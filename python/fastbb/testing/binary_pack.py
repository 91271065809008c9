# SPDX-License-Identifier: Apache-2.0
"""Samples and tolerances of `fastbb::pack_bits`, `pack_weight`, `unpack_bits` and
`binary_embedding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastbb.testing.compare import Bounds, Tolerance
from fastbb.testing.sample import Sample

_EXACT = Bounds(0.0, 0.0, 0.0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {dtype: Tolerance(_EXACT, _EXACT, _EXACT, _EXACT) for dtype in _DTYPES}
"""Bits, and values that are picked by them."""

# Scales of weights are float32 of sums in float64, whose order is free: one unit in the last place.
_SCALE = Bounds(1.2e-7, 0.0, 1.2e-7)
WEIGHT_TOLERANCES = {dtype: Tolerance(_SCALE, _EXACT, _EXACT, _EXACT) for dtype in _DTYPES}

SIZES = {
    "one": (1, 1),
    "odd": (3, 37),
    "word": (2, 64),
    "word_and_one": (2, 65),
    "unit": (4, 128),
    "unit_and_more": (3, 200),
    "bert": (5, 768),
    "many_rows": (700, 100),
    "no_rows": (0, 70),
    "no_columns": (4, 0),
}
"""Rows and columns of the samples: bits end within a byte, a word and a unit of 128, or with it."""


def spoil(x: Tensor) -> Tensor:
    """x with zeros of both signs, NaN, infinities and the smallest numbers here and there."""
    tiny = torch.finfo(x.dtype).smallest_normal / 4
    special = [0.0, -0.0, math.nan, math.inf, -math.inf, tiny, -tiny]
    flat = x.flatten()
    for i, value in enumerate(special):
        flat[3 * i + 1 :: 29] = value
    return flat.view(x.shape)


Make = Callable[..., Tensor]


def _random(device: str | torch.device, dtype: torch.dtype, seed: int) -> Make:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, to: torch.dtype = dtype) -> Tensor:
        # Few digits, so that x + shift is often exactly 0.
        x = torch.randn(shape, generator=generator).mul(8).round().div(8)
        return x.to(device, to)

    return make


def pack_samples(
    device: str | torch.device, dtype: torch.dtype, requires_grad: bool = False, seed: int = 0
) -> Iterator[Sample]:
    """Every kind at every size, with and without shift; views; special values. The result is
    integral, so that nothing requires gradients.
    """
    make = _random(device, dtype, seed)

    def sample(name: str, x: Tensor, shift: Tensor | None, kind: str) -> Sample:
        alpha = make(1, to=torch.float32).abs() + 0.25 if kind == "unsigned" else None
        return Sample(f"{name}_{kind}", (x, shift, alpha, kind))

    for i, (name, (rows, k)) in enumerate(SIZES.items()):
        for j, kind in enumerate(("plus", "minus", "ternary", "unsigned")):
            shift = make(k, to=torch.float32) if (i + j) % 2 else None
            yield sample(name, make(rows, k), shift, kind)
    for kind in ("plus", "minus", "ternary", "unsigned"):
        yield sample("special", spoil(make(6, 100)), None, kind)
        yield sample("special_shifted", spoil(make(6, 100)), spoil(make(100)), kind)
    yield sample("vector", make(70), make(70, to=torch.float64), "ternary")
    yield sample("batch", make(2, 3, 4, 50), make(50), "plus")
    yield sample("sliced", make(2, 9, 90)[:, 1::2, 3:80], make(77), "ternary")
    yield sample("transposed", make(40, 6).t(), make(80)[::2], "unsigned")
    yield sample("expanded", make(1, 33).expand(5, 33), None, "minus")
    scalar = torch.tensor(1e-7, dtype=torch.float64).to(device)
    yield Sample("least_alpha_unsigned", (make(3, 50) * 1e-5, None, scalar, "unsigned"))


def weight_samples(
    device: str | torch.device, dtype: torch.dtype, requires_grad: bool = False, seed: int = 0
) -> Iterator[Sample]:
    """Every mean, scale and zero policy, sizes in turns; views; special values, but for NaN, whose
    scales would be NaN, which is not even itself.
    """
    make = _random(device, dtype, seed)

    def special(*shape: int) -> Tensor:
        return spoil(make(*shape)).nan_to_num(0.0, math.inf, -math.inf)

    sizes = [name for name in SIZES if not name.startswith("no_")]
    for center in ("none", "tensor", "row"):
        for scale in ("tensor", "row"):
            for policy in ("plus", "minus", "ternary"):
                name = sizes[0]
                sizes = [*sizes[1:], name]
                modes = (center, scale, policy)
                yield Sample("_".join((name, *modes)), (make(*SIZES[name]), *modes))
    yield Sample("sliced", (make(9, 90)[1::2, 3:80], "tensor", "row", "plus"))
    yield Sample("transposed", (make(40, 6).t(), "row", "tensor", "minus"))
    yield Sample("no_rows", (make(0, 70), "row", "row", "plus"))
    yield Sample("special", (special(6, 100), "none", "tensor", "plus"))
    yield Sample("special_rows", (special(40, 5), "row", "row", "ternary"))


def _bits(shape: tuple[int, ...], device: str | torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)


def _row_bytes(k: int) -> int:
    return (k + 127) // 128 * 16


def unpack_samples(
    device: str | torch.device, dtype: torch.dtype, requires_grad: bool = False, seed: int = 0
) -> Iterator[Sample]:
    """Every kind at every size, to `dtype`. All bits are random, those beyond a row's end and both
    planes too.
    """
    for i, (name, (rows, k)) in enumerate(SIZES.items()):
        for kind in ("signed", "unsigned", "ternary"):
            planes = (2,) if kind == "ternary" else ()
            bits = _bits((rows, *planes, _row_bytes(k)), device, seed + i)
            yield Sample(f"{name}_{kind}", (bits, k, kind, dtype))
    bits = _bits((2, 3, 2, 16), device, seed)
    yield Sample("batch", (bits, 99, "ternary", dtype))
    yield Sample("one_row", (bits[0, 0, 0], 128, "signed", dtype))
    yield Sample("transposed", (bits.transpose(0, 1), 127, "ternary", dtype))
    yield Sample("sliced", (_bits((5, 48), device, seed)[::2, 16:32], 70, "unsigned", dtype))


def embedding_samples(
    device: str | torch.device, dtype: torch.dtype, requires_grad: bool = False, seed: int = 0
) -> Iterator[Sample]:
    """int64 and int32 ids of several shapes; scales of rows, of all, of other dtypes, views."""
    make = _random(device, dtype, seed)
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int, to: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(7, shape, generator=generator).to(device, to)

    def sample(name: str, ids: Tensor, scale: Tensor, k: int) -> Sample:
        return Sample(name, (ids, _bits((7, _row_bytes(k)), device, seed), scale, k, dtype))

    yield sample("tokens", ids(2, 9), make(7, to=torch.float32), 100)
    yield sample("int32", ids(2, 9, to=torch.int32), make(7, to=torch.float32), 64)
    yield sample("one_scale", ids(5), make(1, to=torch.float32), 37)
    yield sample("scalar_id", ids(), make(7, to=torch.float32), 1)
    yield sample("many", ids(900, 2), make(7), 96)
    yield sample("strided", ids(6, 4).t(), make(14, to=torch.float32)[::2], 200)
    yield sample("special", ids(40), spoil(make(7, to=torch.float32)), 33)
    yield sample("no_ids", ids(0, 3), make(7), 50)
