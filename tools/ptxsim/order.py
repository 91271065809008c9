# SPDX-License-Identifier: Apache-2.0
"""Which accesses are ordered before which: a clock, and what each lane has seen of the others.

Time advances at every synchronisation. An access is remembered as a key, (time, lane). It is
ordered before what lane l does now if its time lies before the last barrier of the whole block, or
before `seen[l, lane]`, the latest time that l has synchronised with that lane through others.
"""

from __future__ import annotations

import numpy as np

LANE_BITS = 11
LANE_MASK = (1 << LANE_BITS) - 1
ATOMIC = 1 << 10  # the lane of an access that was an atomic operation
WARP = 32


class Order:
    """The clock of one launch, reset for every block without forgetting earlier times."""

    def __init__(self, lanes: int, now: int) -> None:
        self.lanes = lanes
        self.now = now + 1
        self.launch = self.block = self.full = self.now
        self.seen = np.zeros((lanes, lanes), np.int64)
        self.warp_sync = np.zeros(lanes // WARP, np.int64)

    def start_block(self) -> None:
        self.now += 1
        self.block = self.full = self.now

    def whole_block(self) -> None:
        """All lanes met: everything before is ordered before everything after."""
        self.now += 1
        self.full = self.now

    def release(self, mask: np.ndarray) -> np.ndarray:
        """What a lane learns by synchronising with the lanes of `mask`; they go on afterwards."""
        self.now += 1
        row = self.seen[mask].max(axis=0)
        row[mask] = self.now
        return row

    def acquire(self, mask: np.ndarray, row: np.ndarray) -> None:
        """The lanes of `mask` learn `row`."""
        self.seen[mask] = np.maximum(self.seen[mask], row)
        self.warp_sync[mask.reshape(-1, WARP).all(axis=1)] = self.now

    def meet_warps(self, mask: np.ndarray) -> None:
        """In every warp, its lanes in `mask` wait for each other."""
        by_warp = mask.reshape(-1, WARP)
        for warp in np.nonzero(by_warp.any(axis=1))[0]:
            lanes = np.zeros_like(mask)
            lanes[warp * WARP : (warp + 1) * WARP] = by_warp[warp]
            self.acquire(lanes, self.release(lanes))

    def key(self, lanes: np.ndarray) -> np.ndarray:
        return (self.now << LANE_BITS) | lanes

    def unordered(self, keys: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Which accesses `keys` [n, bytes] are not ordered before what `lanes` [n] do now."""
        times, owners = keys >> LANE_BITS, keys & LANE_MASK
        late = times >= self.full
        if not late.any():
            return late
        me = lanes[:, None]
        known = np.where(
            owners < ATOMIC,
            self.seen[me, np.minimum(owners, self.lanes - 1)],
            self.seen[lanes].min(axis=1)[:, None],
        )
        return late & (owners != me) & (times >= known)
