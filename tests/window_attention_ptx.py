# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernel of window attention, as PTX, on the arguments of `fastbb.ops`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ptxsim

SOURCE = Path(__file__).resolve().parent / "cuda" / "window_attention.cu"
QUERIES = KEYS = 64  # of a block and of a stage
THREADS = 128
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAD_MODES = {"none": 0, "pad_then_roll": 1, "roll_then_pad": 2}

_POINTER, _LONG, _INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32


class TokenMap(ctypes.Structure):
    """`TokenMap` of window_attention.h."""

    _fields_ = [("data", _POINTER)] + [(x, _LONG) for x in ("image", "row", "column", "head")]


class Params(ctypes.Structure):
    """`WindowAttentionParams`; the test's source asserts its size and some offsets."""

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
        ("gradients", ctypes.c_byte * 240),
    ]


assert ctypes.sizeof(Params) == 576


def _bits(x: Tensor) -> np.ndarray:
    """float32 as it is, 16-bit floats as integers, with the storage's strides kept."""
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy()


class Call:
    """One launch: parameters, global memory, and what comes out."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.arena = ptxsim.Arena()
        self.q, self.k, v = (kwargs[name].contiguous() for name in ("q", "k", "v"))
        p = self.params = Params()
        p.dtype, p.batch = DTYPES[self.k.dtype], self.k.shape[0]
        p.heads, p.head_dim = self.k.shape[-2:]
        p.full = self.k.dim() == 4
        if p.full:
            p.nq, p.nk = self.q.shape[1], self.k.shape[1]
            p.windows_y = p.windows_x = 1
        else:
            self._describe_windows(kwargs)
        self.out = torch.empty(self.q.shape if p.full else self.k.shape, dtype=self.k.dtype)
        p.q, p.k, p.v = (self._map(x) for x in (self.q, self.k, v))
        p.out = self._map(self.out, "out")
        lse = np.empty((p.batch, p.windows_y * p.windows_x, p.heads, p.nq), np.float32)
        p.lse = self.arena.add(lse, "out")
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
        self.table_bytes = 0
        if "bias_table" in kwargs:
            table = kwargs["bias_table"].float().t().flip(1)
            p.table, self.table_bytes = self._floats(table), table.shape[1] * 4
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

    def kernel(self, names: list[str]) -> tuple[str, int]:
        """The instantiation for these arguments, and its padded head dim."""
        dim = next(n for n in (32, 64, 128) if n >= self.params.head_dim)
        math = "HalfMath" if self.k.dtype == torch.float16 else "Bf16Math"
        aligned = self.params.head_dim % 8 == 0
        (name,) = (n for n in names if f"{math}ELi{dim}ELb{aligned:d}E" in n)
        return name, dim

    def run(self, module: ptxsim.Module, **options: Any) -> ptxsim.Result:
        """Launches; raises what ptxsim finds."""
        p = self.params
        name, dim = self.kernel(module.kernels)
        q_blocks = -(-p.nq // QUERIES)
        rows = (QUERIES + 4 * KEYS) * (dim + 8) * 2
        return module.launch(
            name,
            grid=p.batch * p.windows_y * p.windows_x * p.heads * q_blocks,
            block=THREADS,
            args=[p, np.int64(q_blocks)],
            dynamic_shared=rows + (QUERIES + 2 * KEYS) * 4 + self.table_bytes,
            arena=self.arena,
            **options,
        )

    def result(self) -> Tensor:
        bits = np.ascontiguousarray(self.arena.get(self.params.out.data)).view(np.int16)
        return torch.from_numpy(bits).view(self.out.dtype).reshape(self.out.shape)

    def lse(self) -> Tensor:
        return torch.from_numpy(np.array(self.arena.get(self.params.lse)))
