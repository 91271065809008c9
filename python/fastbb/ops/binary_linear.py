# SPDX-License-Identifier: Apache-2.0
"""Products of packed bits, and the linear layer made of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastbb import reference
from fastbb.ops._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_tensor,
    fail,
    kernel_reasons,
    last_dim_contiguous,
    use_kernel,
)

GEMM = "bgemm"
LINEAR = "binary_linear"
VALUES = ("signed", "unsigned", "ternary")
KINDS = ("plus", "minus", "ternary", "unsigned")
ACTIVATIONS = ("none", "relu", "gelu")
MAX_INNER = 2**28
"""Longest rows: four times a count of ones fits into 32 bits."""
_SIDE_DTYPES = (*FLOAT_DTYPES, torch.float64)


def bgemm(
    a: Tensor,
    b: Tensor,
    *,
    k: int,
    a_kind: Literal["signed", "unsigned", "ternary"] = "signed",
    b_kind: Literal["signed", "unsigned"] = "signed",
    impl: Literal["auto", "fused", "reference"] = "auto",
) -> Tensor:
    """Products of all rows of a with all rows of b, from bits: an exact int32 `[..., M, N]`.

    Args:
        a: uint8 `[..., M, bytes]`, or `[..., M, 2, bytes]` for `"ternary"`, as `pack_sign`,
            `pack_unsigned` and `pack_weight` make it: 16 bytes for every 128 elements begun.
        b: uint8 `[..., N, bytes]` with a's leading (batch) dimensions.
        k: elements of a row, at most 2**28. Bits beyond them must be zero.
        a_kind: values of a's bits: +1 and -1 (`"signed"`), 1 and 0 (`"unsigned"`), or +1, 0, -1.
        b_kind: likewise for b.
        impl: `"fused"` runs the kernel or raises, `"reference"` runs plain PyTorch, `"auto"`
            takes the kernel when `can_run` finds no reason against it.

    dtypes: uint8 to int32. The result is the same at every instruction-set level, and has no
    gradient: `binary_linear_train` is what is trained.

    One AND and one population count serve all kinds: signed times signed is
    K - 2 |a| - 2 |b| + 4 |a & b|, unsigned times signed 2 |a & b| - |a|, |.| counting ones.

    Raises: ValueError (shape, kind), TypeError (type, dtype), NotImplementedError (valid, but not
    in this kernel, with `impl="fused"`).
    """
    _check_inner(GEMM, k)
    check_choice(GEMM, "a_kind", a_kind, VALUES)
    check_choice(GEMM, "b_kind", b_kind, VALUES[:2])
    check_bits(GEMM, "a", a, k, planes=2 if a_kind == "ternary" else 1, trailing=1)
    check_bits(GEMM, "b", b, k, planes=1, trailing=1)
    lead = a.shape[: -3 if a_kind == "ternary" else -2]
    if b.shape[:-2] != lead:
        fail(GEMM, "b", f"must have a's batch dimensions {list(lead)}", list(b.shape))
    if b.device != a.device:
        fail(GEMM, "b", f"must be on a's device {a.device}", b.device)
    if use_kernel(GEMM, impl, bits_reasons(GEMM, a)):
        return torch.ops.fastbb.bgemm.default(a, b, k, a_kind, b_kind)
    return reference.bgemm(a, b, k, a_kind, b_kind)


def binary_linear(
    x: Tensor,
    weight_bits: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    alpha: Tensor | None = None,
    shift: Tensor | None = None,
    kind: Literal["plus", "minus", "ternary", "unsigned"] = "ternary",
    activation: Literal["none", "relu", "gelu"] = "none",
    out_dtype: torch.dtype | None = None,
    out_kind: Literal["plus", "minus", "ternary", "unsigned"] | None = None,
    out_alpha: Tensor | None = None,
    out_shift: Tensor | None = None,
    impl: Literal["auto", "fused", "reference"] = "auto",
) -> Tensor:
    """activation(alpha * scale[n] * (values(x) . weight[n]) + bias[n]), by AND and bit counts.

    x is binarized, multiplied and finished in one call; float inputs exist as bits only in
    between. With `out_kind` the result is bits as well: a feed-forward block goes from bits to
    bits, and its wide activation is never written as floats. `reference.binary_linear` is the
    definition.

    Args:
        x: float `[..., K]`, or uint8 packed rows `[..., bytes]` (ternary: `[..., 2, bytes]`).
        weight_bits, weight_scale: uint8 `[N, bytes]` and float `[N]` or `[1]`, of `pack_weight`.
        bias: `[N]`.
        k: K, the elements of a row.
        alpha: `[1]` or 0-d, scale of the values, at least 1e-5 (smaller ones count as that). None
            is 1.
        shift: `[K]`, added to float x before it is binarized (packed x has been shifted).
        kind: what a bit of x + shift means. `"plus"` and `"minus"`: +1 and -1, zero being +1 or
            -1; `"ternary"`: torch.sign, zero being 0, for which rows with a zero cost a second
            pass; `"unsigned"`: 1 above alpha / 2, else 0.
        activation: `"gelu"` is the exact one, through erf.
        out_dtype: of a float result; default: x's, or float32 for packed x.
        out_kind, out_alpha, out_shift: return packed rows `[..., bytes of N]` (ternary
            `[..., 2, bytes of N]`) of the result + out_shift `[N]`, for the next layer.
        impl: as in `bgemm`.

    dtypes: x float32, bfloat16, float16 (the reference also float64) or uint8; scale, bias, alpha
    and shifts any float dtype, used in float32. The product is exact; scaling, bias and
    activation are float32, rounded once to `out_dtype`.

    NaN in x packs as a 0 bit in every plane: -1 under `"plus"` and `"minus"`, 0 otherwise.
    Infinities count by their sign. Not differentiable: see `binary_linear_train`.

    Raises: ValueError (shape, kind), TypeError (type, dtype), NotImplementedError (valid, but not
    in this kernel, with `impl="fused"`).

    Sources: Liu et al. 2022 (BiT), Xing et al. 2024 (BiPFT), Qin et al. 2022 (BiBERT).
    """
    _check_linear(x, weight_bits, weight_scale, bias, k, alpha, shift, kind, activation)
    packed = x.dtype == torch.uint8
    dtype = out_dtype or (torch.float32 if packed else x.dtype)
    if dtype not in _SIDE_DTYPES:
        fail(LINEAR, "out_dtype", "must be a floating-point dtype", dtype, TypeError)
    n = weight_bits.shape[0]
    _check_out(n, x, out_kind, out_alpha, out_shift)
    reasons = bits_reasons(LINEAR, x) if packed else kernel_reasons(LINEAR, x)
    if out_kind is None and dtype not in FLOAT_DTYPES:
        reasons.append(f"out_dtype {dtype} is not one of {[str(t) for t in FLOAT_DTYPES]}")
    if use_kernel(LINEAR, impl, reasons):
        return torch.ops.fastbb.binary_linear.default(
            x if packed else last_dim_contiguous(x),
            *(weight_bits, weight_scale, bias, k, alpha, shift, kind, activation),
            *(dtype, out_kind or "float", out_alpha, out_shift),
        )
    return reference.binary_linear(
        x,
        weight_bits,
        weight_scale,
        bias,
        k=k,
        alpha=alpha,
        shift=shift,
        kind=kind,
        activation=activation,
        out_dtype=dtype,
        out_kind=out_kind,
        out_alpha=out_alpha,
        out_shift=out_shift,
    )


def bits_reasons(op: str, bits: Tensor) -> list[str]:
    """Reasons against a kernel on packed bits: those of the device."""
    return kernel_reasons(op, bits.new_empty(0, dtype=torch.float32))


def check_bits(op: str, name: str, bits: Any, k: int, *, planes: int, trailing: int) -> None:
    """uint8 `[..., planes?, bytes]` with `trailing` dimensions of rows at least."""
    check_tensor(op, name, bits, (torch.uint8,))
    least = trailing + planes
    if bits.dim() < least:
        fail(op, name, f"must have at least {least} dimensions", list(bits.shape))
    width = reference.bit_row_bytes(k)
    if bits.shape[-1] != width:
        rule = f"must have {width} bytes in its last dimension, 16 for every 128 of k = {k} begun"
        fail(op, name, rule, list(bits.shape))
    if planes == 2 and bits.shape[-2] != 2:
        fail(op, name, "must have 2 planes in its last dimension but one", list(bits.shape))


def _check_inner(op: str, k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        fail(op, "k", "must be an int", type(k).__name__, TypeError)
    if not 0 <= k <= MAX_INNER:
        fail(op, "k", f"must be 0 to {MAX_INNER}", k)


def check_side(op: str, name: str, value: Any, x: Tensor, sizes: tuple[int, ...]) -> None:
    if value is None:
        return
    check_tensor(op, name, value, _SIDE_DTYPES)
    if value.device != x.device:
        fail(op, name, f"must be on x's device {x.device}", value.device)
    if value.dim() > 1 or value.numel() not in sizes:
        rule = f"must have one of {list(sizes)} elements in one dimension"
        fail(op, name, rule, list(value.shape))


def _check_linear(
    x: Any,
    weight_bits: Any,
    weight_scale: Any,
    bias: Any,
    k: Any,
    alpha: Any,
    shift: Any,
    kind: Any,
    activation: Any,
) -> None:
    _check_inner(LINEAR, k)
    check_choice(LINEAR, "kind", kind, KINDS)
    check_choice(LINEAR, "activation", activation, ACTIVATIONS)
    check_tensor(LINEAR, "x", x, (*_SIDE_DTYPES, torch.uint8))
    if x.dtype == torch.uint8:
        check_bits(LINEAR, "x", x, k, planes=2 if kind == "ternary" else 1, trailing=0)
        if shift is not None:
            fail(LINEAR, "shift", "must be None for packed x", "a tensor")
    elif x.dim() < 1 or x.shape[-1] != k:
        fail(LINEAR, "x", f"must have k = {k} elements in its last dimension", list(x.shape))
    check_bits(LINEAR, "weight_bits", weight_bits, k, planes=1, trailing=1)
    if weight_bits.dim() != 2:
        fail(LINEAR, "weight_bits", "must be [N, bytes]", list(weight_bits.shape))
    if weight_bits.device != x.device:
        fail(LINEAR, "weight_bits", f"must be on x's device {x.device}", weight_bits.device)
    n = weight_bits.shape[0]
    if weight_scale is None:
        fail(LINEAR, "weight_scale", "must be a torch.Tensor", "None", TypeError)
    check_side(LINEAR, "weight_scale", weight_scale, x, (1, n))
    check_side(LINEAR, "bias", bias, x, (n,))
    check_side(LINEAR, "alpha", alpha, x, (1,))
    check_side(LINEAR, "shift", shift, x, (k,))
    if kind == "unsigned" and alpha is None:
        fail(LINEAR, "alpha", "must be given for unsigned bits", None)


def _check_out(n: int, x: Tensor, out_kind: Any, out_alpha: Any, out_shift: Any) -> None:
    if out_kind is None:
        if out_alpha is not None or out_shift is not None:
            fail(LINEAR, "out_alpha and out_shift", "need out_kind", None)
        return
    check_choice(LINEAR, "out_kind", out_kind, KINDS)
    check_side(LINEAR, "out_alpha", out_alpha, x, (1,))
    check_side(LINEAR, "out_shift", out_shift, x, (n,))
    if out_kind == "unsigned" and out_alpha is None:
        fail(LINEAR, "out_alpha", "must be given for unsigned bits", None)


@torch.library.register_fake("fastbb::bgemm")
def _fake_bgemm(a: Tensor, b: Tensor, k: int, a_kind: str, b_kind: str) -> Tensor:
    rows = a.shape[:-2] if a_kind == "ternary" else a.shape[:-1]
    return a.new_empty((*rows, b.shape[-2]), dtype=torch.int32)


@torch.library.register_fake("fastbb::binary_linear")
def _fake_linear(
    x: Tensor,
    weight_bits: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    k: int,
    alpha: Tensor | None,
    shift: Tensor | None,
    kind: str,
    activation: str,
    out_dtype: torch.dtype,
    out_kind: str,
    out_alpha: Tensor | None,
    out_shift: Tensor | None,
) -> Tensor:
    lead = x.shape[: -2 if x.dtype == torch.uint8 and kind == "ternary" else -1]
    n = weight_bits.shape[0]
    if out_kind == "float":
        return x.new_empty((*lead, n), dtype=out_dtype)
    planes = (2,) if out_kind == "ternary" else ()
    return x.new_empty((*lead, *planes, reference.bit_row_bytes(n)), dtype=torch.uint8)
