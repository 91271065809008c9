# SPDX-License-Identifier: Apache-2.0
"""The operator against the code of the libraries whose attention it replaces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm.models.gcvit
import timm.models.pvt_v2
import timm.models.swin_transformer
import timm.models.swin_transformer_v2
import torch
import torch.nn.functional as F
import torchvision.models.swin_transformer as torchvision_swin
from torch import Tensor, nn

from fastbb.ops import window_attention
from fastbb.testing import Bounds, assert_close, assert_grad_close
from fastbb.testing.window_attention import CASES, build
from window_oracle import gather_attention

EXACT = Bounds(1e-10, 1e-11, 1e-11)
# Whole layers in float32, two matrix products around the operator.
FLOAT32 = Bounds(1e-4, 2e-5, 1e-5)
IMPLS = pytest.mark.parametrize("impl", ["reference", "fused"])


def prepare(module: nn.Module, impl: str, *inputs: Tensor) -> tuple[Bounds, list[Tensor]]:
    """Random parameters that make every term count; the reference is checked in float64.

    At the default initialisation the bias table and the logits are so small that errors in them
    would hide.
    """
    dtype = torch.float64 if impl == "reference" else torch.float32
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "logit_scale" in name:
                parameter.copy_(torch.linspace(5.0, 2.0, parameter.numel()).view_as(parameter))
            elif parameter.dim() == 2 and "table" not in name:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[1]))
            else:
                parameter.normal_()
    module.to(dtype).eval()
    return EXACT if impl == "reference" else FLOAT32, [x.to(dtype) for x in inputs]


def compare(module: nn.Module, bounds: Bounds, x: Tensor, expected: Tensor, actual: Tensor) -> None:
    """Results, and the gradients of the input and of all parameters."""
    assert_close(actual, expected, bounds)
    grad = torch.randn_like(expected)
    wanted = {"input": x} | dict(module.named_parameters())
    pairs = [
        torch.autograd.grad(y, list(wanted.values()), grad, allow_unused=True)
        for y in (actual, expected)
    ]
    reached = 0
    for name, a, e in zip(wanted, *pairs, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            # A bias of k adds the same to all logits of a query; its exact gradient is 0.
            assert_grad_close(a, e, bounds.plus(bounds, 9), f"gradient of {name}", floor=1e-2)
            reached += 1
    assert reached >= 4


def split(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    return projected.unflatten(-1, (parts, heads, -1)).unbind(-3)


def without_one_window_shift(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> tuple[int, int]:
    return tuple(0 if n <= w else s for n, w, s in zip(size, window, shift, strict=True))  # type: ignore[return-value]


SWIN_SHAPES = pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((14, 21), (7, 7), (3, 3)),
        ((15, 22), (7, 7), (3, 3)),
        ((15, 22), (7, 7), (0, 0)),
        ((9, 14), (7, 7), (3, 3)),
        ((7, 22), (7, 7), (3, 3)),
        ((13, 5), (4, 6), (1, 2)),
        ((11, 10), (4, 3), (0, 1)),
    ],
    ids=str,
)


@IMPLS
@SWIN_SHAPES
def test_torchvision_swin(
    impl: str, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    heads = 3
    layer = torchvision_swin.ShiftedWindowAttention(24, list(window), list(shift), heads)
    bounds, (x,) = prepare(layer, impl, torch.randn(2, *size, 24))
    x.requires_grad_()
    q, k, v = split(layer.qkv(x), 3, heads)
    _, k_pad, v_pad = split(layer.qkv.bias, 3, heads)
    result = window_attention(
        q,
        k,
        v,
        window=window,
        shift=without_one_window_shift(size, window, shift),
        pad_mode="pad_then_roll",
        k_pad=k_pad,
        v_pad=v_pad,
        bias_table=layer.relative_position_bias_table,
        mask="swin",
        impl=impl,
    )
    compare(layer, bounds, x, layer(x), layer.proj(result.flatten(-2)))


@IMPLS
@SWIN_SHAPES
def test_torchvision_swin_v2(
    impl: str, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    heads = 3
    layer = torchvision_swin.ShiftedWindowAttentionV2(24, list(window), list(shift), heads)
    bounds, (x,) = prepare(layer, impl, torch.randn(2, *size, 24))
    x.requires_grad_()
    k_bias_is_zero = torch.ones_like(layer.qkv.bias).view(3, -1)
    k_bias_is_zero[1] = 0
    bias = layer.qkv.bias * k_bias_is_zero.flatten()
    q, k, v = split(F.linear(x, layer.qkv.weight, bias), 3, heads)
    table = 16 * torch.sigmoid(layer.cpb_mlp(layer.relative_coords_table).view(-1, heads))
    result = window_attention(
        q,
        k,
        v,
        window=window,
        shift=without_one_window_shift(size, window, shift),
        pad_mode="pad_then_roll",
        v_pad=split(bias, 3, heads)[2],
        bias_table=table,
        mask="swin",
        scale=layer.logit_scale.clamp(max=math.log(100.0)).exp(),
        qk_l2norm=True,
        impl=impl,
    )
    compare(layer, bounds.plus(bounds, 29), x, layer(x), layer.proj(result.flatten(-2)))


TIMM_SHAPES = pytest.mark.parametrize(
    ("size", "always_partition"),
    [
        ((14, 21), False),
        ((15, 22), False),
        ((9, 14), False),
        ((7, 22), False),
        ((7, 7), False),
        ((7, 22), True),
        ((5, 9), True),
    ],
    ids=str,
)


@IMPLS
@TIMM_SHAPES
def test_timm_swin(impl: str, size: tuple[int, int], always_partition: bool) -> None:
    heads = 3
    block = timm.models.swin_transformer.SwinTransformerBlock(
        24, size, heads, window_size=7, shift_size=3, always_partition=always_partition
    )
    bounds, (x,) = prepare(block, impl, torch.randn(2, *size, 24))
    x.requires_grad_()
    layer = block.attn
    q, k, v = split(layer.qkv(x), 3, heads)
    _, k_pad, v_pad = split(layer.qkv.bias, 3, heads)
    result = window_attention(
        q,
        k,
        v,
        window=block.window_size,
        shift=block.shift_size,
        pad_mode="roll_then_pad",
        k_pad=k_pad,
        v_pad=v_pad,
        bias_table=layer.relative_position_bias_table,
        mask="swin",
        impl=impl,
    )
    compare(layer, bounds, x, block._attn(x), layer.proj(result.flatten(-2)))


@IMPLS
@TIMM_SHAPES
def test_timm_swin_v2(impl: str, size: tuple[int, int], always_partition: bool) -> None:
    heads = 3
    block = timm.models.swin_transformer_v2.SwinTransformerV2Block(
        24, size, heads, window_size=7, shift_size=3, always_partition=always_partition
    )
    bounds, (x,) = prepare(block, impl, torch.randn(2, *size, 24))
    x.requires_grad_()
    layer = block.attn
    bias = torch.cat([layer.q_bias, torch.zeros_like(layer.v_bias), layer.v_bias])
    q, k, v = split(F.linear(x, layer.qkv.weight, bias), 3, heads)
    table = 16 * torch.sigmoid(layer.cpb_mlp(layer.relative_coords_table).view(-1, heads))
    result = window_attention(
        q,
        k,
        v,
        window=block.window_size,
        shift=block.shift_size,
        pad_mode="roll_then_pad",
        v_pad=layer.v_bias,
        bias_table=table,
        mask="swin",
        scale=layer.logit_scale.clamp(max=math.log(100.0)).exp(),
        qk_l2norm=True,
        impl=impl,
    )
    compare(layer, bounds.plus(bounds, 29), x, block._attn(x), layer.proj(result.flatten(-2)))


@IMPLS
@pytest.mark.parametrize("use_global", [False, True])
def test_timm_gcvit(impl: str, use_global: bool) -> None:
    """Batch 3 with six windows: the global query must stay with its image."""
    heads, window, size = 2, (4, 5), (8, 15)
    block = timm.models.gcvit.GlobalContextVitBlock(
        24, size, heads, window_size=window, use_global=use_global
    )
    bounds, (x, q_global) = prepare(
        block, impl, torch.randn(3, *size, 24), torch.randn(3, *window, 24)
    )
    x.requires_grad_()
    layer = block.attn
    if use_global:
        k, v = split(layer.qkv(x), 2, heads)
        q = q_global.flatten(1, 2).unflatten(-1, (heads, -1))
    else:
        q, k, v = split(layer.qkv(x), 3, heads)
    result = window_attention(
        q, k, v, window=window, bias_table=layer.rel_pos.relative_position_bias_table, impl=impl
    )
    expected = block._window_attn(x, q_global if use_global else None)
    compare(layer, bounds, x, expected, layer.proj(result.flatten(-2)))


@IMPLS
@pytest.mark.parametrize("options", [{"sr_ratio": 1}, {"sr_ratio": 2}, {"linear_attn": True}])
def test_timm_pvt_v2(impl: str, options: dict[str, Any]) -> None:
    heads, size = 2, (10, 9)
    layer = timm.models.pvt_v2.Attention(32, heads, **options)
    bounds, (x,) = prepare(layer, impl, torch.randn(3, size[0] * size[1], 32))
    x.requires_grad_()
    reduced = x
    if layer.sr is not None:
        reduced = x.transpose(1, 2).unflatten(-1, size)
        reduced = layer.sr(reduced if layer.pool is None else layer.pool(reduced))
        reduced = layer.norm(reduced.flatten(2).transpose(1, 2))
        reduced = reduced if layer.act is None else layer.act(reduced)
    k, v = split(layer.kv(reduced), 2, heads)
    result = window_attention(layer.q(x).unflatten(-1, (heads, -1)), k, v, impl=impl)
    compare(layer, bounds, x, layer(x, size), layer.proj(result.flatten(-2)))


@IMPLS
@pytest.mark.parametrize(("nq", "nk"), [(5, 5), (17, 3), (3, 70)])
def test_scaled_dot_product_attention(impl: str, nq: int, nk: int) -> None:
    dtype = torch.float64 if impl == "reference" else torch.float32
    q, k, v = (torch.randn(2, n, 3, 16, dtype=dtype) for n in (nq, nk, nk))
    bias = torch.randn(3, nq, nk, dtype=dtype)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias, scale=0.7
    ).transpose(1, 2)
    result = window_attention(q, k, v, bias=bias, scale=0.7, impl=impl)
    assert_close(result, expected, EXACT if impl == "reference" else FLOAT32)


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_gather_oracle(name: str) -> None:
    """Two statements of the definition that share no code agree in float64 on every sample."""
    kwargs = {
        key: x.double() if isinstance(x, Tensor) else x for key, x in build(name).kwargs.items()
    }
    expected, _ = gather_attention(**kwargs)
    assert_close(window_attention(**kwargs, impl="reference"), expected, EXACT)
