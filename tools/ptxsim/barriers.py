# SPDX-License-Identifier: Apache-2.0
"""Barriers of a block: who has arrived, who waits, and what their meeting orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ptxsim.errors import Deadlock, Divergence
from ptxsim.order import WARP

if TYPE_CHECKING:
    from ptxsim.machine import Machine

BARRIER_COUNT = 16


@dataclass
class Barrier:
    """One barrier between its first arrival and its completion."""

    expected: int
    arrived: np.ndarray
    waiting: np.ndarray
    row: np.ndarray
    lines: list[str] = field(default_factory=list)
    votes: list[tuple[np.ndarray, Any, Callable[..., None]]] = field(default_factory=list)


class Barriers:
    """The barriers of the block that runs."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.open: dict[int, Barrier] = {}

    def arrive(
        self,
        number: int,
        mask: np.ndarray,
        expected: int,
        wait: bool,
        vote: tuple[Any, Callable[..., None]] | None = None,
    ) -> None:
        """The lanes of `mask` arrive; if they wait, they stop until `expected` lanes are there.

        `vote` holds a value per lane and what to do with all values in the end.
        """
        m = self.machine
        if not 0 <= number < BARRIER_COUNT:
            raise Divergence(f"barrier {number}: there are {BARRIER_COUNT}")
        if expected % WARP or not 0 < expected <= m.lanes:
            raise Divergence(f"barrier {number}: {expected} is no number of threads of this block")
        lanes = mask | self._padding(mask)
        if number not in self.open and lanes.all() and wait:
            m.order.whole_block()
            m.stats.barriers[number] += 1
            self._finish(mask, [] if vote is None else [(mask, *vote)])
            return
        if number not in self.open:
            nobody = np.zeros(m.lanes, bool)
            row = np.zeros(m.lanes, np.int64)
            self.open[number] = Barrier(expected, nobody, nobody.copy(), row)
        barrier = self.open[number]
        if barrier.expected != expected:
            raise Divergence(
                f"barrier {number}: some expect {barrier.expected} threads, some {expected}"
            )
        if (barrier.arrived & mask).any():
            raise Divergence(f"barrier {number}: lanes arrive twice before it completes")
        barrier.row = np.maximum(barrier.row, m.order.release(lanes))
        barrier.arrived = barrier.arrived | lanes
        barrier.lines.append(m.current.location)
        if vote is not None:
            barrier.votes.append((mask, *vote))
        if wait:
            barrier.waiting = barrier.waiting | lanes
            m.runnable &= ~mask
        count = int(barrier.arrived.sum())
        if count > expected:
            raise Divergence(f"barrier {number}: {count} threads arrive, {expected} are expected")
        if count == expected:
            del self.open[number]
            m.stats.barriers[number] += 1
            if barrier.waiting.all():
                m.order.whole_block()
            else:
                m.order.acquire(barrier.waiting, barrier.row)
            self._finish(barrier.waiting & ~m.absent, barrier.votes)

    def _padding(self, mask: np.ndarray) -> np.ndarray:
        """Lanes that fill up the last warp of the block count as arrived with their warp."""
        warps = mask.reshape(-1, WARP).any(axis=1)
        return self.machine.absent & np.repeat(warps, WARP)

    def _finish(self, waiting: np.ndarray, votes: list) -> None:
        self.machine.runnable |= waiting
        if votes:
            values = np.concatenate([value[mask] for mask, value, _ in votes])
            for mask, _, write in votes:
                write(mask, values)

    def deadlock(self) -> Deadlock:
        """The error when no lane can go on."""
        m = self.machine
        left = int((m.done & ~m.absent).sum())
        parts = []
        for number, barrier in sorted(self.open.items()):
            lines = " | ".join(sorted(set(barrier.lines)))
            parts.append(
                f"barrier {number} has {int(barrier.arrived.sum())} of {barrier.expected} threads, "
                f"from {lines}"
            )
        return Deadlock(f"no thread can go on, {left} have exited; " + "; ".join(parts))
