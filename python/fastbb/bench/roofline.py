# SPDX-License-Identifier: Apache-2.0
"""Measured peaks of this machine: what shares of peak in the benchmarks refer to.

Peaks are the best that torch itself reaches here with the same threads: its matrix product
(FLOP/s) and its copy of a tensor far larger than the caches (bytes/s, read plus write). A kernel
whose data stay in a cache can move more than 100 % of the latter.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

GEMM_SIZES = (512, 1024, 2048)
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Roofline:
    """Peaks at one thread count."""

    threads: int
    fp32_flops: float
    """FLOP/s of the float32 matrix product."""
    bf16_flops: float
    """FLOP/s of the bfloat16 matrix product."""
    copy_bytes: float
    """bytes/s, read plus write."""

    def flops(self, dtype: torch.dtype) -> float:
        """Peak of the matrix product for inputs of `dtype`."""
        return self.bf16_flops if dtype == torch.bfloat16 else self.fp32_flops

    def least_seconds(self, flops: float, bytes_moved: float, dtype: torch.dtype) -> float:
        """Time below which no layer with this work can come, by these peaks."""
        return max(flops / self.flops(dtype), bytes_moved / self.copy_bytes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_roofline() -> Roofline:
    """Peaks at the present thread count; measured once per process and thread count."""
    return _measure(torch.get_num_threads())


@functools.cache
def _measure(threads: int) -> Roofline:
    with torch.inference_mode():
        return Roofline(
            threads=threads,
            fp32_flops=max(_gemm_flops(size, torch.float32) for size in GEMM_SIZES),
            bf16_flops=max(_gemm_flops(size, torch.bfloat16) for size in GEMM_SIZES),
            copy_bytes=_copy_bytes_per_second(),
        )


def _gemm_flops(size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return 2.0 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out))


def _copy_bytes_per_second() -> float:
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2.0 * COPY_BYTES / _best_seconds(lambda: target.copy_(source))


def _best_seconds(fn: Callable[[], object], budget: float = 0.3, least: int = 5) -> float:
    """The fastest call within `budget` seconds: a peak is a best case."""
    fn()
    best = float("inf")
    start = time.perf_counter()
    calls = 0
    while calls < least or time.perf_counter() - start < budget:
        before = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - before)
        calls += 1
    return best
