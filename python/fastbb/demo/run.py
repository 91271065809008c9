# SPDX-License-Identifier: Apache-2.0
"""Compares and times one model in all its ways; what the demo and the model benchmark share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbb._console import Progress, WrongResult
from fastbb.demo.candidates import EAGER, OURS, OURS_BF16, Candidate, build_candidates
from fastbb.layer_time import layer_times
from fastbb.measure import (
    Difference,
    Timing,
    compare_outputs,
    interleaved,
    peak_allocated_bytes,
    peak_resident_bytes,
    speed_up,
)

FP32_TOLERANCE = 1e-3
"""Largest accepted difference of float32 logits between fastbb and the library's model."""


class WrongOutput(WrongResult):
    """fastbb's float32 logits are not the library's; nothing is timed."""


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    batches: tuple[int, ...] = (1, 8)
    rounds: int = 20
    warmup: int = 2
    seconds: float = 60.0
    """Per batch size; a round that has begun is finished, and at least five are run."""
    layer_runs: int = 5
    compile: bool = True
    compile_bf16: bool = False


def measure_model(
    model: nn.Module, images: Tensor, options: Options, progress: Progress
) -> dict[str, Any]:
    """Everything about one model, ready for `json.dumps`.

    Args:
        model: library model in evaluation mode, float32 on the CPU. It is not changed.
        images: `[max(batches), 3, H, W]` preprocessed images.

    Raises: WrongOutput when fastbb's float32 logits differ by more than `FP32_TOLERANCE`;
    UsageError when there is nothing to accelerate.
    """
    candidates, report = build_candidates(model, options.compile, options.compile_bf16, progress)
    with torch.inference_mode():
        logits = model(images)
        batches = [
            _measure_batch(candidates, images[:batch], options, progress)
            for batch in options.batches
        ]
    return {
        "acceleration": report.to_dict(),
        "logit_spread": logits.std(0).mean().item() if len(images) > 1 else None,
        "classes": logits.shape[1],
        "top1": logits.argmax(1).tolist(),
        "rows": [row for rows, _ in batches for row in rows],
        "failures": {c.name: c.failure for c in candidates if c.failure is not None},
        "layer_times": [times for _, times in batches],
    }


def _measure_batch(
    candidates: Sequence[Candidate], images: Tensor, options: Options, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    batch = len(images)
    differences = _compare(candidates, images, progress)
    alive = [c for c in candidates if c.failure is None]
    inputs = {c.name: images.to(c.dtype) for c in alive}
    calls = {c.name: _call(c, inputs[c.name]) for c in alive}

    progress.step(f"batch {batch}: measuring peak memory")
    # The comparison has already warmed up every candidate.
    peaks = {name: peak_allocated_bytes(call, warmup=0) for name, call in calls.items()}
    resident = {name: peak_resident_bytes(call, warmup=0) for name, call in calls.items()}
    progress.step(f"batch {batch}: timing {len(calls)} candidates in turns")
    times = interleaved(
        calls,
        rounds=options.rounds,
        warmup=options.warmup,
        max_seconds=options.seconds,
        progress=progress.update,
    )
    progress.step(f"batch {batch}: timing layers")
    layers = layer_times(
        {c.name: (c.module, inputs[c.name]) for c in alive if not c.compiled},
        runs=options.layer_runs,
        progress=progress.update,
    )
    rows = [
        {
            "batch": batch,
            "candidate": name,
            "seconds": dataclasses.asdict(timing.spread),
            "images_per_second": batch / timing.p50,
            "speed_up_over_eager": dataclasses.asdict(speed_up(times[EAGER], timing)),
            "fastbb_speed_up": dataclasses.asdict(speed_up(timing, _fastbb_time(name, times))),
            "peak_allocated_bytes": peaks[name],
            "peak_resident_bytes": resident[name],
            "difference": dataclasses.asdict(differences[name]),
        }
        for name, timing in times.items()
    ]
    flat = {
        name: [{"stage": s, "kind": k, "seconds": t} for (s, k), t in seconds.items()]
        for name, seconds in layers.items()
    }
    return rows, {"batch": batch, "candidates": flat}


def _fastbb_time(name: str, times: dict[str, Timing]) -> Timing:
    """The uncompiled fastbb candidate with the dtype of candidate `name`."""
    return times[OURS_BF16 if name.endswith("bf16") else OURS]


def _call(candidate: Candidate, x: Tensor) -> Any:
    return lambda: candidate.run(x)


def _compare(
    candidates: Sequence[Candidate], images: Tensor, progress: Progress
) -> dict[str, Difference]:
    """Differences to the eager float32 logits; marks candidates that cannot run."""
    batch = len(images)
    expected = next(c for c in candidates if c.name == EAGER).run(images)
    differences = {}
    for candidate in candidates:
        if candidate.failure is not None:
            continue
        progress.step(f"batch {batch}: comparing {candidate.name}")
        doing = "compiling" if candidate.compiled else "running"
        try:
            with progress.waiting(doing):
                actual = candidate.run(images.to(candidate.dtype))
        except Exception as error:
            # Compilers fail in many ways (no C++ compiler, unsupported code); the table goes on.
            if not candidate.compiled:
                raise
            candidate.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            progress.step(f"  {candidate.name} failed: {candidate.failure}")
            continue
        found = differences[candidate.name] = compare_outputs(actual, expected)
        if candidate.name == OURS and not found.max_abs <= FP32_TOLERANCE:
            raise WrongOutput(
                f"fastbb's float32 logits differ from the library's by {found.max_abs:.3g} at "
                f"batch {batch}, allowed is {FP32_TOLERANCE}: please report this as a bug"
            )
    return differences
