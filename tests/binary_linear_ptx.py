# SPDX-License-Identifier: Apache-2.0
"""Products of packed bits by the CUDA kernels: cases, their launches by the C++ plan, and what the
definition makes of them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ptxsim
from fastbb import _C
from fastbb.reference.binary_linear import activate, bgemm, pack, value_kind
from fastbb.reference.binary_pack import floored, pack_bool

SOURCE = Path(__file__).resolve().parent.parent / "csrc/ops/binary_linear/binary_linear_cuda.cu"
KINDS = {"plus": 0, "minus": 1, "ternary": 2, "unsigned": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
LARGE, SMALL = 1, 1 << 40  # tiles from which on they are of 128 rows, for `many_tiles`

_POINTER, _LONG, _INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32


class Params(ctypes.Structure):
    """`BinaryLinearParams`; the plan refuses another size."""

    _fields_ = [
        ("a", _POINTER),
        ("a_batch", _LONG),
        ("a_row", _LONG),
        ("b", _POINTER),
        ("b_batch", _LONG),
        ("a_kind", _INT),
        ("b_kind", _INT),
        *((name, _LONG) for name in ("batch", "m", "n", "k")),
        ("out_kind", _INT),
        ("out", _POINTER),
        ("out_dtype", _INT),
        ("alpha", _POINTER),
        ("scale", _POINTER),
        ("scale_column", _LONG),
        ("bias", _POINTER),
        ("activation", _INT),
        ("bit_kind", _INT),
        ("bit_shift", _POINTER),
        ("bit_alpha", _POINTER),
    ]


@dataclass(frozen=True)
class Case:
    """A product of [batch, m, k] and [batch, n, k].

    Attributes:
        out: a dtype, int32 for the dot products themselves, or a kind of bits.
        scale: how many scales there are: none, "one" or "all".
        gap: bytes between rows of a, beyond its planes.
        overlap: elements of ternary rows may be in both planes, which is zero.
    """

    m: int
    n: int
    k: int
    a: str = "plus"
    b: str = "plus"
    batch: int = 1
    out: torch.dtype | str = torch.int32
    alpha: float | None = None
    scale: str = "none"
    bias: bool = False
    activation: str = "none"
    shift: bool = False
    gap: int = 0
    overlap: bool = False


class Call:
    """The tensors of a case, in the global memory of a launch, and its parameters."""

    def __init__(self, case: Case, many_tiles: int = 256, seed: int = 0) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(seed)
        self.arena = ptxsim.Arena()
        p = self.params = Params()
        p.batch, p.m, p.n, p.k = case.batch, case.m, case.n, case.k
        p.a_kind, p.b_kind = KINDS[case.a], KINDS[case.b]
        self._add_bits()
        self.sides = {"alpha": None if case.alpha is None else torch.tensor([case.alpha])}
        if case.scale != "none":
            self.sides["scale"] = self._random(case.n if case.scale == "all" else 1).abs()
            p.scale_column = case.scale == "all"
        self.sides["bias"] = self._random(case.n) if case.bias else None
        self.sides["bit_shift"] = self._random(case.n) if case.shift else None
        self.sides["bit_alpha"] = torch.tensor([0.7]) if case.out == "unsigned" else None
        for name, value in self.sides.items():
            if value is not None:
                setattr(p, name, self.arena.add(value.numpy(), "in", name=name))
        p.activation = ACTIVATIONS[case.activation]
        self._add_out()
        self.plan = _C.binary_linear_cuda_plan(bytes(p), many_tiles)

    def _random(self, count: int) -> Tensor:
        return torch.randn(count, generator=self.generator)

    def _bits(self, rows: int, kind: str) -> Tensor:
        """Random bits [batch, rows, bytes], or [batch, rows, 2, bytes]."""
        draws = torch.rand(self.case.batch, rows, self.case.k, generator=self.generator)
        if kind != "ternary":
            return pack_bool(draws < 0.5)
        least = 0.3 if self.case.overlap else 0.6
        return pack_bool(torch.stack((draws < 0.4, draws > least), -2))

    def _add_bits(self) -> None:
        case, p = self.case, self.params
        self.a, self.b = self._bits(case.m, case.a), self._bits(case.n, case.b)
        rows = self.a.flatten(2)
        gap = torch.full((*rows.shape[:2], case.gap), 0xFF, dtype=torch.uint8)
        rows = torch.cat((rows, gap), -1).contiguous()
        p.a, p.b = (self.arena.add(x.numpy(), "in") for x in (rows, self.b))
        p.a_batch, p.a_row = rows.stride()[:2]
        p.b_batch = self.b.stride(0)

    def _add_out(self) -> None:
        case, p = self.case, self.params
        if isinstance(case.out, str):
            p.out_kind, p.bit_kind = 2, KINDS[case.out]
            planes = (2,) if case.out == "ternary" else ()
            row_bytes = pack_bool(torch.zeros(case.n, dtype=torch.bool)).numel()
            self.out = torch.empty(case.batch, case.m, *planes, row_bytes, dtype=torch.uint8)
        else:
            p.out_kind = case.out != torch.int32
            p.out_dtype = DTYPES.get(case.out, 0)
            self.out = torch.empty(case.batch, case.m, case.n, dtype=case.out)
        p.out = self.arena.add(self._raw(self.out), "out", name="out")

    @staticmethod
    def _raw(x: Tensor) -> np.ndarray:
        return (x.view(torch.int16) if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()

    def run(self, module: ptxsim.Module, **options: object) -> ptxsim.Result:
        """Launches as the package does; raises what ptxsim finds."""
        launch, planes = self.plan["launch"], 2 if self.case.a == "ternary" else 1
        part = f"binary_linearILi{self.plan['rows']}ELi{planes}E"
        (name,) = (each for each in module.kernels if part in each)
        return module.launch(
            name,
            grid=launch["grid"],
            block=launch["block"],
            args=[self.params, self.plan["bytes"]],
            dynamic_shared=launch["shared_bytes"],
            arena=self.arena,
            **options,
        )

    def result(self) -> Tensor:
        assert self.arena.written(self.params.out).all(), "not all written"
        raw = torch.from_numpy(np.array(self.arena.get(self.params.out)))
        return raw.view(self.out.dtype).reshape(self.out.shape)

    def expected(self) -> Tensor:
        case, sides = self.case, self.sides
        values = (value_kind(kind) for kind in (case.a, case.b))
        dot = bgemm(self.a, self.b, case.k, *values)
        if case.out == torch.int32:
            return dot
        alpha = sides["alpha"]
        factor = torch.ones(1) if alpha is None else floored(alpha)
        y = dot.float() * (factor * sides.get("scale", torch.ones(1)))
        y = activate(y if sides["bias"] is None else y + sides["bias"], case.activation)
        if isinstance(case.out, str):
            return pack(y, case.out, sides["bit_alpha"], sides["bit_shift"])
        return y.to(case.out)

    def check(self) -> None:
        """Integers, bits and sums of products are exact; GELU is a function of its own."""
        result, expected = self.result(), self.expected()
        if self.case.activation == "gelu" and self.out.is_floating_point():
            torch.testing.assert_close(result, expected, check_stride=False)
        else:
            assert torch.equal(result, expected)


def launch_of(kernel: str) -> dict[str, int]:
    """The plan's launch of `binary_linear<rows, planes>`."""
    rows, planes = kernel.removeprefix("binary_linear<").removesuffix(">").split(", ")
    p = Params(
        batch=1, m=int(rows), n=128, k=128, a_kind=KINDS["ternary" if planes == "2" else "plus"]
    )
    return _C.binary_linear_cuda_plan(bytes(p), LARGE if rows == "128" else SMALL)["launch"]
