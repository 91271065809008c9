# SPDX-License-Identifier: Apache-2.0
"""Executes PTX on the CPU, for tests: what nvcc wrote for a kernel, checked access by access.

    module = ptxsim.load(Path("kernel.ptx"))
    out = ptxsim.Buffer(np.empty(128, np.float32), "out")
    result = module.launch("scale", grid=1, block=128, args=[ptxsim.Buffer(x), out, np.int32(128)])
    result[out], result.stats.bank_conflicts()

docs/verification.md says what a passing run proves and what it does not.
"""

from __future__ import annotations

from ptxsim.arena import Arena
from ptxsim.errors import (
    Deadlock,
    Divergence,
    LaunchError,
    Misaligned,
    OutOfBounds,
    PendingCopy,
    PtxError,
    Race,
    ReadOnly,
    Trap,
    Uninitialised,
    Unsupported,
)
from ptxsim.launch import Buffer, Module, Result, load

__all__ = [
    "Arena",
    "Buffer",
    "Deadlock",
    "Divergence",
    "LaunchError",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "PendingCopy",
    "PtxError",
    "Race",
    "ReadOnly",
    "Result",
    "Trap",
    "Uninitialised",
    "Unsupported",
    "load",
]
