# SPDX-License-Identifier: Apache-2.0
"""What `fastbb.ops.window_attention` means, in plain PyTorch.

This file is the definition of the operator, the oracle of its tests, the baseline of its
benchmarks and the path taken when fused kernels are switched off. It is written to be read:
every step materialises what the kernel folds into addressing.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

L2NORM_EPS = 1e-12


def window_partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """`[B, H, W, h, d]` with H, W multiples of the window -> `[B, nW, h, wh*ww, d]`."""
    B, H, W, h, d = x.shape
    wh, ww = window
    x = x.reshape(B, H // wh, wh, W // ww, ww, h, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, (H // wh) * (W // ww), h, wh * ww, d)


def window_reverse(x: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Inverse of `window_partition`; `size` is the (padded) map size."""
    B, _, h, _, d = x.shape
    wh, ww = window
    H, W = size
    x = x.reshape(B, H // wh, W // ww, h, wh, ww, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, h, d)


def relative_position_index(window: tuple[int, int]) -> Tensor:
    """`[N, N]` rows of the bias table: (ih-jh+wh-1)*(2ww-1) + (iw-jw+ww-1) for query i, key j."""
    wh, ww = window
    y = torch.arange(wh).repeat_interleave(ww)
    x = torch.arange(ww).repeat(wh)
    dy = y[:, None] - y[None, :] + wh - 1
    dx = x[:, None] - x[None, :] + ww - 1
    return dy * (2 * ww - 1) + dx


def swin_mask(
    padded: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], value: float
) -> Tensor:
    """`[nW, N, N]` additive mask of shifted windows on the padded, rolled map (Swin, section 3.2).

    An axis coordinate p of length L lies in region 0 (p < L-w), 1 (p < L-s) or 2; pairs of tokens
    from different regions were not neighbours before the roll and get `value`.
    """
    axes = []
    for size, w, s in zip(padded, window, shift, strict=True):
        p = torch.arange(size)
        axes.append((p >= size - w).long() + (p >= size - s).long())
    region = axes[0][:, None] * 3 + axes[1][None, :]
    tokens = window_partition(region[None, :, :, None, None], window)[0, :, 0, :, 0]
    apart = tokens[:, :, None] != tokens[:, None, :]
    return torch.zeros(apart.shape).masked_fill(apart, value)


def _to_windows(
    x: Tensor, window: tuple[int, int], shift: tuple[int, int], pad_mode: str, pad: Tensor | None
) -> Tensor:
    """Pads and rolls a map in the order of `pad_mode`, then cuts it into windows."""
    _, H, W, h, d = x.shape
    bottom, right = -H % window[0], -W % window[1]

    def pad_map(x: Tensor) -> Tensor:
        if pad is None:
            return F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom))
        fill = pad.reshape(h, d).to(x.dtype)
        real = F.pad(x.new_ones(H, W, dtype=torch.bool), (0, right, 0, bottom))
        padded = F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom))
        return torch.where(real[:, :, None, None], padded, fill)

    def roll_map(x: Tensor) -> Tensor:
        return torch.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x

    steps = (roll_map, pad_map) if pad_mode == "roll_then_pad" else (pad_map, roll_map)
    for step in steps:
        x = step(x)
    return window_partition(x, window)


def _from_windows(
    x: Tensor,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    pad_mode: str,
) -> Tensor:
    """Puts window outputs back to their un-rolled, un-padded places: `[B, H, W, h, d]`."""
    H, W = size
    x = window_reverse(x, window, (H + -H % window[0], W + -W % window[1]))
    if pad_mode == "roll_then_pad":
        x = x[:, :H, :W]
    if any(shift):
        x = torch.roll(x, shift, (1, 2))
    return x[:, :H, :W]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int, int] | None = None,
    shift: tuple[int, int] = (0, 0),
    pad_mode: str = "none",
    k_pad: Tensor | None = None,
    v_pad: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    swin_mask_value: float | None = None,
    scale: float | Tensor | None = None,
    qk_l2norm: bool = False,
) -> Tensor:
    """Reference of `fastbb.ops.window_attention`; see there for shapes and meaning.

    Computes in the widest dtype of its inputs (at least float32), under autocast too, and returns
    q's dtype.
    """
    device = q.device.type
    autocast = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        return _window_attention(
            q,
            k,
            v,
            window,
            shift,
            pad_mode,
            k_pad,
            v_pad,
            bias_table,
            bias,
            mask,
            swin_mask_value,
            scale,
            qk_l2norm,
        )


def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int] | None,
    shift: tuple[int, int],
    pad_mode: str,
    k_pad: Tensor | None,
    v_pad: Tensor | None,
    bias_table: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    swin_mask_value: float | None,
    scale: float | Tensor | None,
    qk_l2norm: bool,
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    h, d = k.shape[-2:]
    full = k.dim() == 4
    if full:
        qw, kw, vw = (x.transpose(1, 2).unsqueeze(1).to(dtype) for x in (q, k, v))
    else:
        assert window is not None
        kw = _to_windows(k, window, shift, pad_mode, k_pad).to(dtype)
        vw = _to_windows(v, window, shift, pad_mode, v_pad).to(dtype)
        if q.dim() == 4:
            qw = q.transpose(1, 2).unsqueeze(1).expand(-1, kw.shape[1], -1, -1, -1).to(dtype)
        else:
            qw = _to_windows(q, window, shift, pad_mode, None).to(dtype)

    if qk_l2norm:
        qw = F.normalize(qw, dim=-1, eps=L2NORM_EPS)
        kw = F.normalize(kw, dim=-1, eps=L2NORM_EPS)
    if scale is None:
        scale = d**-0.5
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).reshape(h, 1, 1)
    logits = (qw * scale) @ kw.transpose(-2, -1)

    if bias_table is not None:
        assert window is not None
        index = relative_position_index(window).to(bias_table.device)
        logits = logits + bias_table.to(dtype)[index].permute(2, 0, 1)
    if bias is not None:
        logits = logits + bias.to(dtype)
    if swin_mask_value is not None:
        assert window is not None
        padded = (k.shape[1] + -k.shape[1] % window[0], k.shape[2] + -k.shape[2] % window[1])
        regions = swin_mask(padded, window, shift, swin_mask_value).to(logits.device, dtype)
        logits = logits + regions[:, None]
    if mask is not None:
        # Problem i (window i of an image; in the full domain, image i) uses mask[i % len(mask)].
        problems = logits.flatten(0, 1) if full else logits
        m = mask.to(dtype)[:, None]
        axis = 0 if full else 1
        m = m.repeat(problems.shape[axis] // mask.shape[0], 1, 1, 1)
        logits = (problems + m).reshape(logits.shape)

    out = logits.softmax(-1) @ vw
    if full:
        return out.squeeze(1).transpose(1, 2).contiguous().to(q.dtype)
    assert window is not None
    out = _from_windows(out, (k.shape[1], k.shape[2]), window, shift, pad_mode)
    return out.contiguous().to(q.dtype)
