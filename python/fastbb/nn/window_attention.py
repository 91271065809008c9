# SPDX-License-Identifier: Apache-2.0
"""Attention modules on channels-last maps: `[B, H, W, C]` -> `[B, H, W, C]`.

Each projects, calls `fastbb.ops.window_attention` on views of the projection and projects back:
no window partition, roll, padding or bias matrix is materialised. Parameter names are timm's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb.nn.conv import conv
from fastbb.ops._checks import fail, pair
from fastbb.ops.window_attention import window_attention

PadMode = Literal["pad_then_roll", "roll_then_pad"]
SWIN_MASK_VALUE = -100.0


def _window(name: str, window_size: int | Sequence[int]) -> tuple[int, int]:
    window = pair(name, "window_size", window_size)
    if min(window) < 1:
        fail(name, "window_size", "must be at least 1", window_size)
    return window


def _shift(name: str, shift: int | Sequence[int], window: tuple[int, int]) -> tuple[int, int]:
    both = pair(name, "shift", shift)
    if not all(0 <= s < w for s, w in zip(both, window, strict=True)):
        fail(name, "shift", f"must be in [0, window_size {window})", shift)
    return both


def _pad_mode(name: str, pad_mode: PadMode) -> PadMode:
    if pad_mode not in get_args(PadMode):
        fail(name, "pad_mode", f"must be one of {get_args(PadMode)}", repr(pad_mode))
    return pad_mode


def _check_map(name: str, x: Tensor, dim: int) -> None:
    if x.dim() != 4 or x.shape[-1] != dim:
        fail(name, "x", f"must be [B, H, W, {dim}]", list(x.shape))


def _active_shift(
    shift: tuple[int, int], window: tuple[int, int], size: Sequence[int], pad_mode: str
) -> tuple[int, int]:
    """The shift in force on a map: torchvision's order drops it on axes with a single window."""
    if pad_mode != "pad_then_roll":
        return shift
    return (
        shift[0] if size[0] > window[0] else 0,
        shift[1] if size[1] > window[1] else 0,
    )


def _head_dim(name: str, dim: int, num_heads: int) -> int:
    if num_heads < 1 or dim % num_heads != 0:
        fail(name, "num_heads", f"must divide dim {dim}", num_heads)
    return dim // num_heads


class _BiasTable(nn.Module):
    """Holds `relative_position_bias_table` `[(2wh-1)*(2ww-1), h]` under timm's name."""

    def __init__(self, window: tuple[int, int], num_heads: int, **factory: Any) -> None:
        super().__init__()
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads, **factory))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)


class WindowAttention(_BiasTable):
    """(Shifted) window attention with relative position bias: Swin v1 (Liu et al. 2021).

    Args:
        dim: channels C.
        num_heads: heads h; C / h <= 128 for the fused kernel.
        window_size: (wh, ww) or one int.
        shift: cyclic shift, 0 <= s < w; with a shift the Swin mask applies.
        pad_mode: order of padding and roll for maps that the window does not divide:
            `"roll_then_pad"` is timm's, `"pad_then_roll"` torchvision's, which also drops the
            shift on axes where the map has a single window.

    The map is the normalised input; its padding (zeros) becomes the projection's bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift: int | Sequence[int] = 0,
        pad_mode: PadMode = "roll_then_pad",
        qkv_bias: bool = True,
        **factory: Any,
    ) -> None:
        self.window_size = _window("WindowAttention", window_size)
        super().__init__(self.window_size, num_heads, **factory)
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = _head_dim("WindowAttention", dim, num_heads)
        self.shift = _shift("WindowAttention", shift, self.window_size)
        self.pad_mode = _pad_mode("WindowAttention", pad_mode)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        _check_map("WindowAttention", x, self.dim)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        k_pad, v_pad = (None, None) if self.qkv.bias is None else self.qkv.bias.chunk(3)[1:]
        shift = _active_shift(self.shift, self.window_size, x.shape[1:3], self.pad_mode)
        x = window_attention(
            qkv,
            window=self.window_size,
            shift=shift,
            pad_mode=self.pad_mode,
            k_pad=k_pad,
            v_pad=v_pad,
            bias_table=self.relative_position_bias_table,
            mask="swin" if any(shift) else None,
            mask_value=SWIN_MASK_VALUE,
        )
        return self.proj(x.flatten(3))

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift={self.shift}, pad_mode={self.pad_mode!r}"


class WindowAttentionV2(nn.Module):
    """Cosine window attention with a continuous position bias: Swin v2 (Liu et al. 2022).

    logits = min(exp(logit_scale), 100) cos(q, k) + 16 sigmoid(cpb_mlp(offsets)). Keys have no bias.

    Args: as `WindowAttention`; `pretrained_window_size` is the window whose offsets the bias
    network was trained on, where it differs.
    """

    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift: int | Sequence[int] = 0,
        pad_mode: PadMode = "roll_then_pad",
        pretrained_window_size: int = 0,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = _head_dim("WindowAttentionV2", dim, num_heads)
        self.window_size = _window("WindowAttentionV2", window_size)
        self.shift = _shift("WindowAttentionV2", shift, self.window_size)
        self.pad_mode = _pad_mode("WindowAttentionV2", pad_mode)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0), **factory))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512, **factory),
            nn.ReLU(),
            nn.Linear(512, num_heads, bias=False, **factory),
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.q_bias = nn.Parameter(torch.zeros(dim, **factory))
        self.v_bias = nn.Parameter(torch.zeros(dim, **factory))
        self.proj = nn.Linear(dim, dim, **factory)
        table = self._coordinates(pretrained_window_size).to(**factory)
        self.register_buffer("relative_coords_table", table, persistent=False)

    def _coordinates(self, pretrained_window: int) -> Tensor:
        """`[(2wh-1)*(2ww-1), 2]` log-spaced offsets: sign(t) log2(1+|t|) / 3, t = 8 delta/(w-1)."""
        axes = []
        for w in self.window_size:
            offsets = torch.arange(1 - w, w, dtype=torch.float32)
            axes.append(8.0 * offsets / max((pretrained_window or w) - 1, 1))
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        return grid.sign() * torch.log2(1.0 + grid.abs()) / 3.0

    def bias_table(self) -> Tensor:
        """`[(2wh-1)*(2ww-1), h]` finished bias table."""
        return 16.0 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table))

    def forward(self, x: Tensor) -> Tensor:
        _check_map("WindowAttentionV2", x, self.dim)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        shift = _active_shift(self.shift, self.window_size, x.shape[1:3], self.pad_mode)
        x = window_attention(
            qkv.unflatten(-1, (3, self.num_heads, self.head_dim)),
            window=self.window_size,
            shift=shift,
            pad_mode=self.pad_mode,
            v_pad=self.v_bias,
            bias_table=self.bias_table(),
            mask="swin" if any(shift) else None,
            mask_value=SWIN_MASK_VALUE,
            scale=self.logit_scale.clamp(max=math.log(100.0)).exp(),
            qk_l2norm=True,
        )
        return self.proj(x.flatten(3))

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift={self.shift}, pad_mode={self.pad_mode!r}"


class GlobalWindowAttention(nn.Module):
    """GC ViT's window attention (Hatamizadeh et al. 2023).

    `use_global=True`: only keys and values come from the windows; the queries of every window are
    the image's global query. `use_global=False` is its local counterpart with the same parameter
    names. Maps that the window does not divide are padded after the norm, as in detection.

    Args:
        dim, num_heads, window_size: as in `WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        use_global: bool = True,
        qkv_bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = _head_dim("GlobalWindowAttention", dim, num_heads)
        self.window_size = _window("GlobalWindowAttention", window_size)
        self.use_global = use_global
        self.rel_pos = _BiasTable(self.window_size, num_heads, **factory)
        self.qkv = nn.Linear(dim, (2 if use_global else 3) * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """x `[B, H, W, C]`, q_global `[B, wh, ww, C]` (needed with `use_global`)."""
        _check_map("GlobalWindowAttention", x, self.dim)
        heads = (self.num_heads, self.head_dim)
        packed = self.qkv(x).unflatten(-1, (-1, *heads))
        q, kv = packed, None
        if self.use_global:
            if q_global is None:
                fail("GlobalWindowAttention", "q_global", "must be given", None)
            q, kv = q_global.flatten(1, 2).unflatten(-1, heads).to(packed.dtype), packed
        bias = self.qkv.bias
        k_pad, v_pad = (None, None) if bias is None else bias.view(-1, x.shape[-1])[-2:]
        x = window_attention(
            q,
            kv,
            window=self.window_size,
            pad_mode="pad_then_roll",
            k_pad=k_pad,
            v_pad=v_pad,
            bias_table=self.rel_pos.relative_position_bias_table,
        )
        return self.proj(x.flatten(3))

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, use_global={self.use_global}"


class SpatialReductionAttention(nn.Module):
    """Attention of all tokens to a spatially reduced map: PVT v2 (Wang et al. 2022).

    Args:
        sr_ratio: side of the patches that one key stands for (1: no reduction).
        linear: reduce to 7 x 7 by average pooling instead (the "li" variants).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        linear: bool = False,
        qkv_bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = _head_dim("SpatialReductionAttention", dim, num_heads)
        if sr_ratio < 1:
            fail("SpatialReductionAttention", "sr_ratio", "must be at least 1", sr_ratio)
        self.linear = linear
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.sr: nn.Module | None = None
        self.norm: nn.Module | None = None
        if linear or sr_ratio > 1:
            kernel = 1 if linear else sr_ratio
            self.sr = nn.Conv2d(dim, dim, kernel, kernel, **factory)
            self.norm = nn.LayerNorm(dim, **factory)

    def _reduce(self, x: Tensor) -> Tensor:
        if self.sr is None or self.norm is None:
            return x
        if self.linear:
            x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 7).permute(0, 2, 3, 1)
            return F.gelu(self.norm(conv(self.sr, x)))
        return self.norm(conv(self.sr, x))

    def forward(self, x: Tensor) -> Tensor:
        _check_map("SpatialReductionAttention", x, self.dim)
        heads = (self.num_heads, self.head_dim)
        q = self.q(x).flatten(1, 2).unflatten(-1, heads)
        kv = self.kv(self._reduce(x)).flatten(1, 2).unflatten(-1, (2, *heads))
        out = window_attention(q, kv)
        return self.proj(out.flatten(2)).view(x.shape)
