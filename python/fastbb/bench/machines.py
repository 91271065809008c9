# SPDX-License-Identifier: Apache-2.0
"""What a benchmark runs on: the CPU, or a CUDA device with times from its own events.

**Time on CUDA devices** is that of the device. Before each sample a buffer larger than the L2 cache
is written, so that inputs come from memory as between the layers of a model; then the device sleeps
while the host puts all launches into its queue, so that what launches cost the host is left out. A
candidate of many small kernels is better off in this than in a program that is bound by its host.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastbb._console import UsageError
from fastbb.bench.cuda_peers import Layer, cuda_layers
from fastbb.bench.roofline import DeviceRoofline, Roofline, device_roofline, measure_roofline
from fastbb.cuda_facts import cuda_info, reasons_against
from fastbb.measure import peak_allocated_bytes, wall_seconds

SLEEP_CYCLES = 10_000_000
"""Some milliseconds, in which the host launches a forward and backward of eager attention."""
LEAST_FLUSH_BYTES = 64 * 2**20


class Machine(abc.ABC):
    """Device of the tensors, and how time and memory are measured on it.

    Attributes:
        sample_seconds: what is faster is called several times per sample.
        rounds: samples per candidate unless the user asks for another number.
    """

    device: torch.device
    sample_seconds: float
    rounds: int

    @abc.abstractmethod
    def seconds(self, fn: Callable[[], object], calls: int) -> float:
        """Seconds per call: a `measure.Timer`."""

    @abc.abstractmethod
    def peak_bytes(self, fn: Callable[[], object]) -> int:
        """Most bytes that torch's allocator held at once in one call, above what it held before."""

    @abc.abstractmethod
    def roofline(self) -> Roofline | DeviceRoofline:
        """Peaks that shares refer to."""

    def further_layers(self, compile: bool) -> Mapping[str, Layer]:
        """Peers beyond those of the CPU; one without a kernel for a layer is left out there."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What a reader must know beyond `measure.machine_info`."""
        return {}


class CpuMachine(Machine):
    """The CPU."""

    device = torch.device("cpu")
    sample_seconds = 0.005
    rounds = 15

    def seconds(self, fn: Callable[[], object], calls: int) -> float:
        return wall_seconds(fn, calls)

    def peak_bytes(self, fn: Callable[[], object]) -> int:
        return peak_allocated_bytes(fn, warmup=0)

    def roofline(self) -> Roofline:
        return measure_roofline()


class CudaMachine(Machine):
    """One CUDA device, which becomes torch's current one.

    Args:
        device: where tensors are made.
        cuda: what `torch.cuda` offers of events and memory; another object where tests have no
            device.
    """

    sample_seconds = 0.0  # one call per sample, each with a cold cache
    rounds = 100

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self._cuda = cuda
        cuda.set_device(device)
        self._properties = cuda.get_device_properties(device)
        size = max(2 * self._properties.L2_cache_size, LEAST_FLUSH_BYTES)
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def seconds(self, fn: Callable[[], object], calls: int) -> float:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        self._cuda._sleep(SLEEP_CYCLES)
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def peak_bytes(self, fn: Callable[[], object]) -> int:
        self._cuda.synchronize(self.device)
        before = self._cuda.memory_allocated(self.device)
        self._cuda.reset_peak_memory_stats(self.device)
        fn()
        self._cuda.synchronize(self.device)
        return self._cuda.max_memory_allocated(self.device) - before

    def roofline(self) -> DeviceRoofline:
        return device_roofline(self._properties.name, self.device, self.seconds)

    def further_layers(self, compile: bool) -> Mapping[str, Layer]:
        return cuda_layers(compile)

    def facts(self) -> dict[str, Any]:
        return {"cuda": cuda_info([self.device.index], self._cuda)}


def find_machine(name: str, ops: Sequence[str]) -> Machine:
    """The machine behind `cpu`, `cuda` or `cuda:1`, where all the operators have kernels.

    Raises: UsageError with the reason where there is none.
    """
    if name == "cpu":
        return CpuMachine()
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise UsageError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    device = torch.device("cuda", int(index or 0))
    if torch.cuda.is_available() and device.index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices")
    if reasons := reasons_against(ops, [device.index]):
        raise UsageError(f"--device {name}: {'; '.join(reasons)}")
    return CudaMachine(device)
