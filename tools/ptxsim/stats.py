# SPDX-License-Identifier: Apache-2.0
"""What a launch did: instructions, bank conflicts of shared accesses, sectors of global ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ptxsim.order import WARP

BANKS = 32
SECTOR = 32


@dataclass
class Site:
    """Accesses of one instruction of the program.

    Attributes:
        text: the PTX instruction.
        source: its line in the source, if known.
        requests: how often a warp executed it (global), or phases of such (shared).
        cost: sectors of 32 bytes moved (global), or passes over the banks (shared).
        worst: the largest cost of one request or phase.
        ideal: the least cost these accesses could have had.
    """

    text: str
    source: str
    requests: int = 0
    cost: int = 0
    worst: int = 0
    ideal: int = 0


@dataclass
class Stats:
    """Counts over all blocks of a launch.

    Attributes:
        opcodes: instructions executed by warps, by opcode with modifiers.
        lines: the same by PTX line; a line that is not there was not executed.
        barriers: how often a barrier of a block completed, by barrier number.
        shared: bank conflicts by PTX line. A phase of degree n takes n passes.
        global_: sectors by PTX line.
    """

    opcodes: Counter[str] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)
    barriers: Counter[int] = field(default_factory=Counter)
    shared: dict[int, Site] = field(default_factory=dict)
    global_: dict[int, Site] = field(default_factory=dict)

    @property
    def warp_instructions(self) -> int:
        return sum(self.opcodes.values())

    def count(self, prefix: str) -> int:
        """Warp instructions whose opcode begins with `prefix`."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))

    def bank_conflicts(self, prefix: str = "") -> int:
        """The worst degree of a shared access whose instruction begins with `prefix`; 1 is none."""
        return max((s.worst for s in self.shared.values() if s.text.startswith(prefix)), default=0)

    def sector_overhead(self, prefix: str = "") -> float:
        """Sectors moved per sector needed, of global accesses that begin so; 1 is best."""
        sites = [site for site in self.global_.values() if site.text.startswith(prefix)]
        ideal = sum(site.ideal for site in sites)
        return sum(site.cost for site in sites) / ideal if ideal else 0.0


def _memo_key(lanes: np.ndarray, addresses: np.ndarray, unit: int) -> tuple[bytes, bytes]:
    base = int(addresses[0]) // unit * unit
    return lanes.tobytes(), (addresses - base).tobytes()


class Recorder:
    """Adds accesses to Stats. Costs are remembered by pattern: loops repeat theirs."""

    def __init__(self, stats: Stats) -> None:
        self.stats = stats
        self._bank_memo: dict[tuple, tuple[int, int, int]] = {}
        self._sector_memo: dict[tuple, tuple[int, int, int, int]] = {}

    def shared(self, site: Site, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        """A shared access: a warp's 8-byte accesses take two phases, 16-byte ones four."""
        memo = (size, *_memo_key(lanes, offsets, BANKS * 4))
        if memo not in self._bank_memo:
            self._bank_memo[memo] = bank_passes(lanes, offsets, size)
        phases, passes, worst = self._bank_memo[memo]
        site.requests += phases
        site.ideal += phases
        site.cost += passes
        site.worst = max(site.worst, worst)

    def global_(self, site: Site, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        """A global access; `offsets` are addresses."""
        signed = offsets.view(np.int64)
        memo = (size, *_memo_key(lanes, signed, SECTOR))
        if memo not in self._sector_memo:
            self._sector_memo[memo] = sectors(lanes, signed, size)
        requests, moved, worst, ideal = self._sector_memo[memo]
        site.requests += requests
        site.ideal += ideal
        site.cost += moved
        site.worst = max(site.worst, worst)


def bank_passes(lanes: np.ndarray, offsets: np.ndarray, size: int) -> tuple[int, int, int]:
    """Phases, passes over the banks in all of them, and the most passes in one phase.

    Lanes of a phase that read the same 4-byte word share it; different words of one bank do not.
    """
    per_phase = WARP * 4 // max(size, 4)
    phase = lanes // per_phase
    words = (offsets[:, None] + np.arange(0, max(size, 4), 4)) // 4
    pairs = np.unique(np.stack([np.repeat(phase, words.shape[1]), words.reshape(-1)]), axis=1)
    of_phase, number = np.unique(pairs[0], return_inverse=True)
    counts = np.bincount(number * BANKS + pairs[1] % BANKS, minlength=len(of_phase) * BANKS)
    degree = counts.reshape(-1, BANKS).max(axis=1)
    return len(of_phase), int(degree.sum()), int(degree.max())


def sectors(lanes: np.ndarray, addresses: np.ndarray, size: int) -> tuple[int, int, int, int]:
    """Requests, sectors moved, the most sectors of one request, and the fewest possible.

    The fewest possible is what the distinct bytes of a request would fill if they were contiguous.
    """
    warp = lanes // WARP
    requests, number = np.unique(warp, return_inverse=True)
    moved = np.unique(np.stack([number, addresses // SECTOR]), axis=1)
    per_request = np.bincount(moved[0], minlength=len(requests))
    distinct = np.unique(np.stack([number, addresses]), axis=1)
    needed = -(-np.bincount(distinct[0], minlength=len(requests)) * size // SECTOR)
    return len(requests), int(per_request.sum()), int(per_request.max()), int(needed.sum())
