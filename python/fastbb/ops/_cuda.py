# SPDX-License-Identifier: Apache-2.0
"""Which CUDA devices this build's kernels run on."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from fastbb import _C

LOWEST = (8, 0)  # cp.async, mma of 16 x 8 x 16


def has_kernel(op: str) -> bool:
    """Whether an operator is registered for CUDA tensors."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbb::{op}", "CUDA")


def capability_of(index: int) -> tuple[int, int] | None:
    """Compute capability of a device; None where torch finds none."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@torch.compiler.assume_constant_result
def cuda_reasons(op: str, index: int) -> list[str]:
    """Reasons against the CUDA kernel of an operator on a device; empty when it runs there."""
    return list(_cuda_reasons(op, index))


@functools.cache
def _cuda_reasons(op: str, index: int) -> tuple[str, ...]:
    built = _C.build_info()["cuda"]
    if not isinstance(built, dict):
        return ("this build has no CUDA kernels",)
    if not has_kernel(op):
        return (f"{op} has no CUDA kernel",)
    if torch.version.hip is not None:
        return ("this torch is built for ROCm",)
    capability = capability_of(index)
    if capability is None:
        return ("torch finds no CUDA device",)
    reason = capability_reason(capability, built["sm"], built["ptx"])
    return () if reason is None else (reason,)


def capability_reason(capability: tuple[int, int], sm: Sequence[int], ptx: int) -> str | None:
    """Why code for the architectures `sm`, and PTX of `ptx`, does not run on a device.

    Machine code runs on its own generation from its own minor version on, PTX on all later devices.
    """
    major, minor = capability
    if capability < LOWEST:
        return f"compute capability {major}.{minor} is below {LOWEST[0]}.{LOWEST[1]}"
    own = 10 * major + minor
    if own >= ptx or any(each // 10 == major and each <= own for each in sm):
        return None
    return f"compute capability {major}.{minor} has no code in this build, which has sm {list(sm)}"


@torch.compiler.assume_constant_result
def tf32_allowed() -> bool:
    """Whether torch's own float32 products may round to tf32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
