# SPDX-License-Identifier: Apache-2.0
"""Windowed, shifted, global-query and spatial-reduction attention as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastbb import reference
from fastbb.ops._checks import (
    FLOAT_DTYPES,
    autocast_dtype,
    check_bool,
    check_float,
    check_same,
    check_shape,
    check_tensor,
    fail,
    kernel_reasons,
    last_dim_contiguous,
    pair,
    use_kernel,
)
from fastbb.ops._cuda import tf32_allowed

OP = "window_attention"
PAD_MODES = ("none", "pad_then_roll", "roll_then_pad")
MAX_HEAD_DIM = 128
# Token indices inside a window, a map or a key sequence are 32-bit in the kernels.
MAX_TOKENS = 2**31 - 1
# A 256 x 256 window; a larger one is a mistake whose logits no machine could compute.
MAX_WINDOW_TOKENS = 2**16
_SIDE_DTYPES = (*FLOAT_DTYPES, torch.float64)


def window_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    window: int | Sequence[int] | None = None,
    shift: int | Sequence[int] = 0,
    pad_mode: Literal["none", "pad_then_roll", "roll_then_pad"] = "none",
    k_pad: Tensor | None = None,
    v_pad: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | Literal["swin"] | None = None,
    mask_value: float = -100.0,
    scale: float | Tensor | None = None,
    qk_l2norm: bool = False,
    impl: Literal["auto", "fused", "reference"] = "auto",
) -> Tensor:
    """softmax(scale * q k^T + bias + mask) v inside windows of a map, or over the whole sequence.

    Letters: B images, H x W map, h heads, d head dim, window (wh, ww), N = wh*ww tokens,
    nW windows per image in row-major order. `reference.window_attention` is the definition.

    **Window domain** (k is 5-D): k, v `[B, H, W, h, d]`. q is `[B, H, W, h, d]` (local
    attention: Swin, GC ViT), or `[B, N, h, d]`: one set of queries per image that all its
    windows share (GC ViT's global query). Result `[B, H, W, h, d]`. Partition, roll, padding,
    reverse and crop happen in the addressing; no window tensor exists.

    **Full domain** (k is 4-D, `window=None`): q `[B, Nq, h, d]`, k, v `[B, Nk, h, d]` (PVT's
    spatial reduction). Result `[B, Nq, h, d]`.

    **Packed**: without `v`, k holds keys and values, `[B, H, W, 2, h, d]`; without `k` too, q holds
    all three, `[B, H, W, 3, h, d]` (full domain: `[B, N, 2 or 3, h, d]`). These are the outputs of
    one projection, unflattened. Their gradients come packed as well, so training copies nothing.

    Tensors may be any strided views whose last dimension is contiguous; others are copied.

    Args:
        window: (wh, ww) or one int for both.
        shift: cyclic shift (sh, sw), 0 <= s < w: rolled[p] = x[(p + s) mod L]. The result is
            rolled back. Dropping the shift on one-window axes is the caller's business, as
            libraries disagree about it.
        pad_mode: how a map that the window does not divide is completed on the right and bottom:
            `"none"` refuses such maps; `"pad_then_roll"` is the order of torchvision, mmdetection
            and Hugging Face; `"roll_then_pad"` that of timm.
        k_pad, v_pad: `[h*d]` or `[h, d]` key and value of a padded token (default zeros), rounded
            to k's dtype. Padded tokens are attended to, as in the libraries above.
        bias_table: `[(2wh-1)*(2ww-1), h]` relative position bias, row
            (ih-jh+wh-1)*(2ww-1) + (iw-jw+ww-1) for query i and key j (Swin, GC ViT).
        bias: `[h, Nq, Nk]` dense bias, instead of `bias_table`.
        mask: `"swin"` for the additive mask of shifted windows, computed from indices; or an
            additive `[nM, Nq, Nk]` tensor, where window i of each image (full domain: image i)
            uses mask[i mod nM]. Masks are constants: they get no gradient.
        mask_value: value that `"swin"` adds to pairs which were not neighbours before the roll.
        scale: logit factor, a float or a per-head tensor `[h]` or `[h, 1, 1]` (Swin v2's tau).
            Default d**-0.5.
        qk_l2norm: L2-normalise q and k rows first (eps 1e-12; Swin v2's cosine attention).
        impl: `"fused"` runs the kernel or raises, `"reference"` runs plain PyTorch, `"auto"`
            takes the kernel when `can_run` finds no reason against it.

    dtypes: q, k, v float32, bfloat16 or float16 (one of them, or autocast's; the reference also
    float64); bias, mask and scale any float dtype, used in float32. Logits, softmax and
    sums are float32; float16 and bfloat16 round the result once. CPU kernels of levels with
    BF16 dot products also round the softmax weights to bfloat16 when q, k, v are bfloat16.

    Differentiable in q, k, v, bias_table, bias, scale, k_pad, v_pad; gradients are
    deterministic. NaN and Inf inputs propagate as in softmax(...) @ v.

    Raises: ValueError (shape, device, value), TypeError (type, dtype), NotImplementedError
    (valid, but not in this kernel, with `impl="fused"`).

    Sources: Liu et al. 2021 (Swin), Liu et al. 2022 (Swin v2), Hatamizadeh et al. 2023 (GC ViT),
    Wang et al. 2021 (PVT).
    """
    given = _apply_autocast(q, k, v)
    q, k, v = _views(*given)
    swin = isinstance(mask, str)
    if swin and mask != "swin":
        fail(OP, "mask", 'must be a tensor, "swin" or None', repr(mask))
    size = None if window is None else pair(OP, "window", window)
    offset = pair(OP, "shift", shift)
    dense_mask = None if isinstance(mask, str) else mask
    check_float(OP, "mask_value", mask_value)
    check_bool(OP, "qk_l2norm", qk_l2norm)
    _check(q, k, v, size, offset, pad_mode, k_pad, v_pad, bias_table, bias, dense_mask, swin, scale)
    if use_kernel(OP, impl, can_run(q, k, v)):
        scale_tensor = scale.flatten() if isinstance(scale, Tensor) else None
        factor = scale if isinstance(scale, (int, float)) else k.shape[-1] ** -0.5
        return torch.ops.fastbb.window_attention.default(
            *(None if x is None else last_dim_contiguous(x) for x in given),
            bias_table,
            bias,
            dense_mask,
            scale_tensor,
            None if k_pad is None else k_pad.flatten(),
            None if v_pad is None else v_pad.flatten(),
            [] if size is None else list(size),
            list(offset),
            pad_mode,
            float(mask_value) if swin else None,
            float(factor),
            qk_l2norm,
            k.is_cuda and k.dtype == torch.float32 and tf32_allowed(),
        )[0]
    return reference.window_attention(
        q,
        k,
        v,
        window=size,
        shift=offset,
        pad_mode=pad_mode,
        k_pad=k_pad,
        v_pad=v_pad,
        bias_table=bias_table,
        bias=bias,
        mask=dense_mask,
        swin_mask_value=float(mask_value) if swin else None,
        scale=scale,
        qk_l2norm=qk_l2norm,
    )


def can_run(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Reasons why the fused kernel cannot serve these (valid) tensors; empty when it can."""
    reasons = kernel_reasons(OP, q)
    if k.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head dim {k.shape[-1]} is above {MAX_HEAD_DIM}")
    return reasons


def _apply_autocast(*tensors: Any) -> tuple[Any, ...]:
    """Casts to the autocast dtype, as a matmul would; side inputs keep theirs."""
    dtype = autocast_dtype(tensors[0]) if isinstance(tensors[0], Tensor) else None
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in FLOAT_DTYPES else x for x in tensors
    )


def _views(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """q, k, v as views, however they were given: apart, k and v packed, or all three packed."""
    if v is not None:
        if k is None:
            fail(OP, "k", "must be given with v", None)
        return q, k, v
    if k is not None:
        return (q, *_unpack("k", k, 2))
    return _unpack("q", q, 3)


def _unpack(name: str, packed: Any, parts: int) -> tuple[Any, ...]:
    check_tensor(OP, name, packed, _SIDE_DTYPES)
    if packed.dim() not in (5, 6) or packed.shape[-3] != parts:
        shapes = f"[B, H, W, {parts}, h, d] or [B, N, {parts}, h, d]"
        rest = "k and v are" if parts == 3 else "v is"
        fail(OP, name, f"must be packed {shapes} when {rest} not given", list(packed.shape))
    return packed.unbind(-3)


def _check(
    q: Any,
    k: Any,
    v: Any,
    window: tuple[int, int] | None,
    shift: tuple[int, int],
    pad_mode: str,
    k_pad: Any,
    v_pad: Any,
    bias_table: Any,
    bias: Any,
    mask: Any,
    swin: bool,
    scale: Any,
) -> None:
    """Raises on anything the definition gives no meaning to."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, x, _SIDE_DTYPES)
    check_same(OP, "q", q, "k", k)
    check_same(OP, "v", v, "k", k)
    if pad_mode not in PAD_MODES:
        fail(OP, "pad_mode", f"must be one of {PAD_MODES}", repr(pad_mode))
    if k.dim() == 4:
        nq, nk = _check_full(q, k, v, window, shift, swin, (k_pad, v_pad, bias_table))
        problems = k.shape[0]
    elif k.dim() == 5:
        nq = nk = _check_windows(q, k, v, window, shift, pad_mode)
        assert window is not None
        problems = -(-k.shape[1] // window[0]) * -(-k.shape[2] // window[1])
    else:
        fail(OP, "k", "must be [B, H, W, h, d] or [B, Nk, h, d]", list(k.shape))
    h, d = k.shape[-2:]

    for name, x in (("k_pad", k_pad), ("v_pad", v_pad)):
        if x is not None:
            _check_side(name, x, k)
            if tuple(x.shape) not in ((h * d,), (h, d)):
                fail(OP, name, f"must have shape [h*d] = [{h * d}] or [h, d]", list(x.shape))
    if bias_table is not None:
        _check_side("bias_table", bias_table, k)
        assert window is not None
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        check_shape(OP, "bias_table", bias_table, (rows, h), "[(2wh-1)*(2ww-1), h]")
    if bias is not None:
        _check_side("bias", bias, k)
        check_shape(OP, "bias", bias, (h, nq, nk), "[h, Nq, Nk]")
        if bias_table is not None:
            fail(OP, "bias", "must not be given together with bias_table", "both")
    if mask is not None:
        _check_side("mask", mask, k)
        count = mask.shape[0] if mask.dim() == 3 else 0
        check_shape(OP, "mask", mask, (count, nq, nk), "[nM, Nq, Nk]")
        if count == 0 or (problems % count != 0 and k.shape[0] != 0):
            fail(OP, "mask", f"must have a length nM that divides {problems}", count)
        if mask.requires_grad:
            fail(OP, "mask", "must not require grad; pass it as bias", "requires_grad=True")
    if isinstance(scale, Tensor):
        _check_side("scale", scale, k)
        if tuple(scale.shape) not in ((h,), (h, 1, 1)):
            fail(OP, "scale", f"must be a float or have shape [h] = [{h}]", list(scale.shape))
    elif scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        fail(OP, "scale", "must be a float or a tensor", type(scale).__name__, TypeError)


def _check_side(name: str, x: Any, k: Tensor) -> None:
    check_tensor(OP, name, x, _SIDE_DTYPES)
    if x.device != k.device:
        fail(OP, name, f"must be on k's device {k.device}", x.device)


def _check_head(k: Tensor) -> None:
    if k.shape[-2] < 1 or k.shape[-1] < 1:
        fail(OP, "k", "must have at least one head and one channel", list(k.shape))


def _check_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int] | None,
    shift: tuple[int, int],
    swin: bool,
    window_only: tuple[Any, ...],
) -> tuple[int, int]:
    _check_head(k)
    B, nk, h, d = k.shape
    nq = q.shape[1] if q.dim() == 4 else -1
    check_shape(OP, "q", q, (B, nq, h, d), "[B, Nq, h, d]")
    check_shape(OP, "v", v, k.shape, "[B, Nk, h, d]")
    if nk < 1:
        fail(OP, "k", "must have at least one token", list(k.shape))
    if window is not None or any(s != 0 for s in shift) or swin:
        fail(OP, "window, shift and mask='swin'", "need 5-D k and v", list(k.shape))
    if any(x is not None for x in window_only):
        fail(OP, "k_pad, v_pad and bias_table", "need 5-D k and v", list(k.shape))
    if max(nq, nk) > MAX_TOKENS:
        fail(OP, "q and k", f"must have at most {MAX_TOKENS} tokens", [nq, nk])
    return nq, nk


def _check_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int] | None,
    shift: tuple[int, int],
    pad_mode: str,
) -> int:
    _check_head(k)
    if window is None:
        fail(OP, "window", "must be given when k is [B, H, W, h, d]", None)
    assert window is not None
    if window[0] < 1 or window[1] < 1:
        fail(OP, "window", "must be at least 1 on both axes", window)
    if not (0 <= shift[0] < window[0] and 0 <= shift[1] < window[1]):
        fail(OP, "shift", f"must satisfy 0 <= shift < window {window}", shift)
    B, H, W, h, d = k.shape
    n = window[0] * window[1]
    if n > MAX_WINDOW_TOKENS:
        fail(OP, "window", f"must have at most {MAX_WINDOW_TOKENS} tokens", window)
    if (H + window[0]) * (W + window[1]) > MAX_TOKENS:
        fail(OP, "k", f"must have a padded map of at most {MAX_TOKENS} tokens", list(k.shape))
    if H < 1 or W < 1:
        fail(OP, "k", "must have a map of at least 1 x 1", list(k.shape))
    check_shape(OP, "v", v, k.shape, "[B, H, W, h, d]")
    if q.dim() == 4:
        check_shape(OP, "q", q, (B, n, h, d), "[B, wh*ww, h, d]")
    else:
        check_shape(OP, "q", q, k.shape, "[B, H, W, h, d]")
    if pad_mode == "none" and (H % window[0] != 0 or W % window[1] != 0):
        fail(OP, "window", f"must divide the map {(H, W)} when pad_mode is 'none'", window)
    return n


def _check_devices(*tensors: Any) -> None:
    """The fake kernels' share of the raw operators' checks: a meta tensor must not stand alone."""
    devices = {str(x.device) for x in tensors if isinstance(x, Tensor)}
    if len(devices) > 1:
        fail(OP, "tensors", "must be on one device", sorted(devices), RuntimeError)


@torch.library.register_fake("fastbb::window_attention")
def _fake(
    q: Tensor, k: Tensor | None, v: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    _check_devices(q, k, v, *args)
    q, k, v = _views(q, k, v)
    window = args[6]
    h = k.shape[-2]
    if k.dim() == 4:
        out = q.new_empty(q.shape)
        lse = q.new_empty((q.shape[0], 1, h, q.shape[1]), dtype=torch.float32)
    else:
        wh, ww = window
        n_windows = ((k.shape[1] + wh - 1) // wh) * ((k.shape[2] + ww - 1) // ww)
        out = k.new_empty(k.shape)
        lse = q.new_empty((k.shape[0], n_windows, h, wh * ww), dtype=torch.float32)
    return out, lse


@torch.library.register_fake("fastbb::window_attention_backward")
def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lse: Tensor,
    bias_table: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale_per_head: Tensor | None,
    k_pad: Tensor | None,
    v_pad: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    _check_devices(grad_out, q, k, v, lse, bias_table, bias, mask, scale_per_head, k_pad, v_pad)
    need_side: list[bool] = rest[-1]
    sides = (bias_table, bias, scale_per_head, k_pad, v_pad)
    nothing = q.new_empty((0,), dtype=torch.float32)
    return (
        *(torch.empty_like(nothing) if x is None else x.new_empty(x.shape) for x in (q, k, v)),
        *(
            nothing.new_empty(x.shape if x is not None and need else (0,))
            for x, need in zip(sides, need_side, strict=True)
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, shift, pad_mode, swin_mask_value, scale, qk_l2norm, tf32 = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors[:3], lse, *tensors[3:])
    ctx.settings = (window, shift, pad_mode, swin_mask_value, scale, qk_l2norm, tf32)


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, lse, table, bias, mask, scale, k_pad, v_pad = ctx.saved_tensors
    sides = (table, bias, scale, k_pad, v_pad)
    positions = (3, 4, 6, 7, 8)
    need_side = [
        x is not None and ctx.needs_input_grad[i] for x, i in zip(sides, positions, strict=True)
    ]
    grads = torch.ops.fastbb.window_attention_backward.default(
        last_dim_contiguous(grad_out),
        *(q, k, v, lse, table, bias, mask, scale, k_pad, v_pad),
        *ctx.settings,
        need_side,
    )
    side_grads = [
        g.to(x.dtype) if need else None
        for g, x, need in zip(grads[3:], sides, need_side, strict=True)
    ]
    dtable, dbias, dscale, dk_pad, dv_pad = side_grads
    dq, dk, dv = (g if x is not None else None for g, x in zip(grads, (q, k, v), strict=False))
    return (
        *(dq, dk, dv),
        *(dtable, dbias, None, dscale, dk_pad, dv_pad),
        *(None,) * len(ctx.settings),
    )


torch.library.register_autograd("fastbb::window_attention", _backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "window_attention_backward: second derivatives have no kernel; "
        'use impl="reference" where they are needed'
    )


torch.library.register_autograd("fastbb::window_attention_backward", _no_second_derivative)
