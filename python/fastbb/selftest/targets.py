# SPDX-License-Identifier: Apache-2.0
"""Where the self-test runs: the CPU at one level of its instruction set, or one CUDA device."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbb import config
from fastbb._console import UsageError
from fastbb.cuda_facts import reasons_against
from fastbb.measure import pinned_threads
from fastbb.ops import _cuda
from fastbb.selftest.checks import Job, Outputs
from fastbb.testing import CUDA_KINDS, CUDA_TOLERANCES, TOLERANCES, Tolerance

SLEEP_CYCLES = 10_000_000
"""How long inputs are late in the check of streams: some milliseconds, many launches' worth."""


class Target(abc.ABC):
    """One place to run at.

    Attributes:
        name: as the report names it, e.g. `avx2` or `cuda:0`.
        device: of the tensors.
        kinds: kind of arithmetic -> dtype of the tensors.
    """

    name: str
    device: torch.device
    kinds: dict[str, torch.dtype]

    @abc.abstractmethod
    def reasons(self, op: str) -> list[str]:
        """Why an operator does not run here; empty when it does."""

    @abc.abstractmethod
    def tolerance(self, op: str, kind: str) -> Tolerance:
        """Bounds of an operator (without the namespace) here."""

    @abc.abstractmethod
    def runs(self, job: Job) -> Iterator[tuple[str, Outputs]]:
        """Runs the job several times, in different circumstances that must not change a bit."""

    def alive(self) -> bool:
        """Whether later runs can still succeed after one failed."""
        return True


class CpuTarget(Target):
    """The CPU at one instruction-set level, with `threads` threads and with another number."""

    def __init__(self, level: str, threads: int) -> None:
        self.name = level
        self.threads = threads
        self.device = torch.device("cpu")
        self.kinds = {kind: dtype for kind, dtype in CUDA_KINDS.items() if kind != "tf32"}

    def reasons(self, op: str) -> list[str]:
        return []

    def tolerance(self, op: str, kind: str) -> Tolerance:
        return TOLERANCES[f"fastbb::{op}"][self.kinds[kind]]

    def runs(self, job: Job) -> Iterator[tuple[str, Outputs]]:
        counts = (self.threads, 2 if self.threads == 1 else 1)
        for run, count in zip(("first", "second"), counts, strict=True):
            with config.cap_isa(self.name), pinned_threads(count):
                outputs = job.run()
            yield f"{run} run, {count} threads", outputs


class CudaTarget(Target):
    """One CUDA device.

    Args:
        device: where tensors are made.
        cuda: what `torch.cuda` offers of streams; another object where tests have no device.
        reasons: operator -> reasons against its kernel; by default those of `fastbb.ops`.
    """

    def __init__(
        self,
        device: torch.device,
        cuda: Any = torch.cuda,
        reasons: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.name = str(device)
        self.device = device
        self.kinds = CUDA_KINDS
        self._cuda = cuda
        self._reasons = reasons

    def reasons(self, op: str) -> list[str]:
        if self._reasons is not None:
            return self._reasons(op)
        return _cuda.cuda_reasons(op, self.device.index)

    def tolerance(self, op: str, kind: str) -> Tolerance:
        return CUDA_TOLERANCES[f"fastbb::{op}"][kind]

    def runs(self, job: Job) -> Iterator[tuple[str, Outputs]]:
        first = job.run()
        self._cuda.synchronize(self.device)
        yield "first run", first
        second = job.run()
        self._cuda.synchronize(self.device)
        yield "second run", second
        yield "run on another stream", self._run_on_another_stream(job)

    def alive(self) -> bool:
        # An error inside a kernel stays with the process: every later call reports it again.
        try:
            self._cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def _run_on_another_stream(self, job: Job) -> Outputs:
        """Runs where inputs arrive late, on a stream that no other stream waits for. A launch on
        any other stream reads what lies there before: NaN.
        """
        memory = [_bytes_of(storage) for storage in _storages(job.inputs())]
        saved = [each.clone() for each in memory]
        for each in memory:
            each.fill_(0xFF)
        stream = self._cuda.Stream(self.device)
        self._cuda.synchronize(self.device)
        with self._cuda.stream(stream):
            self._cuda._sleep(SLEEP_CYCLES)
            for each, content in zip(memory, saved, strict=True):
                each.copy_(content)
            outputs = job.run()
        self._cuda.synchronize(self.device)
        return outputs


def _storages(tensors: list[Tensor]) -> list[torch.UntypedStorage]:
    """Those with content, once each: views of one tensor share theirs."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return [storage for storage in storages.values() if storage.nbytes()]


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def cpu_targets() -> list[Target]:
    """The CPU at every level that this build and machine can run."""
    return [CpuTarget(level, torch.get_num_threads()) for level in config.isa_levels()]


def cuda_targets(ops: list[str]) -> list[Target]:
    """Every CUDA device that runs at least one of the operators.

    Raises: UsageError, with the reasons, when there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    targets: list[Target] = [CudaTarget(torch.device("cuda", index)) for index in range(count)]
    usable = [each for each in targets if not all(each.reasons(op) for op in ops)]
    if usable:
        return usable
    # Without a device the first index asks for what is wrong with all of them.
    reasons = reasons_against(ops, range(max(count, 1)))
    raise UsageError("no usable CUDA device: " + "; ".join(reasons))
