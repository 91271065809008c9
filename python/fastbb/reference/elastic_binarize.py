# SPDX-License-Identifier: Apache-2.0
"""Meaning of elastic binarization: values, and gradients that are not those of the values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastbb.reference.binary_pack import floored


class _Elastic(torch.autograd.Function):
    """x `[..., K]`, alpha `[1]` -> alpha times the value of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, kind: str, ste: str) -> Tensor:
        # The floor is not differentiated: an alpha below it must be able to come back.
        alpha = floored(alpha)
        ctx.save_for_backward(x, alpha)
        ctx.settings = (kind, ste)
        return _value(x, alpha, kind) * alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, alpha = ctx.saved_tensors
        kind, ste = ctx.settings
        u = x / alpha
        if kind == "unsigned":
            passes = ((u >= 0) & (u <= 1)).to(x.dtype)
            phi = torch.where(u < 0, 0.0, torch.where(u > 1, 1.0, _value(x, alpha, kind) - u))
        else:
            passes = ste_factor(u, ste)
            phi = _value(x, alpha, kind)
        dalpha = (phi * grad).sum() / math.sqrt(max(x.numel(), 1))
        return passes * grad, dalpha.reshape(alpha.shape), None, None


def _value(x: Tensor, alpha: Tensor, kind: str) -> Tensor:
    if kind == "unsigned":
        return (x > alpha / 2).to(x.dtype)
    if kind == "plus":
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    if kind == "minus":
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


def ste_factor(u: Tensor, ste: str) -> Tensor:
    """What the gradient of a sign at u is multiplied with."""
    size = u.abs()
    if ste == "clip":
        return (size <= 1).to(u.dtype)
    if ste == "clip_open":
        return (size < 1).to(u.dtype)
    if ste == "bireal":
        return torch.where(size <= 1, 2 - 2 * size, 0.0).to(u.dtype)
    return torch.ones_like(u)


def elastic_binarize(
    x: Tensor,
    alpha: Tensor | None = None,
    shift: Tensor | None = None,
    kind: str = "ternary",
    ste: str = "clip",
) -> Tensor:
    """alpha times the value of x + shift `[..., K]`, in x's dtype, with straight-through gradients.

    Kinds are those of `reference.binary_pack` (`"plus"`, `"minus"`, `"ternary"`: signs that differ
    at zero; `"unsigned"`: 1 above alpha / 2, else 0). With u = (x + shift) / alpha:

    - dx is grad where |u| <= 1 (`"clip"`), |u| < 1 (`"clip_open"`), everywhere (`"identity"`), or
      grad * (2 - 2 |u|) within 1 (`"bireal"`); of unsigned values where 0 <= u <= 1. dshift is its
      sum over rows.
    - dalpha is sum(grad * phi) / sqrt(numel): phi is the value of a sign; of unsigned values it is
      0 below u = 0, 1 above 1 and value - u between.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if shift is not None:
        wide = wide + shift.to(wide.dtype)
    size = torch.ones(1, dtype=wide.dtype, device=x.device) if alpha is None else alpha
    return _Elastic.apply(wide, size.to(wide.dtype), kind, ste).to(x.dtype)


class _Weight(torch.autograd.Function):
    """Weight `[N, K]` -> scale * sign(weight - center)."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, center: str, scale: str, zero_policy: str, ste: str
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = (center, ste)
        wide = weight.double()
        sizes = wide.abs().mean(1, keepdim=True) if scale == "row" else wide.abs().mean()
        centred = centre(weight, center)
        signs = _value(centred, centred.new_ones(1), zero_policy)
        return signs * sizes.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return (weight_gradient(grad, weight, *ctx.settings), None, None, None, None)


def centre(weight: Tensor, center: str) -> Tensor:
    """weight `[N, K]` less its mean, that of each row, or nothing."""
    if center == "none":
        return weight
    wide = weight.double()
    middle = wide.mean(1, keepdim=True) if center == "row" else wide.mean()
    return weight - middle.to(weight.dtype)


def weight_gradient(grad: Tensor, weight: Tensor, center: str, ste: str) -> Tensor:
    """Gradient of a latent weight from that of the binary one.

    `"identity"` (BiT, BiPFT): grad. `"clip"` (BiBERT): grad where the centred weight is within 1,
    less its mean over a row when rows were centred, since that mean depends on the weight.
    """
    if ste == "identity":
        return grad
    passed = grad * (centre(weight, center).abs() <= 1)
    return passed - passed.mean(1, keepdim=True) if center == "row" else passed


def binarize_weight(
    weight: Tensor,
    center: str = "tensor",
    scale: str = "tensor",
    zero_policy: str = "plus",
    ste: str = "identity",
) -> Tensor:
    """mean(|weight|) * sign(weight - mean(weight)) of `[N, K]`, with straight-through gradients.

    `center` and `scale` say whether each mean is of the whole tensor, of a row, or (`center`) none.
    """
    return _Weight.apply(weight, center, scale, zero_policy, ste)
