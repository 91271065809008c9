# SPDX-License-Identifier: Apache-2.0
"""Meaning of products of packed bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbb.reference.binary_pack import floored, pack_sign, pack_unsigned, unpack_bits
from fastbb.reference.elastic_binarize import binarize_weight, elastic_binarize


def value_kind(kind: str) -> str:
    """What `unpack_bits` calls the values of a kind: plus and minus differ at zero alone."""
    return "signed" if kind in ("plus", "minus") else kind


def bgemm(a: Tensor, b: Tensor, k: int, a_kind: str = "signed", b_kind: str = "signed") -> Tensor:
    """Products of all rows of values: a `[..., M, bytes]` (ternary: `[..., M, 2, bytes]`) and b
    `[..., N, bytes]` -> int32 `[..., M, N]`.
    """
    left = unpack_bits(a, k, value_kind(a_kind), torch.float64)
    right = unpack_bits(b, k, value_kind(b_kind), torch.float64)
    return (left @ right.mT).to(torch.int32)


def activate(y: Tensor, activation: str) -> Tensor:
    """`"none"`, `"relu"` or `"gelu"` (through erf)."""
    if activation == "relu":
        return F.relu(y)
    return F.gelu(y) if activation == "gelu" else y


def binary_linear(
    x: Tensor,
    weight_bits: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    alpha: Tensor | None = None,
    shift: Tensor | None = None,
    kind: str = "ternary",
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_kind: str | None = None,
    out_alpha: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> Tensor:
    """activation(alpha * scale[n] * dot(value(x)[m], weight[n]) + bias[n]).

    x is float `[..., K]` and binarized first (`pack`), or uint8 and packed already. The result is
    `[..., N]` of `out_dtype`, or with `out_kind` packed, as the next layer's input.
    """
    bits = x if x.dtype == torch.uint8 else pack(x, kind, alpha, shift)
    trailing = 2 if kind == "ternary" else 1
    lead = bits.shape[: bits.dim() - trailing]
    rows = bits.reshape(math.prod(lead), *bits.shape[bits.dim() - trailing :])
    dot = bgemm(rows, weight_bits, k, value_kind(kind)).float()
    factor = weight_scale if alpha is None else weight_scale * floored(alpha.float())
    y = dot * factor.flatten()
    y = activate(y if bias is None else y + bias.float(), activation)
    y = y.reshape(*lead, weight_bits.shape[0])
    return y.to(out_dtype) if out_kind is None else pack(y, out_kind, out_alpha, out_shift)


def pack(x: Tensor, kind: str, alpha: Tensor | None, shift: Tensor | None) -> Tensor:
    """Bits of any kind; only unsigned ones depend on alpha (default 1)."""
    if kind == "unsigned":
        return pack_unsigned(x, x.new_ones(1) if alpha is None else alpha, shift)
    return pack_sign(x, shift, kind)


def binary_linear_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: Tensor | None = None,
    shift: Tensor | None = None,
    kind: str = "ternary",
    ste: str = "clip",
    center: str = "tensor",
    scale: str = "tensor",
    zero_policy: str = "plus",
    weight_ste: str = "identity",
) -> Tensor:
    """elastic_binarize(x) @ binarize_weight(weight).T + bias, differentiable: `[..., N]`."""
    binary = elastic_binarize(x, alpha, shift, kind, ste)
    signs = binarize_weight(weight, center, scale, zero_policy, weight_ste)
    return F.linear(binary, signs.to(binary.dtype), bias)
