# SPDX-License-Identifier: Apache-2.0
"""Shared memory of a block: bytes, who touched each last, and asynchronous copies under way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptxsim.arena import rows, set_rows
from ptxsim.errors import Misaligned, OutOfBounds, PendingCopy, Race, Uninitialised
from ptxsim.order import ATOMIC, LANE_BITS, LANE_MASK, WARP, Order

# Shared memory does not begin at address 0, as on sm_90: a forgotten base is out of bounds.
SHARED_START = 1024
INIT, PENDING = np.uint8(1), np.uint8(2)
MANY = WARP  # the lane of a byte that several lanes of one warp read
READER_BITS = 6


@dataclass
class Copy:
    """cp.async instructions of several lanes: destinations, data, and the group each belongs to."""

    lanes: np.ndarray
    offsets: np.ndarray
    size: int
    data: np.ndarray
    groups: np.ndarray


class Shared:
    """Shared memory of the block that runs, reset for every block."""

    def __init__(self, size: int, order: Order) -> None:
        self.size = size
        self.order = order
        room = (size + 15) // 16 * 16 + 16
        self.room = room
        warps = order.lanes // WARP
        self.data = np.zeros(room, np.uint8)
        self.state = np.zeros(room, np.uint8)
        self.writer = np.zeros(room, np.int64)
        self.last_read = np.zeros(room, np.int64)
        self.reader = np.zeros(warps * room, np.int64)
        self.copies: list[Copy] = []
        self.committed = np.zeros(order.lanes, np.int64)

    def reset(self) -> None:
        self.data[:] = 0xCD
        self.state[:] = 0
        self.copies = []
        self.committed[:] = 0

    def locate(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Offsets into `data` of accesses of `size` bytes at shared addresses."""
        offset = addresses.astype(np.int64) - SHARED_START
        odd = offset & (size - 1)
        if odd.any():
            i = int(np.argmax(odd != 0))
            raise Misaligned(f"lane {lanes[i]}: {size}-byte shared access at byte {offset[i]}")
        bad = (offset < 0) | (offset + size > self.size)
        if bad.any():
            i = int(np.argmax(bad))
            raise OutOfBounds(
                f"lane {lanes[i]}: {size}-byte shared access at byte {offset[i]} of {self.size}"
            )
        return offset

    def _race(self, what: str, byte: int, lane: int, other: str) -> Race:
        return Race(f"lane {lane} {what} shared byte {byte}, {other}, with no barrier between")

    def _check_writer(self, what: str, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        keys = rows(self.writer, offsets, size)
        if not (keys >= (self.order.full << LANE_BITS)).any():
            return
        bad = self.order.unordered(keys, lanes)
        if what == "atomically updates":
            bad &= (keys & LANE_MASK) != ATOMIC
        if bad.any():
            i, j = np.argwhere(bad)[0]
            owner = int(keys[i, j]) & LANE_MASK
            by = "an atomic" if owner == ATOMIC else f"lane {owner}"
            raise self._race(what, int(offsets[i] + j), int(lanes[i]), f"written by {by}")

    def _check_pending(self, what: str, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        state = rows(self.state, offsets, size)
        pending = (state & PENDING) != 0
        if pending.any():
            i, j = np.argwhere(pending)[0]
            raise PendingCopy(
                f"lane {lanes[i]} {what} shared byte {offsets[i] + j} while an asynchronous copy "
                "to it has not been waited for"
            )
        if what != "reads":
            return
        missing = state == 0
        if missing.any():
            i, j = np.argwhere(missing)[0]
            raise Uninitialised(f"lane {lanes[i]} reads shared byte {offsets[i] + j}")

    def read(self, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        """Checks and records reads of `size` bytes."""
        order = self.order
        self._check_pending("reads", lanes, offsets, size)
        self._check_writer("reads", lanes, offsets, size)
        warp = lanes // WARP
        mine = lanes % WARP
        flat = warp * self.room + offsets
        before = rows(self.reader, flat, size)
        since = np.maximum(order.full, order.warp_sync[warp])[:, None]
        others = (before >> READER_BITS >= since) & (before & 63 != mine[:, None])
        now = order.now << READER_BITS
        set_rows(self.reader, flat, size, np.where(others, now | MANY, (now | mine)[:, None]))
        # Lanes of one warp that read the same bytes in this instruction.
        entry = self.reader[flat]
        double = (entry & 63 != mine) & (entry & 63 != MANY)
        if double.any():
            set_rows(self.reader, flat[double], size, now | MANY)
        set_rows(self.last_read, offsets, size, order.now)

    def _check_readers(self, what: str, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
        order = self.order
        recent = (rows(self.last_read, offsets, size) >= order.full).any(axis=1)
        if not recent.any():
            return
        lanes, offsets = lanes[recent], offsets[recent]
        warps = order.lanes // WARP
        seen = order.seen[lanes].copy()
        seen[np.arange(len(lanes)), lanes] = np.iinfo(np.int64).max
        oldest = seen.reshape(len(lanes), warps, WARP).min(axis=2)
        for warp in range(warps):
            entry = rows(self.reader, warp * self.room + offsets, size)
            times, owners = entry >> READER_BITS, entry & 63
            lane = warp * WARP + owners % WARP
            known = np.where(
                owners == MANY,
                oldest[:, warp, None],
                np.take_along_axis(seen, lane, axis=1),
            )
            bad = (times >= order.full) & (times >= known)
            if bad.any():
                i, j = np.argwhere(bad)[0]
                who = "several lanes" if owners[i, j] == MANY else f"lane {lane[i, j]}"
                other = f"read by {who} of warp {warp}"
                raise self._race(what, int(offsets[i] + j), int(lanes[i]), other)

    def write(
        self, lanes: np.ndarray, offsets: np.ndarray, size: int, atomic: bool = False
    ) -> None:
        """Checks and records writes of `size` bytes."""
        what = "atomically updates" if atomic else "writes"
        self._check_pending("reads" if atomic else what, lanes, offsets, size)
        self._check_writer(what, lanes, offsets, size)
        self._check_readers(what, lanes, offsets, size)
        key = self.order.key(np.full_like(lanes, ATOMIC) if atomic else lanes)
        set_rows(self.writer, offsets, size, key[:, None])
        twice = self.writer[offsets] != key
        if twice.any():
            i = int(np.argmax(twice))
            other = f"written by lane {self.writer[offsets[i]] & LANE_MASK} at once"
            raise self._race(what, int(offsets[i]), int(lanes[i]), other)
        set_rows(self.state, offsets, size, INIT)

    def copy(self, lanes: np.ndarray, offsets: np.ndarray, data: np.ndarray) -> None:
        """cp.async: the destination holds nothing until the copy was waited for."""
        size = data.shape[1]
        self.write(lanes, offsets, size)
        set_rows(self.data, offsets, size, 0xCD)
        set_rows(self.state, offsets, size, PENDING)
        self.copies.append(Copy(lanes, offsets, size, data, self.committed[lanes]))

    def commit(self, mask: np.ndarray) -> None:
        self.committed[mask] += 1

    def wait(self, mask: np.ndarray, newest: int) -> None:
        """Delivers all copies of the lanes of `mask` but those of the `newest` committed groups."""
        left = []
        for copy in self.copies:
            due = mask[copy.lanes] & (copy.groups < self.committed[copy.lanes] - newest)
            if due.any():
                offsets = copy.offsets[due]
                set_rows(self.data, offsets, copy.size, copy.data[due])
                set_rows(self.state, offsets, copy.size, INIT)
                keys = self.order.key(copy.lanes[due])
                set_rows(self.writer, offsets, copy.size, keys[:, None])
            if not due.all():
                rest = ~due
                left.append(
                    Copy(
                        copy.lanes[rest],
                        copy.offsets[rest],
                        copy.size,
                        copy.data[rest],
                        copy.groups[rest],
                    )
                )
        self.copies = left

    def finish(self) -> None:
        """Raises if the block ends with copies that nobody waited for."""
        if self.copies:
            copy = self.copies[0]
            raise PendingCopy(
                f"the block ends while a copy by lane {copy.lanes[0]} to shared byte "
                f"{copy.offsets[0]} was never waited for"
            )


class LaneMemory:
    """Memory that each lane has for itself: local variables, and parameters of device functions."""

    def __init__(self, lanes: int, size: int, what: str) -> None:
        self.what = what
        self.size = size
        self.room = (size + 15) // 16 * 16 + 16
        self.data = np.full(lanes * self.room, 0xCD, np.uint8)
        self.state = np.zeros(lanes * self.room, np.uint8)

    def locate(self, lanes: np.ndarray, offset: np.ndarray, size: int) -> np.ndarray:
        bad = (offset < 0) | (offset + size > self.size)
        if bad.any():
            raise OutOfBounds(
                f"lane {lanes[np.argmax(bad)]}: {size}-byte {self.what} access at byte "
                f"{offset[np.argmax(bad)]} of {self.size}"
            )
        if (offset & (size - 1)).any():
            raise Misaligned(f"{size}-byte {self.what} access")
        return lanes * self.room + offset

    def read(self, lanes: np.ndarray, flat: np.ndarray, size: int) -> None:
        missing = (rows(self.state, flat, size) == 0).any(axis=1)
        if missing.any():
            lane = lanes[np.argmax(missing)]
            raise Uninitialised(f"lane {lane} reads {self.what} memory that it never wrote")

    def write(self, flat: np.ndarray, size: int) -> None:
        set_rows(self.state, flat, size, INIT)
