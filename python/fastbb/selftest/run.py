# SPDX-License-Identifier: Apache-2.0
"""Runs the self-test: operators x kinds of arithmetic x samples x targets."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastbb._console import Progress, UsageError
from fastbb.measure import pinned_threads
from fastbb.selftest.checks import CHECKS, Check, Outputs
from fastbb.selftest.targets import Target
from fastbb.testing import OutOfBounds, Sample


@dataclass(frozen=True)
class Options:
    """What to run."""

    ops: tuple[str, ...] = tuple(CHECKS)
    """Of `CHECKS`."""
    cases: tuple[str, ...] = ("*",)
    """Names of samples, or patterns with `*` and `?`."""


@dataclass
class Row:
    """One operator in one kind of arithmetic at one target."""

    op: str
    kind: str
    target: str
    cases: int = 0
    worst: float = 0.0
    """Largest error in units of its bound; above 1 only where a case failed."""
    worst_case: str = ""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(case, what is wrong)"""
    note: str = ""
    """Why nothing was run, or why not all of it."""


def run(options: Options, targets: Sequence[Target], progress: Progress) -> list[Row]:
    """Rows for every operator, kind and target.

    Raises: UsageError for an unknown operator, or cases that no operator has.
    """
    unknown = [op for op in options.ops if op not in CHECKS]
    if unknown:
        raise UsageError(f"--op must be among {', '.join(CHECKS)}, got {unknown[0]!r}")
    _check_cases(options)
    rows: list[Row] = []
    lost: set[str] = set()
    # The many small steps of exact results take longer with a team, above all on a busy machine.
    with pinned_threads(1):
        for op in options.ops:
            for kind in targets[0].kinds:
                if kind == "tf32" and not CHECKS[op].has_tf32:
                    continue
                progress.step(f"{op}, {kind}")
                rows += _Sweep(op, kind, targets, lost, progress).run(options.cases)
    progress.close()
    return rows


def _check_cases(options: Options) -> None:
    names = {op: [x.name for x in CHECKS[op].samples("cpu", torch.float32)] for op in CHECKS}
    everywhere = [name for each in names.values() for name in each]
    for pattern in options.cases:
        if not fnmatch.filter(everywhere, pattern):
            raise UsageError(f"--case {pattern!r} is the name of no sample")
    if not any(fnmatch.filter(names[op], each) for op in options.ops for each in options.cases):
        chosen = ", ".join(options.ops)
        raise UsageError(f"--case {', '.join(options.cases)} is the name of no sample of {chosen}")


class _Sweep:
    """All samples of one operator in one kind, at every target that has a kernel for it."""

    def __init__(
        self, op: str, kind: str, targets: Sequence[Target], lost: set[str], progress: Progress
    ) -> None:
        self.op, self.kind, self.lost, self.progress = op, kind, lost, progress
        self.check: Check = CHECKS[op]
        self.rows = {each.name: Row(op, kind, each.name) for each in targets}
        self.targets = [each for each in targets if self._can_run(each)]

    def _can_run(self, target: Target) -> bool:
        row = self.rows[target.name]
        if target.name in self.lost:
            row.note = "not run: the device was lost before"
            return False
        reasons = [reason for op in self.check.kernels for reason in target.reasons(op)]
        row.note = "; ".join(reasons)
        return not reasons

    def run(self, patterns: Sequence[str]) -> list[Row]:
        if not self.targets:
            return list(self.rows.values())
        dtype = self.targets[0].kinds[self.kind]
        # One sample per device at a time: levels of the CPU share theirs.
        elsewhere = {x.device: self.check.samples(x.device, dtype) for x in self.targets}
        for original in self.check.samples("cpu", dtype):
            samples: dict[torch.device, Sample] = {}
            chosen = any(fnmatch.fnmatchcase(original.name, pattern) for pattern in patterns)
            exact = self.check.exact(original) if chosen else {}
            for target in self.targets:
                if target.name in self.lost:
                    continue
                if target.device not in samples:
                    samples[target.device] = next(elsewhere[target.device])
                if chosen:
                    self._run_case(target, samples[target.device], exact)
            self.progress.update(original.name)
        return list(self.rows.values())

    def _run_case(self, target: Target, sample: Sample, exact: Outputs) -> None:
        row = self.rows[target.name]
        row.cases += 1
        try:
            share = self._compare(target, sample, exact)
        except OutOfBounds as error:
            share = error.share
            row.failures.append((sample.name, str(error)))
        # Whatever a call raises is a result of the test, not its end.
        except Exception as error:
            share = math.inf
            row.failures.append((sample.name, f"{type(error).__name__}: {error}"))
            if not target.alive():
                self.lost.add(target.name)
                row.note = f"stopped at {sample.name}: the device reports errors ever since"
        if share > row.worst:
            row.worst, row.worst_case = share, sample.name

    def _compare(self, target: Target, sample: Sample, exact: Outputs) -> float:
        job = self.check.job(sample, self.kind == "tf32")
        unrounded = "tf32" if self.kind == "tf32" else "f32"
        tolerance = target.tolerance(self.op, self.kind)
        tolerances = {name: tolerance for name in (*self.check.names, "grad")}
        # Float32 in every kind, as nothing after the products is rounded to 16 bits in it.
        tolerances["lse"] = target.tolerance(self.op, unrounded)
        runs = target.runs(job)
        name, first = next(runs)
        share = self.check.judge(first, exact, tolerances, sample.difficulty)
        for name, again in runs:
            changed = [key for key in first if not torch.equal(first[key], again[key])]
            if changed:
                message = f"{name}: other bits than in the first run in {', '.join(changed)}"
                raise OutOfBounds(message, math.inf)
        return share
