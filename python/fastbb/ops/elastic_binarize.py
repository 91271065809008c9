# SPDX-License-Identifier: Apache-2.0
"""Binarization with a learned scale and shift, and the straight-through gradients of the papers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastbb import reference
from fastbb.ops._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_shape,
    check_tensor,
    fail,
    kernel_reasons,
    use_kernel,
)

OP = "elastic_binarize"
KINDS = ("plus", "minus", "ternary", "unsigned")
STES = ("clip", "clip_open", "identity", "bireal")
_DTYPES = (*FLOAT_DTYPES, torch.float64)

Kind = Literal["plus", "minus", "ternary", "unsigned"]
Ste = Literal["clip", "clip_open", "identity", "bireal"]


def elastic_binarize(
    x: Tensor,
    alpha: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    kind: Kind = "ternary",
    ste: Ste = "clip",
    impl: Literal["auto", "fused", "reference"] = "auto",
) -> Tensor:
    """alpha times the binary value of x' = x + shift, with gradients that training can use.

    `reference.elastic_binarize` is the definition. With u = x' / alpha, n = x.numel():

    | kind | value |
    | --- | --- |
    | `"plus"` | 1 where x' >= 0, else -1 |
    | `"minus"` | 1 where x' > 0, else -1 |
    | `"ternary"` | sign(x'), 0 at 0 (torch.sign; BiT, BiPFT) |
    | `"unsigned"` | 1 where x' > alpha / 2, else 0 |

    The gradient of alpha is sum(grad * phi) / sqrt(n): phi is the value of a sign; of unsigned
    values it is 0 below u = 0, 1 above u = 1, and value - u between. The gradient of x is grad
    times a factor, that of shift its sum over rows:

    | ste | factor of signs |
    | --- | --- |
    | `"clip"` | 1 where abs(u) <= 1, else 0 (BiT, BiPFT; Linear inputs of BiBERT) |
    | `"clip_open"` | 1 where abs(u) < 1, else 0 (attention of BiBERT) |
    | `"identity"` | 1 |
    | `"bireal"` | 2 - 2 abs(u) where abs(u) <= 1, else 0 (Bi-Real, ReActNet) |

    Unsigned values have one gradient, whatever `ste` is: the factor is 1 where 0 <= u <= 1, else 0.

    Args:
        x: `[..., K]`, any strides.
        alpha: scale, `[1]` or 0-d; None: 1. Values below 1e-5 count as 1e-5, and get the gradient
            that 1e-5 would get, so that they can grow again.
        shift: `[K]`, added to every row; None: 0.
        kind: which values, see above.
        ste: which gradient of x, see above.
        impl: `"fused"` runs the kernel or raises, `"reference"` runs plain PyTorch, `"auto"`
            takes the kernel when `can_run` finds no reason against it.

    Returns: `[..., K]` in x's dtype, contiguous.

    dtypes: x float32, bfloat16, float16 (the reference also float64); alpha and shift any float
    dtype. Comparisons, quotients and sums are float32 (those over the whole tensor float64), and
    results in 16 bits are rounded once. Autocast changes nothing.

    For its backward pass, signs with a clip or the identity keep bits instead of x: one bit per
    element of the value (`"ternary"`: two) and, for a clip, one where the gradient passes. Unsigned
    values and `"bireal"` keep x.

    NaN is 0 in every bit plane: its value is -1, in `"ternary"` and `"unsigned"` 0, and no clip
    lets its gradient pass. Infinity counts by its sign. A gradient that is NaN or infinite becomes
    NaN where its factor is 0.

    Gradients are deterministic, at any number of threads.

    Raises: ValueError (shape, device, kind, ste, impl), TypeError (type, dtype),
    NotImplementedError (valid, but not in this kernel, with `impl="fused"`).

    Sources: Liu et al. 2022 (BiT), Xing et al. 2024 (BiPFT), Qin et al. 2022 (BiBERT), Liu et al.
    2018 (Bi-Real), Liu et al. 2020 (ReActNet).
    """
    _check(x, alpha, shift, kind, ste)
    if use_kernel(OP, impl, can_run(x)):
        wanted = any(t is not None and t.requires_grad for t in (x, alpha, shift))
        save = wanted and torch.is_grad_enabled() and not needs_x(kind, ste)
        one = None if alpha is None else alpha.reshape(1)
        return torch.ops.fastbb.elastic_binarize.default(x, one, shift, kind, ste, save)[0]
    return reference.elastic_binarize(x, alpha, shift, kind, ste)


def can_run(x: Tensor) -> list[str]:
    """Reasons why the kernel cannot serve this (valid) tensor; empty when it can."""
    return kernel_reasons(OP, x)


def needs_x(kind: str, ste: str) -> bool:
    """Whether the backward pass reads x; otherwise it reads planes."""
    return kind == "unsigned" or ste == "bireal"


def plane_count(kind: str, ste: str) -> int:
    """Bits per element of the planes: those of the value, and where the gradient passes."""
    values = 2 if kind == "ternary" else 1
    return values + (kind != "unsigned" and ste in ("clip", "clip_open"))


def _check(x: Any, alpha: Any, shift: Any, kind: Any, ste: Any) -> None:
    check_tensor(OP, "x", x, _DTYPES)
    if x.dim() < 1:
        fail(OP, "x", "must be [..., K]", list(x.shape))
    check_choice(OP, "kind", kind, KINDS)
    check_choice(OP, "ste", ste, STES)
    for name, side in (("alpha", alpha), ("shift", shift)):
        if side is None:
            continue
        check_tensor(OP, name, side, _DTYPES)
        if side.device != x.device:
            fail(OP, name, f"must be on x's device {x.device}", side.device)
    if alpha is not None and tuple(alpha.shape) not in ((), (1,)):
        fail(OP, "alpha", "must have shape [1] or []", list(alpha.shape))
    if shift is not None:
        check_shape(OP, "shift", shift, x.shape[-1:], "[K]")


def _check_devices(*tensors: Tensor | None) -> None:
    """The fake kernels' share of the raw operators' checks: a meta tensor must not stand alone."""
    devices = {str(x.device) for x in tensors if x is not None}
    if len(devices) > 1:
        fail(OP, "tensors", "must be on one device", sorted(devices), RuntimeError)


@torch.library.register_fake("fastbb::elastic_binarize")
def _fake(
    x: Tensor, alpha: Tensor | None, shift: Tensor | None, kind: str, ste: str, save: bool
) -> tuple[Tensor, Tensor]:
    planes = _fake_planes(x, alpha, shift, kind, ste)
    return x.new_empty(x.shape), planes if save else planes.new_empty((0,))


@torch.library.register_fake("fastbb::elastic_planes")
def _fake_planes(
    x: Tensor, alpha: Tensor | None, shift: Tensor | None, kind: str, ste: str
) -> Tensor:
    _check_devices(x, alpha, shift)
    shape = (*x.shape[:-1], plane_count(kind, ste), reference.bit_row_bytes(x.shape[-1]))
    return x.new_empty(shape, dtype=torch.uint8)


@torch.library.register_fake("fastbb::elastic_binarize_backward")
def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    planes: Tensor,
    alpha: Tensor | None,
    shift: Tensor | None,
    kind: str,
    ste: str,
    need_alpha: bool,
    need_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(grad, x, planes, alpha, shift)
    return (
        grad.new_empty(grad.shape),
        grad.new_empty((int(need_alpha),), dtype=torch.float32),
        grad.new_empty((grad.shape[-1] if need_shift else 0,), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, alpha, shift, kind, ste, _ = inputs
    _, planes = output
    ctx.mark_non_differentiable(planes)
    # Nothing but bits where bits suffice: neither x, nor alpha and shift, is kept then.
    given = (x, alpha, shift) if needs_x(kind, ste) else (None, None, None)
    ctx.save_for_backward(planes, *given)
    ctx.settings = (kind, ste)
    ctx.dtypes = [None if side is None else side.dtype for side in (alpha, shift)]


def _backward(ctx: Any, grad: Tensor, _grad_planes: Tensor | None) -> tuple[Tensor | None, ...]:
    planes, x, alpha, shift = ctx.saved_tensors
    _, need_alpha, need_shift = ctx.needs_input_grad[:3]
    dx, dalpha, dshift = torch.ops.fastbb.elastic_binarize_backward.default(
        grad, x, planes, alpha, shift, *ctx.settings, need_alpha, need_shift
    )
    alpha_dtype, shift_dtype = ctx.dtypes
    return (
        dx,
        dalpha.to(alpha_dtype) if need_alpha else None,
        dshift.to(shift_dtype) if need_shift else None,
        *(None, None, None),
    )


torch.library.register_autograd("fastbb::elastic_binarize", _backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "elastic_binarize_backward: second derivatives have no kernel; "
        'use impl="reference" where they are needed'
    )


torch.library.register_autograd("fastbb::elastic_binarize_backward", _no_second_derivative)
