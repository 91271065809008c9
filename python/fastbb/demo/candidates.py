# SPDX-License-Identifier: Apache-2.0
"""The ways of running one model that the demo and the model benchmark compare."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastbb
from fastbb._console import Progress, UsageError
from fastbb.accelerate import SUPPORTED, Report

EAGER = "eager fp32"
OURS = "fastbb fp32"
OURS_BF16 = "fastbb bf16"
COMPILED = "torch.compile fp32"


@dataclass
class Candidate:
    """One way of running the model. Inputs must have `dtype`."""

    name: str
    dtype: torch.dtype
    run: Callable[[Tensor], Tensor]
    module: nn.Module
    """The model itself; for a compiled candidate the one that was compiled."""
    compiled: bool = False
    failure: str | None = None
    """Why it could not run; None while it can."""


def build_candidates(
    model: nn.Module, compile: bool, compile_bf16: bool, progress: Progress
) -> tuple[list[Candidate], Report]:
    """Candidates in the order of the table, and the report of the float32 acceleration.

    `model` stays untouched: fastbb works on copies.

    Raises: UsageError when `model` has nothing to accelerate.
    """
    fast = copy.deepcopy(model)
    report = fastbb.accelerate_(fast)
    if not report.swapped:
        raise UsageError(
            f"--model must have attention that fastbb accelerates ({', '.join(SUPPORTED)}), "
            f"got:\n{report}"
        )
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    fast_narrow = copy.deepcopy(model)
    fastbb.accelerate_(fast_narrow, dtype=torch.bfloat16)

    plain = [
        Candidate(EAGER, torch.float32, model, model),
        Candidate("eager bf16", torch.bfloat16, narrow, narrow),
        Candidate(OURS, torch.float32, fast, fast),
        Candidate(OURS_BF16, torch.bfloat16, fast_narrow, fast_narrow),
    ]
    compiled = []
    if compile:
        compiled.append(_compiled(COMPILED, model, torch.float32))
        compiled.append(_compiled("fastbb + torch.compile fp32", fast, torch.float32))
    if compile and compile_bf16:
        compiled.append(_compiled("torch.compile bf16", narrow, torch.bfloat16))
        compiled.append(_compiled("fastbb + torch.compile bf16", fast_narrow, torch.bfloat16))
    progress.step(summary(report))
    order = (EAGER, COMPILED, "eager bf16", "torch.compile bf16", OURS, OURS_BF16)
    candidates = plain + compiled
    candidates.sort(key=lambda c: order.index(c.name) if c.name in order else len(order))
    return candidates, report


def _compiled(name: str, module: nn.Module, dtype: torch.dtype) -> Candidate:
    return Candidate(name, dtype, torch.compile(module, dynamic=False), module, compiled=True)


def summary(report: Report) -> str:
    """Few lines: how many modules of which class were swapped or skipped, and for what."""
    lines = [f"accelerated {report.model}: {len(report.swapped)} modules swapped"]
    for (name, fused), count in Counter((n, f) for _, n, f in report.swapped).items():
        lines.append(f"  {count} x {name}: {fused}")
    for (name, reason), count in Counter((n, r) for _, n, r in report.skipped).items():
        lines.append(f"  skipped {count} x {name}: {reason}")
    return "\n".join(lines)
