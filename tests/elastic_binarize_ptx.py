# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels of elastic binarization, as PTX, with the launches of the C++ plan."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ptxsim
from fastbb import _C
from fastbb.reference.binary_pack import bit_row_bytes, floored, pack_bool
from fastbb.reference.elastic_binarize import elastic_binarize

SOURCE = (
    Path(__file__).resolve().parent.parent / "csrc/ops/elastic_binarize/elastic_binarize_cuda.cu"
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ELEMENTS = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
KINDS = ["plus", "minus", "ternary", "unsigned"]
STES = ["clip", "clip_open", "identity", "bireal"]

_POINTER, _LONG, _INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32


class Params(ctypes.Structure):
    """`ElasticBinarizeParams`; the plan refuses another size."""

    _fields_ = [
        *((name, _INT) for name in ("dtype", "kind", "ste")),
        ("x", _POINTER),
        ("x_row", _LONG),
        *((name, _POINTER) for name in ("shift", "alpha", "planes", "out")),
        ("rows", _LONG),
        ("k", _LONG),
        ("grad", _POINTER),
        ("grad_row", _LONG),
        *((name, _POINTER) for name in ("dx", "partial_shift", "partial_alpha", "dshift")),
    ]


def launch_of(kernel: str) -> dict[str, int]:
    """The plan's launch of a kernel, by its name in cuda_budgets.json."""
    plan = _C.elastic_binarize_cuda_plan(bytes(Params(rows=1, k=1)))
    for name in ("forward", "backward", "sums"):
        if kernel.startswith(f"elastic_binarize_{name}"):
            return plan[name]
    raise AssertionError(kernel)


def bits(x: Tensor) -> np.ndarray:
    """float32 and uint8 as they are, 16-bit floats as integers, with the storage's strides kept."""
    return (x if x.dtype in (torch.float32, torch.uint8) else x.view(torch.int16)).numpy()


def stored(x: Tensor) -> np.ndarray:
    """All that a row-strided view `[rows, k]` reaches."""
    size = (x.shape[0] - 1) * x.stride(0) + x.shape[1] if x.numel() else 0
    return bits(x.as_strided((size,), (1,)))


class Case:
    """Inputs `[rows, k]` of both passes, and what the reference makes of them."""

    def __init__(
        self,
        rows: int,
        k: int,
        kind: str,
        ste: str = "clip",
        dtype: torch.dtype = torch.float32,
        alpha: bool = True,
        shift: bool = True,
        padding: int = 0,
        special: bool = False,
    ) -> None:
        self.kind, self.ste = kind, ste
        made = torch.Generator().manual_seed(rows * 1000 + k)

        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made)

        self.x = rand(rows, k + padding).to(dtype)[:, :k]
        self.grad = rand(rows, k + 2 * padding).to(dtype)[:, :k]
        self.alpha = torch.tensor([0.8]) if alpha else None
        self.shift = rand(k) / 2 if shift else None
        self.x[0, ::3] = 0
        if special:
            self.x[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.8, -0.8])[:k]
            self.x[-1, -1] = torch.nan
            self.grad[0, :3] = torch.tensor([torch.inf, torch.nan, 1e30])[:k]
        self._refer()

    def _refer(self) -> None:
        x = self.x.detach().requires_grad_()
        sides = {
            name: None if value is None else value.clone().requires_grad_()
            for name, value in (("alpha", self.alpha), ("shift", self.shift))
        }
        self.out = elastic_binarize(x, kind=self.kind, ste=self.ste, **sides)
        self.out.backward(self.grad)
        self.out = self.out.detach()
        self.gradients = {"x": x.grad} | {
            name: value.grad for name, value in sides.items() if value is not None
        }

    def planes(self) -> Tensor:
        """What the forward pass saves, `[rows, planes, bytes]`."""
        x = self.x.float()
        x = x if self.shift is None else x + self.shift
        alpha = floored(torch.ones(1) if self.alpha is None else self.alpha)
        planes = [x >= 0] if self.kind == "plus" else [x > 0]
        if self.kind == "unsigned":
            return pack_bool(x > alpha / 2).unsqueeze(-2)
        if self.kind == "ternary":
            planes.append(x < 0)
        if self.ste in ("clip", "clip_open"):
            size = (x / alpha).abs()
            planes.append(size <= 1 if self.ste == "clip" else size < 1)
        return pack_bool(torch.stack(planes, -2))

    @property
    def needs_x(self) -> bool:
        return self.kind == "unsigned" or self.ste == "bireal"


class Call:
    """Parameters of a pass, and the global memory that they lead to."""

    def __init__(self, case: Case, save: bool = True, out: bool = True) -> None:
        self.case = case
        self.arena = ptxsim.Arena()
        self.save, self.out = save, out
        p = self.params = Params(dtype=DTYPES[case.x.dtype])
        p.kind, p.ste = KINDS.index(case.kind), STES.index(case.ste)
        p.rows, p.k = case.x.shape
        for name in ("alpha", "shift"):
            value = getattr(case, name)
            if value is not None:
                setattr(p, name, self.arena.add(value.numpy(), "in"))
        self._fill()
        self.plan = _C.elastic_binarize_cuda_plan(bytes(p))

    def _fill(self) -> None:
        p, case = self.params, self.case
        p.x, p.x_row = self.arena.add(stored(case.x), "in"), case.x.stride(0)
        if self.out:
            p.out = self.arena.add(bits(torch.empty_like(case.x).contiguous()), "out")
        if self.save:
            p.planes = self.arena.add(np.empty(tuple(case.planes().shape), np.uint8), "out")

    def _read(self, address: int, like: Tensor) -> Tensor:
        assert self.arena.written(address).all(), "not all written"
        raw = torch.from_numpy(np.array(self.arena.get(address)))
        return raw.view(like.dtype).reshape(like.shape)

    def launch(
        self, module: ptxsim.Module, what: str, name: str, *args: Any, **options: Any
    ) -> None:
        """Runs the kernel whose mangled name contains `name` as the plan's `what`."""
        launch = self.plan[what]
        if not launch["grid"]:
            return
        (kernel,) = (each for each in module.kernels if name in each)
        module.launch(
            kernel,
            grid=launch["grid"],
            block=launch["block"],
            args=[self.params, self.plan["bytes"], *args],
            dynamic_shared=launch["shared_bytes"],
            arena=self.arena,
            **options,
        )

    def run(self, module: ptxsim.Module, **options: Any) -> None:
        """Launches as the package does; raises what ptxsim finds."""
        name = f"forwardI{ELEMENTS[self.case.x.dtype]}E"
        self.launch(module, "forward", name, **options)

    def check(self) -> None:
        case, p = self.case, self.params
        if self.out:
            assert torch.equal(self._read(p.out, case.out), case.out), "out"
        if self.save:
            planes = case.planes()
            assert planes.shape[-1] == bit_row_bytes(p.k)
            assert torch.equal(self._read(p.planes, planes), planes), "planes"


class BackwardCall(Call):
    """A backward pass of all gradients, or of x alone."""

    def __init__(self, case: Case, sums: bool = True) -> None:
        self.sums = sums
        self.dalpha = 0
        super().__init__(case)

    def _fill(self) -> None:
        p, case = self.params, self.case
        if case.needs_x:
            p.x, p.x_row = self.arena.add(stored(case.x), "in"), case.x.stride(0)
        else:
            p.planes = self.arena.add(case.planes().numpy(), "in")
        p.grad, p.grad_row = self.arena.add(stored(case.grad), "in"), case.grad.stride(0)
        p.dx = self.arena.add(bits(torch.empty_like(case.x).contiguous()), "out")
        plan = _C.elastic_binarize_cuda_plan(bytes(p))
        if not self.sums:
            return
        if case.shift is not None:
            p.partial_shift = self.arena.add(np.empty((plan["tasks"], p.k), np.float32), "out")
            p.dshift = self.arena.add(np.empty(p.k, np.float32), "out")
        if case.alpha is not None:
            p.partial_alpha = self.arena.add(np.empty(plan["backward"]["grid"]), "out")
            self.dalpha = self.arena.add(np.empty(1, np.float32), "out")

    def run(self, module: ptxsim.Module, **options: Any) -> None:
        name = f"backwardI{ELEMENTS[self.case.x.dtype]}Lb{self.case.needs_x:d}E"
        self.launch(module, "backward", name, **options)
        if self.params.dshift or self.dalpha:
            self.launch(module, "sums", "sums", np.uint64(self.dalpha), **options)

    def check(self) -> None:
        case, p, gradients = self.case, self.params, self.case.gradients
        dx = self._read(p.dx, case.x)
        torch.testing.assert_close(dx, gradients["x"], rtol=0, atol=0, equal_nan=True)
        sums = {"shift": p.dshift, "alpha": self.dalpha}
        for name, address in sums.items():
            if address:
                found = self._read(address, gradients[name])
                torch.testing.assert_close(
                    found, gradients[name], rtol=1e-5, atol=1e-5, equal_nan=True
                )
