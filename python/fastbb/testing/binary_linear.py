# SPDX-License-Identifier: Apache-2.0
"""Samples and tolerances of `fastbb::bgemm` and `fastbb::binary_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbb.reference import bit_row_bytes
from fastbb.testing.compare import Bounds, Tolerance
from fastbb.testing.sample import Sample

_EXACT = Bounds(0.0, 0.0, 0.0)
GEMM_TOLERANCES = {
    dtype: Tolerance(_EXACT, _EXACT, _EXACT, _EXACT)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
# The product is exact: scale, bias and erf are what is rounded, and half precision once more.
_FLOAT32 = Bounds(2e-6, 2e-6, 1e-6)
_HALF = {
    torch.float32: _FLOAT32,
    torch.float16: Bounds(1e-3, 1e-4, 5e-4),
    torch.bfloat16: Bounds(8e-3, 1e-3, 4e-3),
}
TOLERANCES = {
    dtype: Tolerance(bounds, bounds, _FLOAT32, _FLOAT32) for dtype, bounds in _HALF.items()
}


@dataclass(frozen=True)
class Case:
    """What `build` turns into tensors.

    Attributes:
        lead: leading dimensions of x.
        n, k: output and input features.
        kind, activation, out_kind: as in `ops.binary_linear`.
        packed: x is packed already.
        zeros: share of x that is exactly zero after the shift.
        strided: x is a slice of something larger.
        rows: a scale per row of the weight, and bias, alpha and shift; else one scale alone.
    """

    lead: tuple[int, ...] = (6,)
    n: int = 24
    k: int = 96
    kind: str = "ternary"
    activation: str = "none"
    out_kind: str | None = None
    packed: bool = False
    zeros: float = 0.0
    strided: bool = False
    rows: bool = True


CASES: dict[str, Case] = {
    "bert": Case(lead=(2, 9), n=100, k=192, zeros=0.02),
    "no_zero": Case(lead=(13,), n=65, k=129),
    "zeros_in_some_rows": Case(lead=(40,), n=33, k=70, zeros=0.003),
    "plus": Case(kind="plus", zeros=0.2),
    "minus": Case(kind="minus", zeros=0.2),
    "unsigned": Case(kind="unsigned", activation="relu", zeros=0.2),
    "one_scale": Case(rows=False),
    "packed": Case(packed=True, zeros=0.1, lead=(3, 5)),
    "packed_unsigned": Case(packed=True, kind="unsigned"),
    "relu_to_unsigned": Case(n=130, kind="plus", activation="relu", out_kind="unsigned"),
    "gelu": Case(n=40, activation="gelu"),
    "gelu_to_plus": Case(lead=(50,), n=72, activation="gelu", out_kind="plus"),
    "gelu_to_ternary": Case(lead=(2, 3), n=20, activation="gelu", out_kind="ternary"),
    "to_minus": Case(n=8, out_kind="minus", packed=True, kind="minus"),
    "strided": Case(lead=(4, 3), strided=True),
    "one_of_each": Case(lead=(1,), n=1, k=1),
    "no_lead": Case(lead=(), n=5, k=64),
    "odd": Case(lead=(7,), n=17, k=131),
    "long": Case(lead=(5,), n=9, k=2500, zeros=0.001),
    "many_rows": Case(lead=(400,), n=3, k=65),
    "no_rows": Case(lead=(0, 4)),
    "no_columns": Case(n=0),
}


def _uneven(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator)


def _random_bits(generator: torch.Generator, shape: tuple[int, ...], k: int) -> Tensor:
    """Packed rows with zero bits from k on."""
    bits = torch.randint(0, 256, (*shape, bit_row_bytes(k)), generator=generator)
    first = torch.arange(bit_row_bytes(k)) * 8
    real = (k - first).clamp(0, 8)
    return (bits & ((1 << real) - 1)).to(torch.uint8)


def _ternary(bits: Tensor) -> Tensor:
    """Planes [..., 2, bytes] of random bits that are never both set."""
    positive, negative = bits.unbind(-2)
    return torch.stack((positive, negative & ~positive), -2)


def build(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Sample:
    """The named case: raw arguments, and the keyword arguments of `ops.binary_linear`."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    n, k = case.n, case.k
    weight_bits = _random_bits(generator, (n,), k)
    scale = _uneven(generator, (n if case.rows else 1,)).abs() * 0.1
    kwargs: dict[str, Any] = {"k": k, "kind": case.kind, "activation": case.activation}
    if case.rows:
        kwargs["bias"] = _uneven(generator, (n,))
    if case.rows or case.kind == "unsigned":
        kwargs["alpha"] = torch.tensor([0.7])
    if case.packed:
        planes = (2,) if case.kind == "ternary" else ()
        x = _random_bits(generator, (*case.lead, *planes), k)
        x = _ternary(x) if planes else x
    else:
        x = _uneven(generator, (*case.lead, k)).to(dtype)
        if case.rows:
            kwargs["shift"] = _uneven(generator, (k,)).mul(8).round().div(8)
        gone = torch.rand(x.shape, generator=generator) < case.zeros
        x = torch.where(gone, -kwargs.get("shift", torch.zeros(k)).to(dtype), x)
        if case.strided:
            x = torch.stack((x, x + 1), -2)[..., 0, :]
    if case.out_kind is not None:
        kwargs["out_kind"] = case.out_kind
        kwargs["out_shift"] = _uneven(generator, (n,))
        if case.out_kind == "unsigned":
            kwargs["out_alpha"] = torch.tensor([0.9])
    kwargs = {key: _to(value, device) for key, value in kwargs.items()}
    kwargs |= {"x": x.to(device), "weight_bits": _to(weight_bits, device)}
    kwargs["weight_scale"] = scale.to(device)
    kwargs["out_dtype"] = dtype
    return Sample(name, raw_args(kwargs), kwargs)


def _to(value: Any, device: str | torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def raw_args(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of the raw operator, in schema order."""
    get = kwargs.get
    return (
        *(kwargs["x"], kwargs["weight_bits"], kwargs["weight_scale"], get("bias"), kwargs["k"]),
        *(get("alpha"), get("shift"), kwargs["kind"], kwargs["activation"], kwargs["out_dtype"]),
        *(get("out_kind") or "float", get("out_alpha"), get("out_shift")),
    )


def samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """All cases of `binary_linear`, which has no gradients: `requires_grad` changes nothing."""
    for name in CASES:
        yield build(name, device, dtype, seed)


# (batch, M, N, K) by name; every kind of a and b is tried with each.
GEMM_SHAPES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "one": ((), 1, 1, 1),
    "odd": ((), 7, 33, 70),
    "word": ((3,), 4, 5, 64),
    "batch": ((2, 3), 9, 8, 130),
    "bert": ((), 25, 40, 768),
    "long": ((), 3, 10, 2100),
    "no rows": ((2,), 0, 3, 40),
    "no batch": ((0,), 2, 3, 40),
    "no inner": ((), 2, 3, 0),
}


def gemm_samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """All shapes and kinds of `bgemm`, which has neither floats nor gradients."""
    generator = torch.Generator().manual_seed(seed)
    for name, (lead, m, n, k) in GEMM_SHAPES.items():
        for a_kind in ("signed", "unsigned", "ternary"):
            for b_kind in ("signed", "unsigned"):
                planes = (2,) if a_kind == "ternary" else ()
                a = _random_bits(generator, (*lead, m, *planes), k)
                a = (_ternary(a) if planes else a).to(device)
                b = _random_bits(generator, (*lead, n), k).to(device)
                kwargs = {"a": a, "b": b, "k": k, "a_kind": a_kind, "b_kind": b_kind}
                yield Sample(f"{name}, {a_kind} x {b_kind}", tuple(kwargs.values()), kwargs)
