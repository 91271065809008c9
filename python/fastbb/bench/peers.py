# SPDX-License-Identifier: Apache-2.0
"""One attention layer without its linear layers, computed by fastbb and by its peers.

Libraries cut the map into windows *before* the qkv projection, so their projection's output is
already windowed; fastbb projects the map and needs no windows. To compare exactly the same layer
with the projections left out on both sides,

- fastbb starts from q, k, v of the map and ends with the map;
- a peer does its work before the projection on x (roll, padding, partition of `[B, H, W, C]`),
  continues from windowed q, k, v that lie ready, and ends with the map. The windowed x is a
  second result (and gets a gradient in backward), so that no compiler can drop that work.

The peers' arithmetic is timm's, step by step (`gcvit.py`, `swin_transformer.py`,
`swin_transformer_v2.py`, `pvt_v2.py` of timm 1.0.31, Apache-2.0): the bias matrix is gathered from
its table in every call; masks are prepared outside, as timm keeps them in buffers. Swin v2's
table is finished on both sides, without the small MLP that timm runs in every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbb.bench.shapes import AttentionShape
from fastbb.ops import window_attention
from fastbb.reference.window_attention import (
    relative_position_index,
    swin_mask,
    window_partition,
    window_reverse,
)

Forward = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class LayerInputs:
    """Tensors of one layer, in the layouts that fastbb and the peers start from."""

    x: Tensor
    """`[B, H, W, C]`, what the layer's projection would get."""
    q: Tensor | None
    """`[B, N, h, d]` (global) or `[B, Nq, h, d]` (full domain); None when it is part of qkv."""
    qkv: Tensor
    """`[B, H, W, 3, h, d]`; without q `[B, H, W, 2, h, d]` or `[B, Nk, 2, h, d]` (full domain)."""
    windowed: Tensor
    """The same values per window: `[B*nW, N, 3 or 2, h, d]`; qkv itself in the full domain."""
    table: Tensor | None
    """`[(2wh-1)*(2ww-1), h]`"""
    index: Tensor | None
    """`[N*N]` rows of the table."""
    mask: Tensor | None
    """`[nW, N, N]` additive mask of shifted windows."""
    scale: Tensor | None
    """`[h]` factors of cosine attention; None: d**-0.5."""
    pads: Tensor | None
    """`[3, h, d]`: q, k, v of a padded token (the projection's bias); None: nothing is padded."""

    def to(self, device: torch.device) -> LayerInputs:
        """The same on another device."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: x.to(device) for name, x in given.items() if x is not None}
        return dataclasses.replace(self, **moved)


def make_inputs(
    shape: AttentionShape, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LayerInputs:
    """Random inputs of a layer. Logits have a standard deviation near 1, biases of 0.5."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    (H, W), h, d = shape.map_size, shape.heads, shape.head_dim
    x = normal(batch, H, W, h * d)
    if shape.window is None:
        kv = normal(batch, shape.keys, 2, h, d)
        return LayerInputs(x, normal(batch, H * W, h, d), kv, kv, *(None,) * 5)
    wh, ww = shape.window
    shared_q = shape.kind == "global"
    parts = 2 if shared_q else 3
    qkv = normal(batch, H, W, parts, h, d)
    padded = shape.padded_size != shape.map_size
    pads = normal(3, h, d) if padded else None
    cosine = shape.kind.startswith("cosine")
    return LayerInputs(
        x=x,
        q=normal(batch, wh * ww, h, d) if shared_q else None,
        qkv=qkv,
        windowed=to_windows(qkv, shape, None if pads is None else pads[-parts:]),
        table=normal((2 * wh - 1) * (2 * ww - 1), h) * 0.5,
        index=relative_position_index(shape.window).flatten(),
        mask=swin_mask(shape.padded_size, shape.window, shape.shift, -100.0).to(dtype)
        if any(shape.shift)
        else None,
        scale=torch.linspace(5.0, 20.0, h).to(dtype) if cosine else None,
        pads=pads,
    )


def to_windows(qkv: Tensor, shape: AttentionShape, pads: Tensor | None) -> Tensor:
    """`[B, H, W, n, h, d]` -> `[B*nW, N, n, h, d]` in timm's order: roll, pad, partition."""
    assert shape.window is not None
    B, H, W, n, h, d = qkv.shape
    sh, sw = shape.shift
    rolled = torch.roll(qkv, (-sh, -sw), (1, 2))
    if pads is not None:
        Hp, Wp = shape.padded_size
        full = pads.expand(B, Hp, Wp, n, h, d).clone()
        full[:, :H, :W] = rolled
        rolled = full
    windows = window_partition(rolled.flatten(3, 4), shape.window)
    return windows.flatten(0, 1).transpose(1, 2).unflatten(2, (n, h)).contiguous()


def fastbb_layer(shape: AttentionShape, inputs: LayerInputs) -> Tensor:
    """The fused operator from map to map: `[B, H, W, C]`."""
    q, kv = (inputs.qkv, None) if inputs.q is None else (inputs.q, inputs.qkv)
    if shape.window is None:
        return window_attention(q, kv, impl="fused").unflatten(1, shape.map_size).flatten(3)
    out = window_attention(
        q,
        kv,
        window=shape.window,
        shift=shape.shift,
        pad_mode="roll_then_pad" if inputs.pads is not None else "none",
        k_pad=None if inputs.pads is None else inputs.pads[1],
        v_pad=None if inputs.pads is None else inputs.pads[2],
        bias_table=inputs.table,
        mask="swin" if any(shape.shift) else None,
        scale=inputs.scale,
        qk_l2norm=inputs.scale is not None,
        impl="fused",
    )
    return out.flatten(3)


def eager_layer(shape: AttentionShape, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """timm's unfused path: (map `[B, H, W, C]`, windowed x)."""
    x_windows = partition_x(shape, inputs.x)
    q, k, v = _windowed_heads(shape, inputs)
    if inputs.scale is not None:
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * inputs.scale[:, None, None]
    else:
        attn = (q * shape.head_dim**-0.5) @ k.transpose(-2, -1)
    if inputs.table is not None:
        attn = attn + gather_bias(inputs)
    if inputs.mask is not None:
        windows, tokens = inputs.mask.shape[:2]
        attn = attn.view(-1, windows, shape.heads, tokens, tokens)
        attn = (attn + inputs.mask[:, None]).view(-1, shape.heads, tokens, tokens)
    return to_map(shape, attn.softmax(-1) @ v), x_windows


def sdpa_layer(
    shape: AttentionShape, inputs: LayerInputs, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """timm's fused path: `scaled_dot_product_attention` with bias and mask as one dense mask.

    With `bias` (from `dense_bias`) the mask is not rebuilt in every call, which timm does not do.
    """
    x_windows = partition_x(shape, inputs.x)
    q, k, v, scale = scaled_heads(shape, inputs)
    if bias is None:
        bias = dense_bias(shape, inputs)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return to_map(shape, out), x_windows


def gather_bias(inputs: LayerInputs) -> Tensor:
    """`[1, h, N, N]` from the table."""
    assert inputs.table is not None and inputs.index is not None
    tokens = round(inputs.index.numel() ** 0.5)
    rows = inputs.table[inputs.index].view(tokens, tokens, -1)
    return rows.permute(2, 0, 1).contiguous().unsqueeze(0)


def dense_bias(shape: AttentionShape, inputs: LayerInputs) -> Tensor | None:
    """Bias plus mask as SDPA wants them: `[1, h, N, N]`, or `[B*nW, h, N, N]` with a mask."""
    if inputs.table is None:
        return None
    bias = gather_bias(inputs)
    if inputs.mask is None:
        return bias
    windows, tokens = inputs.mask.shape[:2]
    mask = inputs.mask.view(1, windows, 1, tokens, tokens)
    mask = mask.expand(inputs.x.shape[0], -1, shape.heads, -1, -1)
    return bias + mask.reshape(-1, shape.heads, tokens, tokens)


def partition_x(shape: AttentionShape, x: Tensor) -> Tensor:
    """What a library does to x before its projection: `[B*nW, N, C]`."""
    if shape.window is None:
        return x
    if any(shape.shift):
        x = torch.roll(x, (-shape.shift[0], -shape.shift[1]), (1, 2))
    (H, W), (Hp, Wp) = shape.map_size, shape.padded_size
    if (Hp, Wp) != (H, W):
        x = F.pad(x, (0, 0, 0, Wp - W, 0, Hp - H))
    B, (wh, ww), C = x.shape[0], shape.window, x.shape[-1]
    x = x.view(B, Hp // wh, wh, Wp // ww, ww, C).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(-1, wh * ww, C)


def _windowed_heads(shape: AttentionShape, inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views `[problems, h, tokens, d]` of the windowed projection."""
    *own_q, k, v = inputs.windowed.permute(2, 0, 3, 1, 4).unbind(0)
    if own_q:
        return own_q[0], k, v
    assert inputs.q is not None
    q = inputs.q
    if shape.kind == "global":
        q = q.repeat_interleave(shape.windows, dim=0)
    return q.transpose(1, 2), k, v


def scaled_heads(
    shape: AttentionShape, inputs: LayerInputs
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """q, k, v `[problems, h, tokens, d]` and the scale of their logits (None: d**-0.5), for kernels
    that know no factors per head: those of cosine attention are in q.
    """
    q, k, v = _windowed_heads(shape, inputs)
    if inputs.scale is None:
        return q, k, v, None
    return F.normalize(q, dim=-1) * inputs.scale[:, None, None], F.normalize(k, dim=-1), v, 1.0


def to_map(shape: AttentionShape, out: Tensor) -> Tensor:
    """`[problems, h, tokens, d]` -> `[B, H, W, C]`: join heads, reverse windows, crop, roll."""
    out = out.transpose(1, 2).flatten(2)
    H, W = shape.map_size
    if shape.window is None:
        return out.unflatten(1, (H, W))
    windows = out.unflatten(0, (-1, shape.windows))[:, :, None]
    out = window_reverse(windows, shape.window, shape.padded_size).flatten(3)
    out = out[:, :H, :W]
    if any(shape.shift):
        out = torch.roll(out, shape.shift, (1, 2))
    return out
