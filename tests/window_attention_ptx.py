# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels of window attention, as PTX, on the arguments of `fastbb.ops`, with the
launches of the C++ plan.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ptxsim
from fastbb import _C
from fastbb.testing.sample import leaves

FOLDER = Path(__file__).resolve().parent.parent / "csrc" / "ops" / "window_attention"
MATHS = {"f16": "HalfMath", "bf16": "Bf16Math", "f32": "FloatMath", "tf32": "Tf32Math"}
SOURCES = {kind: FOLDER / f"window_attention_cuda_{kind}.cu" for kind in MATHS}
BACKWARD_SOURCES = {kind: FOLDER / f"window_attention_cuda_backward_{kind}.cu" for kind in MATHS}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SIDE_FIELDS = {
    "bias_table": "dtable",
    "bias": "dbias",
    "scale": "dscale",
    "k_pad": "dk_pad",
    "v_pad": "dv_pad",
}
MATH_DTYPES = {"HalfMath": 2, "FloatMath": 0}  # -> dtype of the parameters
PAD_MODES = {"none": 0, "pad_then_roll": 1, "roll_then_pad": 2}

_POINTER, _LONG, _INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32


class TokenMap(ctypes.Structure):
    """`TokenMap` of window_attention.h."""

    _fields_ = [("data", _POINTER)] + [(x, _LONG) for x in ("image", "row", "column", "head")]


class Gradients(ctypes.Structure):
    """`WindowAttentionGradients`."""

    _fields_ = [
        *((name, TokenMap) for name in ("grad_out", "dq", "dk", "dv")),
        ("partial_table", _POINTER),
        ("dbias", _POINTER),
        *((f"partial_{name}", _POINTER) for name in ("scale", "pads", "dq", "dkv")),
        *((name, _POINTER) for name in ("dtable", "dscale", "dk_pad", "dv_pad")),
    ]


class Params(ctypes.Structure):
    """`WindowAttentionParams`; the plan refuses another size."""

    _fields_ = [
        ("dtype", _INT),
        ("batch", _LONG),
        ("heads", _INT),
        ("head_dim", _INT),
        ("full", ctypes.c_bool),
        ("q_shared", ctypes.c_bool),
        ("nq", _LONG),
        ("nk", _LONG),
        *((f"{what}_{axis}", _INT) for what in ("map", "window", "shift") for axis in "hw"),
        ("windows_y", _INT),
        ("windows_x", _INT),
        ("pad_mode", _INT),
        *((name, TokenMap) for name in ("q", "k", "v", "out")),
        *((name, _POINTER) for name in ("lse", "k_pad", "v_pad", "table", "bias")),
        ("bias_ld", _LONG),
        ("mask", _POINTER),
        ("mask_count", _LONG),
        ("swin_mask", ctypes.c_bool),
        ("swin_mask_value", ctypes.c_float),
        ("scale_per_head", _POINTER),
        ("scale", ctypes.c_float),
        ("qk_l2norm", ctypes.c_bool),
        ("tf32", ctypes.c_bool),
        ("grad", Gradients),
    ]


_KERNEL = re.compile(
    r"window_attention_(?P<what>\w+)<(?P<math>\w+), (?P<dim>\d+)"
    r"(, (?P<pack>\d+))?(, (?P<all>\w+))?>"
)


def launch_of(kernel: str) -> dict[str, int]:
    """The plan's launch for windows of 7 x 7, or as many tokens as fit side by side, or of 14 x 14
    where a kernel serves larger windows alone.
    """
    if kernel.startswith(("window_attention_sum<", "window_attention_collapse")):
        return {"block": 256 if "sum" in kernel else 128, "shared_bytes": 0}
    match = _KERNEL.fullmatch(kernel)
    assert match is not None, kernel
    pack = int(match["pack"] or 1)
    larger = match["what"] == "backward_queries" or match["all"] == "false"
    side = 14 if larger else {1: 7, 2: 5, 4: 4}[pack]
    p = Params(batch=1, heads=1, head_dim=int(match["dim"]), table=256)
    p.dtype = MATH_DTYPES[match["math"]]
    p.map_h = p.map_w = p.window_h = p.window_w = side
    p.nq = p.nk = side**2
    p.windows_y = p.windows_x = 1
    backward = match["what"].startswith("backward_")
    plan_of = _C.window_attention_cuda_backward_plan if backward else _C.window_attention_cuda_plan
    plan = plan_of(bytes(p))
    assert (plan["dim"], plan["pack"]) == (int(match["dim"]), pack)
    return plan[match["what"].removeprefix("backward_")]


def _bits(x: Tensor) -> np.ndarray:
    """float32 as it is, 16-bit floats as integers, with the storage's strides kept."""
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy()


class Arguments:
    """Parameters of a call, and the global memory that they lead to; results are left out.

    Attributes:
        workspace: address of a backward pass's workspace.
    """

    workspace: int | None = None

    def __init__(self, kwargs: dict[str, Any], tf32: bool = False) -> None:
        self.arena = ptxsim.Arena()
        self.q, self.k, v = (kwargs[name].contiguous() for name in ("q", "k", "v"))
        p = self.params = Params()
        p.tf32 = tf32
        p.dtype, p.batch = DTYPES[self.k.dtype], self.k.shape[0]
        p.heads, p.head_dim = self.k.shape[-2:]
        p.full = self.k.dim() == 4
        if p.full:
            p.nq, p.nk = self.q.shape[1], self.k.shape[1]
            p.windows_y = p.windows_x = 1
        else:
            self._describe_windows(kwargs)
        p.q, p.k, p.v = (self._map(x) for x in (self.q, self.k, v))
        self._add_sides(kwargs)

    def _describe_windows(self, kwargs: dict[str, Any]) -> None:
        p = self.params
        p.q_shared = self.q.dim() == 4
        p.map_h, p.map_w = self.k.shape[1:3]
        p.window_h, p.window_w = kwargs["window"]
        p.shift_h, p.shift_w = kwargs["shift"]
        p.windows_y = -(-p.map_h // p.window_h)
        p.windows_x = -(-p.map_w // p.window_w)
        p.nq = p.nk = p.window_h * p.window_w
        p.pad_mode = PAD_MODES[kwargs["pad_mode"]]

    def _map(self, x: Tensor, mode: str = "in") -> TokenMap:
        stride = x.stride()
        row = stride[1] if x.dim() == 5 else 0
        return TokenMap(self.arena.add(_bits(x), mode), stride[0], row, stride[-3], stride[-2])

    def _floats(self, x: Tensor) -> int:
        return self.arena.add(np.ascontiguousarray(x.float().numpy()), "in")

    def _add_sides(self, kwargs: dict[str, Any]) -> None:
        p = self.params
        mask, scale = kwargs.get("mask"), kwargs.get("scale")
        if "bias_table" in kwargs:
            p.table = self._floats(kwargs["bias_table"])
        if "bias" in kwargs:
            p.bias, p.bias_ld = self._floats(kwargs["bias"]), p.nk
        if isinstance(mask, Tensor):
            p.mask, p.mask_count = self._floats(mask), mask.shape[0]
        p.swin_mask = isinstance(mask, str)
        p.swin_mask_value = kwargs.get("mask_value", -100.0)
        if "k_pad" in kwargs:
            pads = (kwargs[name].to(self.k.dtype).flatten() for name in ("k_pad", "v_pad"))
            p.k_pad, p.v_pad = (self._floats(x) for x in pads)
        p.scale = scale if isinstance(scale, float) else p.head_dim**-0.5
        if isinstance(scale, Tensor):
            p.scale_per_head = self._floats(scale.flatten())
        p.qk_l2norm = kwargs["qk_l2norm"]

    @property
    def kind(self) -> str:
        """Which of SOURCES has the kernel."""
        names = {torch.float16: "f16", torch.bfloat16: "bf16"}
        return names.get(self.k.dtype, "tf32" if self.params.tf32 else "f32")

    def _read(self, address: int, like: Tensor) -> Tensor:
        """A result in the arena, with the dtype of `like`."""
        assert self.arena.written(address).all(), "not all written"
        bits = torch.from_numpy(np.array(self.arena.get(address)))
        return bits.view(like.dtype).reshape(like.shape)

    def _launch(
        self, module: ptxsim.Module, name: str, launch: dict[str, int], *args: Any, **options: Any
    ) -> ptxsim.Result:
        """Runs the kernel whose mangled name contains `name`."""
        (kernel,) = (each for each in module.kernels if name in each)
        return module.launch(
            kernel,
            grid=launch["grid"],
            block=launch["block"],
            args=[self.params, *args],
            dynamic_shared=launch["shared_bytes"],
            arena=self.arena,
            **options,
        )


class Call(Arguments):
    """A forward pass."""

    def __init__(self, kwargs: dict[str, Any], tf32: bool = False, many_blocks: int = 2048) -> None:
        super().__init__(kwargs, tf32)
        p = self.params
        self.out = torch.empty(self.q.shape if p.full else self.k.shape, dtype=self.k.dtype)
        p.out = self._map(self.out, "out")
        lse = np.empty((p.batch, p.windows_y * p.windows_x, p.heads, p.nq), np.float32)
        p.lse = self.arena.add(lse, "out")
        self.plan = _C.window_attention_cuda_plan(bytes(p), many_blocks)

    def run(self, module: ptxsim.Module, **options: Any) -> ptxsim.Result:
        """Launches as the package does; raises what ptxsim finds."""
        plan = self.plan
        name = f"{MATHS[self.kind]}ELi{plan['dim']}ELi{plan['pack']}E"
        return self._launch(module, name, plan["forward"], plan["bytes"], **options)

    def result(self) -> Tensor:
        return self._read(self.params.out.data, self.out)

    def lse(self) -> Tensor:
        return torch.from_numpy(np.array(self.arena.get(self.params.lse)))


class BackwardCall(Arguments):
    """A backward pass: all gradients that the arguments ask for by requires_grad."""

    def __init__(
        self,
        kwargs: dict[str, Any],
        grad_out: Tensor,
        lse: Tensor,
        tf32: bool = False,
        many_blocks: int = 1024,
    ) -> None:
        super().__init__({k: x.detach() if isinstance(x, Tensor) else x for k, x in kwargs.items()})
        p, g = self.params, self.params.grad
        p.tf32 = tf32
        p.lse = self._floats(lse)
        g.grad_out = self._map(grad_out.contiguous())
        self.main = {"q": self.q, "k": self.k, "v": self.k}
        for name, x in self.main.items():
            setattr(g, f"d{name}", self._map(torch.empty_like(x), "out"))
        wanted = leaves(kwargs).items()
        self.sides = {name: x.float() for name, x in wanted if name not in self.main}
        for name, x in self.sides.items():
            setattr(g, SIDE_FIELDS[name], self.arena.add(np.empty(x.shape, np.float32), "out"))
        self.plan = _C.window_attention_cuda_backward_plan(bytes(p), many_blocks)
        self.workspace = self.arena.add(np.empty(self.plan["workspace"], np.float32), "out")

    def run(self, module: ptxsim.Module, sums: ptxsim.Module | None = None, **options: Any) -> None:
        """Launches as the package does, sums from a module of their own if one is given; raises
        what ptxsim finds.
        """
        sums = module if sums is None else sums
        plan, math = self.plan, MATHS[self.kind]
        assert self.workspace is not None
        space = np.uint64(self.workspace)
        size = f"{math}ELi{plan['dim']}E"
        if not plan["one_kernel"]:
            name = f"backward_queriesINS0_{len(math)}{size}"
            self._launch(module, name, plan["queries"], plan["bytes"], space, **options)
        name = f"{size}Li{plan['pack']}ELb{plan['one_kernel']:d}E"
        self._launch(module, name, plan["keys"], plan["bytes"], space, **options)
        for which, launch in enumerate(plan["sums"]):
            args = (plan["bytes"], space, np.int32(which))
            self._launch(sums, "window_attention_sum", launch, *args, **options)
        if plan["collapse"]["grid"]:
            dense = np.uint64(self.workspace + 4 * plan["dense_bias"])
            self._launch(sums, "collapse", plan["collapse"], dense, **options)

    def results(self) -> dict[str, Tensor]:
        """Gradients by argument."""
        g = self.params.grad
        found = {name: self._read(getattr(g, f"d{name}").data, x) for name, x in self.main.items()}
        for name, x in self.sides.items():
            found[name] = self._read(getattr(g, SIDE_FIELDS[name]), x)
        return found
