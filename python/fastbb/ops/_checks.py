# SPDX-License-Identifier: Apache-2.0
"""What the public functions of all operators share: checks, choice of the implementation.

Messages have one form: `op: argument rule, got value`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastbb import config
from fastbb.ops._cuda import cuda_reasons

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fail(
    op: str, argument: str, rule: str, got: object, error: type[Exception] = ValueError
) -> NoReturn:
    """Raises `error` with the project's message form."""
    raise error(f"{op}: {argument} {rule}, got {got}")


def check_tensor(op: str, name: str, x: Any, dtypes: Sequence[torch.dtype] | None = None) -> None:
    """A strided (dense) tensor, of one of `dtypes` when given."""
    if not isinstance(x, Tensor):
        fail(op, name, "must be a torch.Tensor", type(x).__name__, TypeError)
    if x.layout != torch.strided:
        fail(op, name, "must be a dense tensor", x.layout, TypeError)
    if dtypes is not None and x.dtype not in dtypes:
        fail(op, name, f"must have a dtype of {[str(t) for t in dtypes]}", x.dtype, TypeError)


def check_shape(op: str, name: str, x: Tensor, shape: Sequence[int], letters: str) -> None:
    """`x.shape == shape`; `letters` names the dimensions in the message."""
    if tuple(x.shape) != tuple(shape):
        fail(op, name, f"must have shape {letters} = {list(shape)}", list(x.shape))


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """A string that is one of `choices`."""
    if value not in choices:
        fail(op, name, f"must be one of {choices}", repr(value))


def check_same(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and dtype as another argument."""
    if x.device != other.device:
        fail(op, name, f"must be on {other_name}'s device {other.device}", x.device)
    if x.dtype != other.dtype:
        fail(op, name, f"must have {other_name}'s dtype {other.dtype}", x.dtype, TypeError)


def pair(op: str, name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An int or two ints -> (height, width)."""
    both = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(both) != 2:
        fail(op, name, "must be an int or two ints", value)
    for x in both:
        if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
            fail(op, name, "must be an int or two ints", repr(value), TypeError)
    return both[0], both[1]


def check_float(op: str, name: str, value: Any) -> None:
    """A Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        fail(op, name, "must be a float", type(value).__name__, TypeError)


def check_bool(op: str, name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        fail(op, name, "must be a bool", type(value).__name__, TypeError)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """dtype that autocast gives to matrix products on x's device; None when it is off."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def use_kernel(op: str, impl: str, reasons: list[str]) -> bool:
    """Whether a call runs the fused kernel; `reasons` say why it could not (`can_run`).

    Raises NotImplementedError when the kernel was asked for and cannot run.
    """
    if impl not in ("auto", "fused", "reference"):
        fail(op, "impl", 'must be "auto", "fused" or "reference"', repr(impl))
    if impl == "fused" and reasons:
        raise NotImplementedError(f"{op}: no fused kernel for this call: {'; '.join(reasons)}")
    return impl == "fused" or (impl == "auto" and config.fused_enabled() and not reasons)


def kernel_reasons(op: str, x: Tensor) -> list[str]:
    """Reasons against a kernel that every operator shares: device and dtype."""
    reasons = []
    if x.device.type == "cuda":
        reasons += cuda_reasons(op, x.device.index)
    elif x.device.type != "cpu":
        reasons.append(f"device {x.device.type} has no kernel")
    if x.dtype not in FLOAT_DTYPES:
        reasons.append(f"dtype {x.dtype} is not one of {[str(t) for t in FLOAT_DTYPES]}")
    return reasons


def last_dim_contiguous(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is strided."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
