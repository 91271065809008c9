# SPDX-License-Identifier: Apache-2.0
"""Honest comparison of callables: interleaved timing, peak memory, output differences.

What is compared must be compared first: `compare_outputs` comes before `interleaved` in every
command of this package.

**Time.** Candidates take turns within one run: every round calls each of them once, in a new
order. A slow phase of the machine then hits all of them, and the ratio of two candidates is the
median of their ratios per round, not a ratio of numbers from different minutes.

**Memory.** `peak_allocated_bytes` counts what PyTorch's CPU allocator holds at most at once during
one call, above what it held before: activations and temporary tensors, not parameters and inputs.
Kernels' own working memory (oneDNN's scratchpads, fastbb's per-thread tiles, loops compiled by
Inductor) is not torch-allocated; `peak_resident_bytes` shows what the whole process grew by,
which includes it, but also whatever the C allocator keeps for later.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of samples."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(samples: list[float] | tuple[float, ...]) -> Spread:
        if not samples:
            raise ValueError("Spread: samples must not be empty, got []")
        if len(samples) == 1:
            return Spread(*samples * 3)
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        return Spread(cuts[1], cuts[4], cuts[7])


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one sample per round."""

    samples: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        return Spread.of(self.samples)

    @property
    def p50(self) -> float:
        return self.spread.p50


Timer = Callable[[Callable[[], object], int], float]
"""(callable, number of calls) -> seconds per call."""


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    timer: Timer | None = None,
    rounds: int = 30,
    warmup: int = 2,
    sample_seconds: float = 0.0,
    max_seconds: float = math.inf,
    min_rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Times candidates in turns; see the module's text for why.

    Args:
        candidates: name -> callable without arguments.
        timer: measures one sample; by default `wall_seconds`.
        rounds: samples per candidate.
        warmup: untimed calls of each candidate before the first round.
        sample_seconds: a candidate faster than this is called several times per sample.
        max_seconds: no new round starts later than this, once `min_rounds` are done.
        progress: receives a short text now and then.

    Raises: ValueError without candidates or with rounds < 1.
    """
    if not candidates:
        raise ValueError("interleaved: candidates must not be empty, got {}")
    if rounds < 1:
        raise ValueError(f"interleaved: rounds must be at least 1, got {rounds}")
    timer = wall_seconds if timer is None else timer
    calls = {name: _warm_up(fn, timer, warmup, sample_seconds) for name, fn in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    with _no_garbage_collection():
        for done in range(rounds):
            if done >= min_rounds and time.perf_counter() - start > max_seconds:
                break
            shuffle(order)
            for name in order:
                samples[name].append(timer(candidates[name], calls[name]))
            if progress is not None:
                progress(f"round {done + 1} of {rounds}")
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def speed_up(baseline: Timing, candidate: Timing) -> Spread:
    """How many times faster the candidate is: percentiles of the ratios of equal rounds."""
    pairs = zip(baseline.samples, candidate.samples, strict=True)
    return Spread.of([a / b for a, b in pairs])


def _warm_up(fn: Callable[[], object], timer: Timer, warmup: int, sample_seconds: float) -> int:
    """Runs the untimed calls; returns how many calls make one sample."""
    fastest = math.inf
    for _ in range(max(warmup, 1)):
        fastest = min(fastest, timer(fn, 1))
    return max(1, math.ceil(sample_seconds / max(fastest, 1e-7)))


def wall_seconds(fn: Callable[[], object], calls: int) -> float:
    """Seconds per call by the clock, for what is done when it returns."""
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_allocated_bytes(fn: Callable[[], object], *, warmup: int = 1) -> int:
    """Most bytes that torch's CPU allocator held at once for one call, above its state before.

    Read from the memory events of `torch.profiler`. Only blocks that the call itself allocated
    are counted, so that releasing older blocks cannot hide anything.
    """
    # The profiler's library logs its own start and stop to stderr; it reads this at first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    for _ in range(warmup):
        fn()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        fn()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    return _peak_of_events(
        (e["args"]["Addr"], e["args"]["Bytes"]) for e in sorted(memory, key=lambda e: e["ts"])
    )


def _peak_of_events(events: Iterator[tuple[int, int]]) -> int:
    """Peak of (address, bytes) events, where negative bytes release the block at that address."""
    live: dict[int, int] = {}
    held = peak = 0
    for address, size in events:
        if size >= 0:
            live[address] = size
            held += size
            peak = max(peak, held)
        else:
            held -= live.pop(address, 0)
    return peak


def saved_bytes(fn: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `fn`, beyond the state of `module`.

    Views of one storage count once.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = fn()
    del result
    return sum(kept.values())


def peak_resident_bytes(fn: Callable[[], object], *, warmup: int = 1) -> int | None:
    """Growth of the process's resident memory during one call; None where the system has no
    resettable high-water mark (it needs Linux's /proc/self/clear_refs and glibc's malloc_trim).
    """
    for _ in range(warmup):
        fn()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = _proc_status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    fn()
    return max(0, _proc_status_bytes("VmHWM") - before)


def _proc_status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


@dataclass(frozen=True)
class Difference:
    """How far logits are from the expected ones."""

    max_abs: float
    mean_abs: float
    top1: float
    """Share of rows with the same largest class."""
    top5: float
    """Mean share of the expected five largest classes that are among the actual five."""


def compare_outputs(actual: Tensor, expected: Tensor) -> Difference:
    """Compares logits `[B, classes]` in float32. NaN anywhere gives infinite differences.

    Raises: ValueError when the shapes differ or are not `[B, classes]`.
    """
    if expected.dim() != 2 or actual.shape != expected.shape:
        raise ValueError(
            "compare_outputs: actual and expected must have the same shape [B, classes], got "
            f"{list(actual.shape)} and {list(expected.shape)}"
        )
    a, e = actual.detach().float(), expected.detach().float()
    gap = (a - e).abs()
    finite = bool(gap.isfinite().all())
    k = min(5, e.shape[1])
    best, wanted = a.topk(k).indices, e.topk(k).indices
    shared = (best[:, :, None] == wanted[:, None, :]).any(1).float().mean()
    return Difference(
        max_abs=gap.max().item() if finite else math.inf,
        mean_abs=gap.mean().item() if finite else math.inf,
        top1=(best[:, 0] == wanted[:, 0]).float().mean().item(),
        top5=shared.item(),
    )


@contextlib.contextmanager
def pinned_threads(count: int | None) -> Iterator[int]:
    """Within the block torch computes with `count` threads (None: as many as now); yields it.

    Raises: ValueError for a count below 1.
    """
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ValueError(f"pinned_threads: count must be at least 1, got {count}")
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def machine_info() -> dict[str, Any]:
    """What a reader of a measurement must know about machine, versions and threads."""
    import fastbb

    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": fastbb.isa(),
        "isa_levels": list(fastbb.isa_levels()),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fastbb": fastbb.build_info(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
