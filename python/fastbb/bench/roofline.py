# SPDX-License-Identifier: Apache-2.0
"""Peaks of this machine: what shares of peak in the benchmarks refer to.

Those of the CPU are the best that torch itself reaches here with the same threads: its matrix
product (FLOP/s) and its copy of a tensor far larger than the caches (bytes/s, read plus write). A
kernel whose data stay in a cache can move more than 100 % of the latter. Those of well-known GPUs
are their data sheets', those of others are measured likewise.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastbb.measure import Timer
from fastbb.ops._cuda import tf32_allowed

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
        """Peak of the matrix product for inputs of `dtype`; float16 is widened to float32."""
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


@dataclass(frozen=True)
class DeviceRoofline:
    """Peaks of a CUDA device."""

    device: str
    source: str
    """`data sheet` or `measured`."""
    fp32_flops: float
    """FLOP/s of float32 products; through tf32 where torch allows that now."""
    half_flops: float
    """FLOP/s of float16 and bfloat16 products that are summed in float32, without sparsity."""
    copy_bytes: float
    """bytes/s of the device's memory."""

    def flops(self, dtype: torch.dtype) -> float:
        """Peak of the matrix product for inputs of `dtype`."""
        return self.fp32_flops if dtype == torch.float32 else self.half_flops

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Name in torch -> GB/s; TFLOP/s of float16 summed in float32, of tf32 and of float32, all without
# sparsity, from NVIDIA's data sheets and architecture white papers.
DATA_SHEETS: dict[str, tuple[float, float, float, float]] = {
    "NVIDIA A100-SXM4-40GB": (1555, 312, 156, 19.5),
    "NVIDIA A100-PCIE-40GB": (1555, 312, 156, 19.5),
    "NVIDIA A100-SXM4-80GB": (2039, 312, 156, 19.5),
    "NVIDIA A100 80GB PCIe": (1935, 312, 156, 19.5),
    "NVIDIA H100 80GB HBM3": (3350, 989.4, 494.7, 66.9),
    "NVIDIA H100 PCIe": (2000, 756, 378, 51),
    "NVIDIA H200": (4800, 989.4, 494.7, 66.9),
    "NVIDIA A10": (600, 125, 62.5, 31.2),
    "NVIDIA L4": (300, 121, 60, 30.3),
    "NVIDIA L40S": (864, 362, 183, 91.6),
    "NVIDIA GeForce RTX 3090": (936, 71, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": (1008, 165.2, 82.6, 82.6),
}
DEVICE_GEMM_SIZES = (2048, 4096, 8192)
DEVICE_COPY_BYTES = 2**30
_ROUNDS = 10


def device_roofline(name: str, device: torch.device, timer: Timer) -> DeviceRoofline:
    """Peaks of the device of this name: of `DATA_SHEETS`, or measured on `device`."""
    if name in DATA_SHEETS:
        bandwidth, half, tf32, fp32 = DATA_SHEETS[name]
        single = tf32 if tf32_allowed() else fp32
        return DeviceRoofline(name, "data sheet", single * 1e12, half * 1e12, bandwidth * 1e9)

    def best(fn: Callable[[], object]) -> float:
        fn()
        return min(timer(fn, 1) for _ in range(_ROUNDS))

    def gemm_flops(size: int, dtype: torch.dtype) -> float:
        a, b, out = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
        return 2.0 * size**3 / best(lambda: torch.mm(a, b, out=out))

    source = torch.ones(DEVICE_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        return DeviceRoofline(
            device=name,
            source="measured",
            fp32_flops=max(gemm_flops(size, torch.float32) for size in DEVICE_GEMM_SIZES),
            half_flops=max(gemm_flops(size, torch.float16) for size in DEVICE_GEMM_SIZES),
            copy_bytes=2.0 * DEVICE_COPY_BYTES / best(lambda: target.copy_(source)),
        )
