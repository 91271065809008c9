# SPDX-License-Identifier: Apache-2.0
"""Floats to packed bits and back, the weights of a layer among them.

Packed rows of K elements are uint8 `[..., bytes]`, 16 bytes for every 128 elements begun: bit j % 8
of byte j // 8 is element j, and bits from K on are zero. Ternary rows have two planes,
`[..., 2, bytes]`: where elements are positive, and where they are negative.
"""

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
    use_kernel,
)

Impl = Literal["auto", "fused", "reference"]
ZeroPolicy = Literal["plus", "minus", "ternary"]
ValueKind = Literal["signed", "unsigned", "ternary"]

_WIDE = (*FLOAT_DTYPES, torch.float64)
_ZERO_POLICIES = ("plus", "minus", "ternary")
_VALUE_KINDS = ("signed", "unsigned", "ternary")


def pack_sign(
    x: Tensor,
    shift: Tensor | None = None,
    *,
    zero_policy: ZeroPolicy = "ternary",
    impl: Impl = "auto",
) -> Tensor:
    """Bits of the signs of x + shift: uint8 `[..., bytes]`, or `[..., 2, bytes]` for `"ternary"`.

    Args:
        x: `[..., K]`, any strides.
        shift: `[K]`, added in float32 before the comparison; None: 0.
        zero_policy: what zero is. `"ternary"`: 0, as torch.sign has it (BiT, BiPFT), which takes
            two planes, above and below zero. `"plus"`: +1. `"minus"`: -1, its bit being 0.
        impl: `"fused"` runs the kernel or raises, `"reference"` runs plain PyTorch, `"auto"`
            takes the kernel when `can_run` finds no reason against it.

    dtypes: x float32, bfloat16, float16 (the reference also float64); shift any float dtype. The
    result is the same at every instruction-set level. Autocast changes nothing.

    NaN is 0 in every plane, so -1 under `"plus"` and `"minus"`; infinities count by their sign.
    Not differentiable: `elastic_binarize` is.

    Raises: ValueError (shape, device, zero_policy, impl), TypeError (type, dtype),
    NotImplementedError (valid, but not in this kernel, with `impl="fused"`).
    """
    op = "pack_sign"
    _check_x(op, x)
    check_choice(op, "zero_policy", zero_policy, _ZERO_POLICIES)
    _check_shift(op, x, shift)
    if use_kernel(op, impl, can_run("pack_bits", x)):
        return torch.ops.fastbb.pack_bits.default(x, shift, None, zero_policy)
    return reference.pack_sign(x, shift, zero_policy)


def pack_unsigned(
    x: Tensor, alpha: Tensor, shift: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """Bits of where x + shift exceeds half of alpha: uint8 `[..., bytes]`.

    That is round((x + shift) / alpha), half to even, clamped to 0 and 1, as BiT has it, but for
    quotients that rounding takes to or from one half.

    Args:
        x: `[..., K]`, any strides.
        alpha: scale of the values, `[1]` or 0-d; less than 1e-5 counts as 1e-5.
        shift: `[K]`, added in float32 before the comparison; None: 0.
        impl: as in `pack_sign`.

    dtypes: x float32, bfloat16, float16 (the reference also float64); alpha and shift any float
    dtype, used in float32. The result is the same at every instruction-set level.

    NaN, in x or alpha, gives 0. Not differentiable: `elastic_binarize` is.

    Raises: ValueError (shape, device, impl), TypeError (type, dtype), NotImplementedError (valid,
    but not in this kernel, with `impl="fused"`).
    """
    op = "pack_unsigned"
    _check_x(op, x)
    check_tensor(op, "alpha", alpha, _WIDE)
    _check_device(op, "alpha", alpha, "x", x)
    if alpha.dim() > 1 or alpha.numel() != 1:
        fail(op, "alpha", "must have shape [1] or []", list(alpha.shape))
    _check_shift(op, x, shift)
    if use_kernel(op, impl, can_run("pack_bits", x)):
        return torch.ops.fastbb.pack_bits.default(x, shift, alpha, "unsigned")
    return reference.pack_unsigned(x, alpha, shift)


def pack_weight(
    weight: Tensor,
    *,
    center: Literal["none", "tensor", "row"] = "tensor",
    scale: Literal["tensor", "row"] = "tensor",
    zero_policy: ZeroPolicy = "plus",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Bits of the signs of weight - mean(weight), and mean(|weight|), which is their scale.

    Args:
        weight: `[N, K]`, any strides.
        center: mean that is taken away: of the `"tensor"` (BiT, BiPFT), of each `"row"` (BiBERT),
            or `"none"`.
        scale: mean of |weight|, not centred: of the `"tensor"`, or of each `"row"` (BiBERT;
            embeddings of BiT and BiPFT).
        zero_policy: as in `pack_sign`; only `"plus"` and `"minus"` weights enter products.
        impl: as in `pack_sign`.

    Returns: uint8 `[N, bytes]` (ternary: `[N, 2, bytes]`), and float32 `[1]` or `[N]`.

    dtypes: float32, bfloat16, float16 (the reference also float64). Means are summed in float64 in
    one order at every instruction-set level and rounded to float32, in which they are taken away.

    A NaN makes all that shares its mean NaN: scales, and bits of 0. Not differentiable:
    `binary_linear_train` is.

    Raises: ValueError (shape, center, scale, zero_policy, impl), TypeError (type, dtype),
    NotImplementedError (valid, but not in this kernel, with `impl="fused"`).
    """
    op = "pack_weight"
    check_tensor(op, "weight", weight, _WIDE)
    if weight.dim() != 2:
        fail(op, "weight", "must have shape [N, K]", list(weight.shape))
    check_choice(op, "center", center, ("none", "tensor", "row"))
    check_choice(op, "scale", scale, ("tensor", "row"))
    check_choice(op, "zero_policy", zero_policy, _ZERO_POLICIES)
    if use_kernel(op, impl, can_run(op, weight)):
        # Its scale is a float, which autograd must not take for a function of the weight.
        return torch.ops.fastbb.pack_weight.default(weight.detach(), center, scale, zero_policy)
    return reference.pack_weight(weight.detach(), center, scale, zero_policy)


def unpack_bits(
    bits: Tensor,
    k: int,
    *,
    kind: ValueKind = "signed",
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """The values of packed rows `[..., K]`.

    Args:
        bits: uint8 `[..., bytes]`, or `[..., 2, bytes]` for `"ternary"`.
        k: K, the elements of a row.
        kind: `"signed"`: +1 and -1; `"unsigned"`: 1 and 0; `"ternary"`: 1 where the first plane has
            the bit, less 1 where the second has it.
        dtype: of the result.
        impl: as in `pack_sign`.

    dtypes: uint8 to float32, bfloat16, float16 (the reference also float64). Not differentiable.

    Raises: ValueError (shape, k, kind, impl), TypeError (type, dtype), NotImplementedError (valid,
    but not in this kernel, with `impl="fused"`).
    """
    op = "unpack_bits"
    check_choice(op, "kind", kind, _VALUE_KINDS)
    _check_k(op, k)
    _check_dtype(op, dtype)
    _check_bits(op, bits, k, planes=2 if kind == "ternary" else 1)
    if use_kernel(op, impl, can_run(op, bits, dtype)):
        return torch.ops.fastbb.unpack_bits.default(bits, k, kind, dtype)
    return reference.unpack_bits(bits, k, kind, dtype)


def binary_embedding(
    ids: Tensor,
    bits: Tensor,
    scale: Tensor,
    *,
    k: int,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """Rows `ids` of a packed table of signs, times their scale: `[..., K]`.

    Args:
        ids: int64 or int32 of any shape `[...]`, each from 0 to V - 1.
        bits: the table, uint8 `[V, bytes]`, as `pack_weight` makes it.
        scale: float `[V]`, or `[1]` for all rows.
        k: K, the elements of a row.
        dtype: of the result.
        impl: as in `pack_sign`.

    dtypes: scale any float dtype, used in float32; the result float32, bfloat16, float16 (the
    reference also float64), rounded once.

    This is the form for inference: nothing gets a gradient, the scale neither.

    Raises: IndexError (an id outside the table; RuntimeError in compiled graphs, which cannot
    look into tensors), ValueError (shape, device, k, impl), TypeError (type, dtype),
    NotImplementedError (valid, but not in this kernel, with `impl="fused"`). On CUDA devices
    nobody waits to learn of such an id: its row is NaN.
    """
    op = "binary_embedding"
    check_tensor(op, "ids", ids, (torch.int64, torch.int32))
    _check_k(op, k)
    _check_dtype(op, dtype)
    _check_bits(op, bits, k, planes=1)
    _check_device(op, "bits", bits, "ids", ids)
    if bits.dim() != 2:
        fail(op, "bits", "must have shape [V, bytes]", list(bits.shape))
    check_tensor(op, "scale", scale, _WIDE)
    _check_device(op, "scale", scale, "ids", ids)
    if scale.dim() != 1 or scale.shape[0] not in (1, bits.shape[0]):
        fail(op, "scale", f"must have shape [V] = [{bits.shape[0]}] or [1]", list(scale.shape))
    scale = scale.detach()
    if not use_kernel(op, impl, can_run(op, bits, dtype)):
        _check_ids(op, ids, bits)
        return reference.binary_embedding(ids, bits, scale, k, dtype)
    try:
        return torch.ops.fastbb.binary_embedding.default(ids, bits, scale, k, dtype)
    except RuntimeError:
        _check_ids(op, ids, bits)
        raise


def row_bytes(k: int) -> int:
    """Bytes of a packed row of k elements: 16 for every 128 begun."""
    return reference.bit_row_bytes(k)


def can_run(op: str, x: Tensor, dtype: torch.dtype | None = None) -> list[str]:
    """Reasons why the kernel of a raw operator cannot serve a (valid) tensor; empty when it can.
    `dtype` is that of the floats, where they are not x.
    """
    return kernel_reasons(op, x if dtype is None else x.new_empty(0, dtype=dtype))


def _check_x(op: str, x: Any) -> None:
    check_tensor(op, "x", x, _WIDE)
    if x.dim() < 1:
        fail(op, "x", "must have shape [..., K]", list(x.shape))


def _check_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        fail(op, name, f"must be on {other_name}'s device {other.device}", x.device)


def _check_shift(op: str, x: Tensor, shift: Any) -> None:
    if shift is None:
        return
    check_tensor(op, "shift", shift, _WIDE)
    _check_device(op, "shift", shift, "x", x)
    if shift.dim() != 1 or shift.shape[0] != x.shape[-1]:
        fail(op, "shift", f"must have shape [K] = [{x.shape[-1]}]", list(shift.shape))


def _check_k(op: str, k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        fail(op, "k", "must be an int", type(k).__name__, TypeError)
    if k < 0:
        fail(op, "k", "must be at least 0", k)


def _check_dtype(op: str, dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in _WIDE:
        fail(op, "dtype", f"must be one of {[str(t) for t in _WIDE]}", dtype, TypeError)


def _check_bits(op: str, bits: Any, k: int, planes: int) -> None:
    check_tensor(op, "bits", bits, (torch.uint8,))
    shape = "[..., 2, bytes]" if planes == 2 else "[..., bytes]"
    if bits.dim() < planes or (planes == 2 and bits.shape[-2] != 2):
        fail(op, "bits", f"must have shape {shape}", list(bits.shape))
    width = reference.bit_row_bytes(k)
    if bits.shape[-1] != width:
        fail(op, "bits", f"must have {width} bytes per row for k = {k}", list(bits.shape))


def _check_ids(op: str, ids: Tensor, bits: Tensor) -> None:
    """Names the first id that is not of a row; in a graph there are no values to look at."""
    if torch.compiler.is_compiling() or ids.is_meta:
        return
    rows = bits.shape[0]
    bad = ids[(ids < 0) | (ids >= rows)]
    if bad.numel():
        fail(op, "ids", f"must be at least 0 and less than V = {rows}", bad[0].item(), IndexError)


@torch.library.register_fake("fastbb::pack_bits")
def _fake_pack(x: Tensor, shift: Tensor | None, alpha: Tensor | None, kind: str) -> Tensor:
    return _new_bits(x, kind)


@torch.library.register_fake("fastbb::pack_weight")
def _fake_weight(
    weight: Tensor, center: str, scale: str, zero_policy: str
) -> tuple[Tensor, Tensor]:
    sizes = weight.new_empty(weight.shape[0] if scale == "row" else 1, dtype=torch.float32)
    return _new_bits(weight, zero_policy), sizes


def _new_bits(x: Tensor, kind: str) -> Tensor:
    planes = (2,) if kind == "ternary" else ()
    width = reference.bit_row_bytes(x.shape[-1])
    return x.new_empty((*x.shape[:-1], *planes, width), dtype=torch.uint8)


@torch.library.register_fake("fastbb::unpack_bits")
def _fake_unpack(bits: Tensor, k: int, kind: str, dtype: torch.dtype) -> Tensor:
    lead = bits.shape[:-2] if kind == "ternary" else bits.shape[:-1]
    return bits.new_empty((*lead, k), dtype=dtype)


@torch.library.register_fake("fastbb::binary_embedding")
def _fake_embedding(ids: Tensor, bits: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return bits.new_empty((*ids.shape, k), dtype=dtype)
