# SPDX-License-Identifier: Apache-2.0
"""Samples and tolerances of `fastbb::elastic_binarize` and its backward.

x, shift and alpha are multiples of 1/64 of moderate size: their sums are exact in every dtype, so
that elements at a threshold are there, and are on the same side of it in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbb.testing.compare import Bounds, Tolerance
from fastbb.testing.sample import Sample, random_like

# Values are alpha rounded once and planes are exact: a bit that differs is at least 1 of at most
# 255, which every bound here is below. Sums round gradients, and those of Bi-Real round themselves.
_FLOAT32 = (Bounds(1e-6, 0.0, 1e-6), Bounds(2e-6, 2e-6, 2e-6))
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(*_FLOAT32, *_FLOAT32),
    torch.float16: Tolerance(Bounds(5e-4, 0.0, 5e-4), Bounds(1e-3, 1e-5, 5e-4), *_FLOAT32),
    torch.bfloat16: Tolerance(Bounds(3.9e-3, 0.0, 3.9e-3), Bounds(4e-3, 1e-4, 3e-3), *_FLOAT32),
}


@dataclass(frozen=True)
class Case:
    """What `build` turns into tensors.

    Attributes:
        shape: of x, `[..., K]`.
        alpha, shift: whether they are given; `side_dtype` is theirs.
        layout: "rows" have a gap, "columns" are strided, "lead" dimensions are swapped, "expanded"
            rows are all the same memory.
    """

    shape: tuple[int, ...] = (5, 128)
    kind: str = "ternary"
    ste: str = "clip"
    alpha: float | None = 1.5
    shift: bool = True
    side_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"


CASES: dict[str, Case] = {
    **{
        f"{kind}_{ste}": Case((3, 7, 200), kind=kind, ste=ste)
        for kind in ("plus", "minus", "ternary")
        for ste in ("clip", "clip_open", "identity", "bireal")
    },
    "unsigned": Case((3, 7, 200), kind="unsigned"),
    "unsigned_plain": Case(kind="unsigned", alpha=None, shift=False),
    "plain": Case(alpha=None, shift=False),
    "no_shift": Case(kind="minus", shift=False),
    "no_alpha": Case(kind="plus", ste="clip_open", alpha=None),
    "vector": Case((70,)),
    "one_element": Case((1, 1)),
    "one_column": Case((300, 1)),
    "columns_63": Case((4, 63), kind="plus"),
    "columns_65": Case((4, 65), kind="minus", ste="bireal"),
    "columns_129": Case((2, 129), kind="unsigned"),
    "long_rows": Case((40, 1800)),
    "many_rows": Case((700, 130), kind="plus"),
    "gap_between_rows": Case((6, 100), layout="rows"),
    "strided_columns": Case((6, 100), kind="unsigned", layout="columns"),
    "swapped_lead": Case((3, 4, 96), ste="bireal", layout="lead"),
    "expanded": Case((6, 100), layout="expanded"),
    "side_float64": Case(ste="bireal", side_dtype=torch.float64),
    "no_rows": Case((0, 40)),
    "no_columns": Case((3, 0), kind="plus"),
}


def _grid(generator: torch.Generator, shape: tuple[int, ...], limit: int, step: float) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=generator) * step


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """x with other strides."""
    if layout == "rows":
        return torch.stack((x, x), 1)[:, 0]
    if layout == "columns":
        return torch.stack((x, x), -1)[..., 0]
    if layout == "lead":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x[:1].expand(x.shape) if layout == "expanded" else x


def build(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
) -> Sample:
    """The forward sample of `CASES[name]`; planes are wanted where the backward pass reads them."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    x = _laid_out(_grid(generator, case.shape, 200, 1 / 64).to(device, dtype), case.layout)
    shift = _grid(generator, case.shape[-1:], 16, 1 / 16).to(device, case.side_dtype)
    alpha = None
    if case.alpha is not None:
        alpha = torch.tensor([case.alpha], device=device, dtype=case.side_dtype)
    kwargs: dict[str, Any] = {"x": x, "alpha": alpha, "shift": shift if case.shift else None}
    if requires_grad:
        for tensor in kwargs.values():
            if tensor is not None:
                tensor.requires_grad_()
    save = case.kind != "unsigned" and case.ste != "bireal"
    args = (*kwargs.values(), case.kind, case.ste, save)
    return Sample(name, args, kwargs | {"kind": case.kind, "ste": case.ste})


def samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """Every case of the forward operator."""
    for name in CASES:
        yield build(name, device, dtype, requires_grad, seed)


def build_backward(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Sample:
    """The backward sample of `CASES[name]`; `planes` come from the forward operator."""
    x, alpha, shift, kind, ste, save = build(name, device, dtype, seed=seed).args
    out, planes = torch.ops.fastbb.elastic_binarize.default(x, alpha, shift, kind, ste, save)
    grad = random_like(out, seed + 1)
    sides = (None, None) if save else (alpha, shift)
    needed = (alpha is not None, shift is not None)
    return Sample(name, (grad, None if save else x, planes, *sides, kind, ste, *needed))


def backward_samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """Every case of the backward operator, which is not differentiable itself."""
    if requires_grad:
        return
    for name in CASES:
        yield build_backward(name, device, dtype, seed)


def planes_samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """Every case, for the operator that makes planes alone."""
    for sample in samples(device, dtype, seed=seed):
        yield Sample(sample.name, sample.args[:-1], sample.kwargs)


def exact_planes(kwargs: dict[str, Any]) -> Tensor:
    """The planes of a call, uint8 `[..., P, bytes]`, bit by bit from what they mean."""
    x, alpha, shift, kind, ste = (kwargs[key] for key in ("x", "alpha", "shift", "kind", "ste"))
    moved = x.detach().double() if shift is None else x.detach().double() + shift.detach().double()
    size = 1.0 if alpha is None else max(float(alpha), 1e-5)
    rows = {
        "plus": [moved >= 0],
        "minus": [moved > 0],
        "ternary": [moved > 0, moved < 0],
        "unsigned": [moved > size / 2],
    }[kind]
    if kind != "unsigned" and ste == "clip":
        rows.append(moved.abs() <= size)
    if kind != "unsigned" and ste == "clip_open":
        rows.append(moved.abs() < size)
    planes = torch.stack(rows, -2)
    result = torch.zeros(*planes.shape[:-1], -(-planes.shape[-1] // 128) * 16, dtype=torch.uint8)
    for bit in range(8):
        part = planes[..., bit::8].to("cpu", torch.uint8)
        result[..., : part.shape[-1]] += part << bit
    return result
