# SPDX-License-Identifier: Apache-2.0
"""The binary linear layer in training: bits forward, straight-through gradients backward."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastbb import reference
from fastbb.ops._checks import (
    FLOAT_DTYPES,
    autocast_dtype,
    check_choice,
    check_tensor,
    fail,
    kernel_reasons,
    last_dim_contiguous,
    use_kernel,
)
from fastbb.ops.binary_linear import KINDS, check_side
from fastbb.ops.elastic_binarize import STES, needs_x

OP = "binary_linear_train"
CENTERS = ("none", "tensor", "row")
SCALES = ("tensor", "row")
ZERO_POLICIES = ("plus", "minus")
WEIGHT_STES = ("identity", "clip")
_DTYPES = (*FLOAT_DTYPES, torch.float64)


class _Settings(NamedTuple):
    kind: str
    ste: str
    center: str
    scale: str
    zero_policy: str
    weight_ste: str


def binary_linear_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: Tensor | None = None,
    shift: Tensor | None = None,
    kind: Literal["plus", "minus", "ternary", "unsigned"] = "ternary",
    ste: Literal["clip", "clip_open", "identity", "bireal"] = "clip",
    center: Literal["none", "tensor", "row"] = "tensor",
    scale: Literal["tensor", "row"] = "tensor",
    zero_policy: Literal["plus", "minus"] = "plus",
    weight_ste: Literal["identity", "clip"] = "identity",
    impl: Literal["auto", "fused", "reference"] = "auto",
) -> Tensor:
    """elastic_binarize(x) @ binarized(weight).T + bias, with the gradients of the papers.

    Forward runs on bits, exactly as `binary_linear` does. For the backward pass it keeps bits
    instead of floats: x as the planes of `elastic_binarize` (2 or 3 bits per element instead of
    32; x itself for unsigned values and `"bireal"`) and the weight's signs. Backward unpacks them
    for two products of floats. `reference.binary_linear_train` is the definition.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`, the latent weight. Its binary form is mean(|weight|) times the sign of
            weight - mean(weight).
        bias: `[N]`.
        alpha, shift, kind, ste: `[1]` or 0-d, `[K]`, values and gradients of x: see
            `elastic_binarize`.
        center: whose mean is removed from the weight before its sign is taken: the tensor's, each
            row's, or none.
        scale: whose mean(|weight|) is the scale.
        zero_policy: sign of a centred weight that is exactly 0, where torch.sign would give 0.
        weight_ste: gradient of the weight: that of its binary form (`"identity"`: BiT, BiPFT), or
            that where the centred weight is within 1 (`"clip"`: BiBERT), less its mean over a row
            when rows are centred.
        impl: `"fused"` runs the kernels or raises, `"reference"` runs plain PyTorch, `"auto"`
            takes the kernels when `can_run` finds no reason against them.

    dtypes: x float32, bfloat16, float16 (the reference also float64), or autocast's; weight, bias,
    alpha and shift any float dtype. The product is exact, its scaling float32; gradients are
    products in x's dtype. Under autocast x is cast as a matmul would cast it.

    Differentiable in x, weight, bias, alpha and shift; no second derivatives.

    Raises: ValueError (shape, device, kind), TypeError (type, dtype), NotImplementedError (valid,
    but not in these kernels, with `impl="fused"`).

    Sources: Liu et al. 2022 (BiT), Xing et al. 2024 (BiPFT), Qin et al. 2022 (BiBERT).
    """
    settings = _Settings(kind, ste, center, scale, zero_policy, weight_ste)
    _check(x, weight, bias, alpha, shift, settings)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype in FLOAT_DTYPES:
        x = x.to(dtype)
    if use_kernel(OP, impl, kernel_reasons("binary_linear", x)):
        one = None if alpha is None else alpha.reshape(1)
        return _Train.apply(last_dim_contiguous(x), weight, bias, one, shift, settings)
    named = settings._asdict()
    weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
    return reference.binary_linear_train(x, weight, bias, alpha=alpha, shift=shift, **named)


class _Train(torch.autograd.Function):
    """A composition of operators, whose own gradients (none) are not those wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        alpha: Tensor | None,
        shift: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        kind, ste = settings.kind, settings.ste
        k = x.shape[-1]
        keep_x = needs_x(kind, ste)
        if keep_x or not any(ctx.needs_input_grad):
            scale = alpha if kind == "unsigned" else None
            planes = bits = torch.ops.fastbb.pack_bits.default(x, shift, scale, kind)
        else:
            planes = torch.ops.fastbb.elastic_planes.default(x, alpha, shift, kind, ste)
            bits = _value_bits(planes, kind)
        weight_bits, weight_scale = torch.ops.fastbb.pack_weight.default(
            last_dim_contiguous(weight), settings.center, settings.scale, settings.zero_policy
        )
        y = torch.ops.fastbb.binary_linear.default(
            *(bits, weight_bits, weight_scale, bias, k, alpha, None, kind),
            *("none", x.dtype, "float", None, None),
        )
        kept = x if keep_x else None
        latent = weight if settings.weight_ste == "clip" else None
        ctx.save_for_backward(planes, kept, latent, weight_bits, weight_scale, alpha, shift)
        ctx.settings = settings
        ctx.k = k
        ctx.keep_x = keep_x
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, alpha, shift)]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        planes, x, latent, weight_bits, weight_scale, alpha, shift = ctx.saved_tensors
        settings: _Settings = ctx.settings
        need_x, need_weight, need_bias, need_alpha, need_shift, _ = ctx.needs_input_grad
        weight_dtype, bias_dtype, alpha_dtype, shift_dtype = ctx.dtypes
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dalpha = dshift = dweight = dbias = None
        if need_x or need_alpha or need_shift:
            signs = torch.ops.fastbb.unpack_bits.default(weight_bits, ctx.k, "signed", rows.dtype)
            through = (rows * weight_scale.to(rows.dtype)) @ signs
            dx, dalpha, dshift = torch.ops.fastbb.elastic_binarize_backward.default(
                *(through.reshape(*grad.shape[:-1], ctx.k), x, planes, alpha, shift),
                *(settings.kind, settings.ste, need_alpha, need_shift),
            )
        if need_weight:
            bits = planes if ctx.keep_x else _value_bits(planes, settings.kind)
            values = torch.ops.fastbb.unpack_bits.default(
                bits, ctx.k, reference.value_kind(settings.kind), rows.dtype
            )
            dbinary = rows.T @ values.reshape(-1, ctx.k)
            if alpha is not None:
                dbinary = dbinary * alpha.clamp(min=reference.LEAST_ALPHA).to(rows.dtype)
            dweight = dbinary.to(weight_dtype)
            if latent is not None:
                dweight = reference.weight_gradient(dweight, latent, settings.center, "clip")
        if need_bias:
            dbias = rows.sum(0, dtype=torch.float32).to(bias_dtype)
        return (
            dx if need_x else None,
            dweight,
            dbias,
            dalpha.to(alpha_dtype) if dalpha is not None and need_alpha else None,
            dshift.to(shift_dtype) if dshift is not None and need_shift else None,
            None,
        )


def _value_bits(planes: Tensor, kind: str) -> Tensor:
    """Packed values, without the plane that tells where gradients pass."""
    return planes[..., :2, :] if kind == "ternary" else planes[..., 0, :]


def _check(x: Any, weight: Any, bias: Any, alpha: Any, shift: Any, settings: _Settings) -> None:
    check_tensor(OP, "x", x, _DTYPES)
    check_tensor(OP, "weight", weight, _DTYPES)
    for name, value, choices in zip(
        _Settings._fields,
        settings,
        (KINDS, STES, CENTERS, SCALES, ZERO_POLICIES, WEIGHT_STES),
        strict=True,
    ):
        check_choice(OP, name, value, choices)
    if weight.dim() != 2:
        fail(OP, "weight", "must be [N, K]", list(weight.shape))
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        fail(OP, "x", f"must have weight's K = {k} elements in its last dimension", list(x.shape))
    if weight.device != x.device:
        fail(OP, "weight", f"must be on x's device {x.device}", weight.device)
    check_side(OP, "bias", bias, x, (n,))
    check_side(OP, "alpha", alpha, x, (1,))
    check_side(OP, "shift", shift, x, (k,))
    if settings.kind == "unsigned" and alpha is None:
        fail(OP, "alpha", "must be given for unsigned values", None)
