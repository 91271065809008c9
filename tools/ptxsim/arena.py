# SPDX-License-Identifier: Apache-2.0
"""Global memory: buffers far apart in one address space, with bounds, initialisation, constness and
the last writer of every byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptxsim.errors import LaunchError, Misaligned, OutOfBounds, Race, ReadOnly, Uninitialised
from ptxsim.order import ATOMIC, LANE_BITS, LANE_MASK, Order

# Every buffer has 4 GiB of addresses for itself, so a wrong stride never lands in another one.
WINDOW_BITS = 32
FIRST_WINDOW = 16
BASE_OFFSET = 1 << 16
ROW = 16  # the widest access in bytes
MODES = ("in", "out", "inout")
INIT, WRITABLE = np.uint8(1), np.uint8(2)


@dataclass
class Allocation:
    """A buffer: where it starts in the address space and in the flat arrays."""

    name: str
    address: int
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: Any
    mode: str


def rows(array: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    """array[offset : offset + size] for each offset, which is a multiple of size: [n, size]."""
    return np.take(array[: len(array) // size * size].reshape(-1, size), offsets // size, axis=0)


def set_rows(array: np.ndarray, offsets: np.ndarray, size: int, values: Any) -> None:
    """Writes `values` [n, size] (or what broadcasts to that) to where `rows` reads."""
    array[: len(array) // size * size].reshape(-1, size)[offsets // size] = values


class Arena:
    """Global memory of one or more launches.

    `add` copies an array in and returns its device address; `get` copies the present contents out.
    """

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.now = 0
        self._used = 0
        self._capacity = 0
        self.data = np.zeros(0, np.uint8)
        self.state = np.zeros(0, np.uint8)
        self.writer = np.zeros(0, np.int64)
        self.reader = np.zeros(0, np.int64)
        self._starts = np.zeros(0, np.int64)
        self._bases = np.zeros(0, np.int64)
        self._sizes = np.zeros(0, np.int64)

    def add(self, array: np.ndarray, mode: str = "in", *, name: str = "", offset: int = 0) -> int:
        """A buffer with the contents of `array`; returns its address.

        Args:
            array: contents; of an `out` buffer only shape and dtype are used.
            mode: "in" (writing is an error), "out" (reading what was not written is an error) or
                "inout".
            name: for messages.
            offset: bytes that the address lies behind a multiple of 65536, as views of tensors do.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = self._used + (offset - self._used) % ROW
        window = FIRST_WINDOW + len(self.allocations)
        address = (window << WINDOW_BITS) + BASE_OFFSET + offset
        name = name or f"buffer {len(self.allocations)}"
        self._grow(start + len(raw) + ROW)
        self._used = start + len(raw)
        allocation = Allocation(name, address, start, len(raw), np.shape(array), array.dtype, mode)
        self.allocations.append(allocation)
        self._starts = np.append(self._starts, start)
        self._bases = np.append(self._bases, BASE_OFFSET + offset)
        self._sizes = np.append(self._sizes, len(raw))
        part = slice(start, start + len(raw))
        self.data[part] = 0xCD if mode == "out" else raw
        self.state[part] = {"in": 1, "out": 2, "inout": 3}[mode]
        return address

    def _grow(self, size: int) -> None:
        if size <= self._capacity:
            return
        capacity = (max(size, 2 * self._capacity, 1 << 12) + ROW - 1) // ROW * ROW
        for name in ("data", "state", "writer", "reader"):
            old = getattr(self, name)
            new = np.zeros(capacity, old.dtype)
            new[: self._used] = old[: self._used]
            setattr(self, name, new)
        self._capacity = capacity

    def _at(self, address: int) -> Allocation:
        index = (address >> WINDOW_BITS) - FIRST_WINDOW
        if 0 <= index < len(self.allocations):
            return self.allocations[index]
        raise LaunchError(f"no buffer at {address:#x}")

    def get(self, address: int) -> np.ndarray:
        """The contents of the buffer at an address from `add`, as an array of its shape."""
        found = self._at(address)
        raw = self.data[found.start : found.start + found.size]
        return raw.copy().view(found.dtype).reshape(found.shape)

    def patch(self, address: int, raw: bytes) -> None:
        """Overwrites bytes within a buffer from outside the kernel."""
        found = self._at(address)
        at = found.start + address - found.address
        self.data[at : at + len(raw)] = np.frombuffer(raw, np.uint8)

    def written(self, address: int) -> np.ndarray:
        """Which elements of the buffer hold a value, as an array of bool of its shape."""
        found = self._at(address)
        state = self.state[found.start : found.start + found.size] & INIT
        size = np.dtype(found.dtype).itemsize
        return state.reshape(-1, size).astype(bool).all(axis=1).reshape(found.shape)

    def describe(self, address: int) -> str:
        """An address in words, for messages."""
        index = (int(address) >> WINDOW_BITS) - FIRST_WINDOW
        if not 0 <= index < len(self.allocations):
            return f"address {int(address):#x}, in no buffer"
        found = self.allocations[index]
        offset = int(address) - found.address
        return f"byte {offset} of {found.name} ({found.size} bytes, {found.mode})"

    def locate(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Offsets into the flat arrays of accesses of `size` bytes."""
        signed = addresses.view(np.int64)
        odd = signed & (size - 1)
        if odd.any():
            i = int(np.argmax(odd != 0))
            raise Misaligned(
                f"lane {lanes[i]}: {size}-byte access at {self.describe(addresses[i])}, "
                f"address {int(addresses[i]):#x}"
            )
        index = (signed >> WINDOW_BITS) - FIRST_WINDOW
        bad = (index < 0) | (index >= len(self.allocations))
        if not bad.any():
            offset = (signed & ((1 << WINDOW_BITS) - 1)) - self._bases[index]
            bad = (offset < 0) | (offset + size > self._sizes[index])
        if bad.any():
            i = int(np.argmax(bad))
            raise OutOfBounds(
                f"lane {lanes[i]}: {size}-byte global access at {self.describe(addresses[i])}"
            )
        return self._starts[index] + offset

    def _where(self, flat: int) -> str:
        for each in self.allocations:
            if each.start <= flat < each.start + each.size:
                return self.describe(each.address + flat - each.start)
        return f"flat offset {flat}"

    def _race(self, what: str, order: Order, flat: int, lane: int, key: int) -> Race:
        owner = int(key) & LANE_MASK
        other = "an atomic" if owner == ATOMIC else f"lane {owner}"
        if int(key) >> LANE_BITS < order.block:
            other += " of another block"
        return Race(f"lane {lane} {what} {self._where(flat)}, written by {other} unordered")

    def _check_writer(
        self, order: Order, what: str, lanes: np.ndarray, flat: np.ndarray, keys: np.ndarray
    ) -> None:
        """Raises if a byte was written in this launch by another block or unordered."""
        recent = keys >= (order.launch << LANE_BITS)
        if not recent.any():
            return
        foreign = recent & (keys < (order.block << LANE_BITS))
        bad = foreign | (recent & order.unordered(keys, lanes))
        if what == "atomically updates":
            bad &= (keys & LANE_MASK) != ATOMIC
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise self._race(what, order, int(flat[i] + j), int(lanes[i]), int(keys[i, j]))

    def read(
        self, order: Order, lanes: np.ndarray, flat: np.ndarray, size: int, constant: bool = False
    ) -> None:
        """Checks and records reads. `constant`: the access claims that nobody writes there."""
        state = rows(self.state, flat, size)
        missing = (state & INIT) == 0
        if missing.any():
            i, j = np.argwhere(missing)[0]
            raise Uninitialised(
                f"lane {lanes[i]} reads {self._where(int(flat[i] + j))}, never written"
            )
        if not (state & WRITABLE).any():
            return
        keys = rows(self.writer, flat, size)
        if constant and (keys >= (order.launch << LANE_BITS)).any():
            raise ReadOnly("non-coherent load of memory that this launch writes")
        self._check_writer(order, "reads", lanes, flat, keys)
        before = rows(self.reader, flat, size)
        same = (before == order.block) | (before < order.launch) & (before != -order.launch)
        set_rows(self.reader, flat, size, np.where(same, order.block, -order.launch))

    def write(
        self, order: Order, lanes: np.ndarray, flat: np.ndarray, size: int, atomic: bool = False
    ) -> None:
        """Checks and records writes, or read-modify-writes that are atomic."""
        state = rows(self.state, flat, size)
        constant = (state & WRITABLE) == 0
        if constant.any():
            i, j = np.argwhere(constant)[0]
            raise ReadOnly(f"lane {lanes[i]} writes {self._where(int(flat[i] + j))}")
        if atomic and ((state & INIT) == 0).any():
            raise Uninitialised(f"atomic on {self._where(int(flat[0]))}, never written")
        keys = rows(self.writer, flat, size)
        what = "atomically updates" if atomic else "writes"
        self._check_writer(order, what, lanes, flat, keys)
        before = rows(self.reader, flat, size)
        foreign = ((before >= order.launch) & (before != order.block)) | (before == -order.launch)
        if foreign.any():
            i, j = np.argwhere(foreign)[0]
            raise Race(
                f"lane {lanes[i]} {what} {self._where(int(flat[i] + j))}, read by another block"
            )
        key = order.key(np.full_like(lanes, ATOMIC) if atomic else lanes)
        set_rows(self.writer, flat, size, key[:, None])
        twice = self.writer[flat] != key
        if twice.any():
            i = int(np.argmax(twice))
            raise self._race(what, order, int(flat[i]), int(lanes[i]), int(self.writer[flat[i]]))
        set_rows(self.state, flat, size, INIT | WRITABLE)
