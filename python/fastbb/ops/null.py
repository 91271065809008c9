# SPDX-License-Identifier: Apache-2.0
"""The worked example of an operator's Python side: function, reasons, fake, autograd."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastbb import reference
from fastbb.ops._checks import (
    FLOAT_DTYPES,
    check_tensor,
    fail,
    kernel_reasons,
    last_dim_contiguous,
    use_kernel,
)

OP = "null"


def null(x: Tensor, *, impl: Literal["auto", "fused", "reference"] = "auto") -> Tensor:
    """A contiguous copy of x.

    Args:
        x: `[rows, columns]`, any strides.
        impl: `"fused"` runs the kernel or raises, `"reference"` runs plain PyTorch, `"auto"`
            takes the kernel when `can_run` finds no reason against it.

    dtypes: float32, bfloat16, float16 (the reference also float64). Differentiable.

    Raises: ValueError (shape, impl), TypeError (type, dtype), NotImplementedError (valid, but not
    in this kernel, with `impl="fused"`).
    """
    check_tensor(OP, "x", x, (*FLOAT_DTYPES, torch.float64))
    if x.dim() != 2:
        fail(OP, "x", "must be [rows, columns]", list(x.shape))
    if use_kernel(OP, impl, can_run(x)):
        return torch.ops.fastbb.null.default(last_dim_contiguous(x))
    return reference.null(x)


def can_run(x: Tensor) -> list[str]:
    """Reasons why the kernel cannot serve this (valid) tensor; empty when it can."""
    return kernel_reasons(OP, x)


@torch.library.register_fake("fastbb::null")
def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward(ctx: Any, grad_out: Tensor) -> Tensor:
    return grad_out


torch.library.register_autograd("fastbb::null", _backward)
