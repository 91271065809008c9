# SPDX-License-Identifier: Apache-2.0
"""Run-time switches: fused kernels on or off, and the CPU instruction-set cap.

Environment, read once at import:

- `FASTBB_FUSED` (default `1`): `0` starts with the plain PyTorch reference paths.
- `FASTBB_ISA` (default: best of the machine): upper limit of the instruction-set level,
  one of `fastbb.isa_levels()`; read by the extension itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fastbb import _C

_fused = os.environ.get("FASTBB_FUSED", "1") != "0"


def fused_enabled() -> bool:
    """True when public functions may choose the fused kernels."""
    return _fused


@contextlib.contextmanager
def use_fused(enabled: bool = True) -> Iterator[None]:
    """Within the block, public functions use (or do not use) the fused kernels."""
    global _fused
    before, _fused = _fused, bool(enabled)
    try:
        yield
    finally:
        _fused = before


def isa() -> str:
    """The instruction-set level that CPU kernels run at now, e.g. `"avx512"`."""
    return _C.isa()


def isa_levels() -> list[str]:
    """Levels that this build and this machine can run, weakest first."""
    return _C.isa_levels()


@contextlib.contextmanager
def cap_isa(level: str) -> Iterator[None]:
    """Within the block, CPU kernels run at `level` (process-wide, for tests and comparisons).

    Raises ValueError for a level that this build or this machine does not have.
    """
    before = _C.isa()
    if level not in _C.isa_levels():
        raise ValueError(f"cap_isa: level must be one of {_C.isa_levels()}, got {level!r}")
    _C.set_isa(level)
    try:
        yield
    finally:
        _C.set_isa(before)
