# SPDX-License-Identifier: Apache-2.0
"""Loads, stores, atomics, asynchronous copies, and what orders memory without being modelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim.arena import FIRST_WINDOW, WINDOW_BITS, rows, set_rows
from ptxsim.decode import CONTAINERS, Decoder, Read, Run, dtype_of, op
from ptxsim.errors import OutOfBounds, ReadOnly
from ptxsim.image import LOCAL_START
from ptxsim.numerics import sum_odd, to_half
from ptxsim.ops_compare import half_parts
from ptxsim.ops_convert import WINDOWS
from ptxsim.program import WIDTHS, Address, Imm, Reg, Sym

_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")
_ORDERING = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
_SCOPES = ("cta", "cluster", "gpu", "sys")
SPACES = ("global", "shared", "local", "param", "const")


def address(d: Decoder, index: int) -> Read:
    """The addresses of an operand [base + offset], one per lane."""
    operand = d.ops[index]
    if not isinstance(operand, Address):
        raise d.error("operand is no address")
    base, offset = operand.base, operand.offset
    if isinstance(base, Reg) and base.width in (32, 64):
        number = base.index
        if base.width == 64:
            step = np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
            return lambda m: m.regs[number] + step
        return lambda m: (m.regs[number].astype(np.int64) + offset).view(np.uint64)
    if isinstance(base, Sym) and base.variable is not None:
        variable, extra = base.variable, base.offset + offset
        return lambda m: np.full(m.lanes, variable.address + extra, np.uint64)
    if isinstance(base, Imm):
        value = base.bits + offset
        return lambda m: np.full(m.lanes, value, np.uint64)
    raise d.error("address is not known")


def take_space(d: Decoder) -> str:
    """The state space of an access, or \"\" for a generic address."""
    for name in ("shared::cta", "param::entry", "param::func", *SPACES):
        if d.flag(name):
            return name.split("::")[0]
    return ""


def _take_hints(d: Decoder) -> None:
    d.ignore(*_CACHE, *_ORDERING, *_SCOPES)
    d.ignore_prefix("L1::", "L2::", "level::")


class Accessor:
    """Reads and writes one state space, with all checks and statistics, for one instruction."""

    def __init__(self, d: Decoder, space: str, size: int, constant: bool = False) -> None:
        if size > 16:
            raise d.error(f"accesses of {size} bytes are not executed")
        self.instr = d.instr
        self.space = space
        self.size = size
        self.constant = constant

    def load(self, m: Any, lanes: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Bytes [lanes, size]."""
        if self.space:
            return self._load_from(m, self.space, lanes, addresses)
        result = np.empty((len(lanes), self.size), np.uint8)
        for space, part, local in self._split(lanes, addresses):
            result[part] = self._load_from(m, space, lanes[part], local)
        return result

    def store(self, m: Any, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Writes bytes [lanes, size]."""
        if self.space:
            self._store_to(m, self.space, lanes, addresses, values)
            return
        for space, part, local in self._split(lanes, addresses):
            self._store_to(m, space, lanes[part], local, values[part])

    def _split(self, lanes: np.ndarray, addresses: np.ndarray) -> list[tuple[str, Any, Any]]:
        """Generic addresses by the space they point to."""
        window = addresses >> np.uint64(WINDOW_BITS)
        parts = []
        for number in np.unique(window):
            part = window == number
            if number >= FIRST_WINDOW:
                parts.append(("global", part, addresses[part]))
                continue
            space = next((name for name, w in WINDOWS.items() if w == number), None)
            if space is None:
                lane, at = lanes[part][0], int(addresses[part][0])
                raise OutOfBounds(f"lane {lane}: generic access at address {at:#x}, in no memory")
            parts.append((space, part, addresses[part] & np.uint64((1 << WINDOW_BITS) - 1)))
        return parts

    def _load_from(
        self, m: Any, space: str, lanes: np.ndarray, addresses: np.ndarray
    ) -> np.ndarray:
        size = self.size
        if space in ("global", "const"):
            flat = m.arena.locate(lanes, addresses, size)
            m.arena.read(m.order, lanes, flat, size, self.constant)
            if space == "global":
                site = m.site(m.stats.global_, self.instr)
                m.recorder.global_(site, lanes, addresses, size)
            return rows(m.arena.data, flat, size)
        if space == "shared":
            offsets = m.shared.locate(lanes, addresses, size)
            m.shared.read(lanes, offsets, size)
            m.recorder.shared(m.site(m.stats.shared, self.instr), lanes, offsets, size)
            return rows(m.shared.data, offsets, size)
        if space == "param" and int(addresses[0]) < LOCAL_START:
            offsets = addresses.astype(np.int64)
            if (offsets + size > m.param_size).any() or (offsets & (size - 1)).any():
                raise OutOfBounds(f"parameter access at byte {offsets.max()} of {m.param_size}")
            return rows(m.params, offsets, size)
        memory, flat = self._lane_memory(m, space, lanes, addresses)
        memory.read(lanes, flat, size)
        return rows(memory.data, flat, size)

    def _store_to(
        self, m: Any, space: str, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray
    ) -> None:
        size = self.size
        if space == "global":
            flat = m.arena.locate(lanes, addresses, size)
            m.arena.write(m.order, lanes, flat, size)
            site = m.site(m.stats.global_, self.instr)
            m.recorder.global_(site, lanes, addresses, size)
            set_rows(m.arena.data, flat, size, values)
        elif space == "shared":
            offsets = m.shared.locate(lanes, addresses, size)
            m.shared.write(lanes, offsets, size)
            m.recorder.shared(m.site(m.stats.shared, self.instr), lanes, offsets, size)
            set_rows(m.shared.data, offsets, size, values)
        elif space == "const" or (space == "param" and int(addresses[0]) < LOCAL_START):
            raise ReadOnly(f"write to {space} memory")
        else:
            memory, flat = self._lane_memory(m, space, lanes, addresses)
            memory.write(flat, size)
            set_rows(memory.data, flat, size, values)

    def _lane_memory(self, m: Any, space: str, lanes: np.ndarray, addresses: np.ndarray) -> Any:
        memory = m.local if space == "local" else m.lane_params
        start = 0 if space == "local" else LOCAL_START
        return memory, memory.locate(lanes, addresses.astype(np.int64) - start, self.size)


def _vector(d: Decoder) -> int:
    return {"v2": 2, "v4": 4, "v8": 8, "": 1}[d.one_of("v2", "v4", "v8", default="")]


@op("ld", "ldu")
def _load(d: Decoder) -> Run:
    kind = d.take_type()
    count = _vector(d)
    constant = "nc" in d.mods or d.instr.base == "ldu"
    space = take_space(d)
    _take_hints(d)
    d.done(2, 3)
    items = d.items(0)
    if len(items) != count:
        raise d.error(f"{len(items)} results for {count} elements")
    accessor = Accessor(d, space, count * WIDTHS[kind] // 8, constant)
    where = address(d, 1)
    dtype = dtype_of(kind)
    writes = [d.writer(item, kind) for item in items]

    def run(m: Any, mask: np.ndarray) -> None:
        lanes = np.nonzero(mask)[0]
        values = accessor.load(m, lanes, where(m)[lanes]).view(dtype)
        for i, write in enumerate(writes):
            full = np.zeros(m.lanes, dtype)
            full[lanes] = values[:, i]
            write(m, mask, full)

    return run


@op("st")
def _store(d: Decoder) -> Run:
    kind = d.take_type()
    count = _vector(d)
    space = take_space(d)
    _take_hints(d)
    d.done(2, 3)
    items = d.items(1)
    if len(items) != count:
        raise d.error(f"{len(items)} values for {count} elements")
    accessor = Accessor(d, space, count * WIDTHS[kind] // 8)
    where = address(d, 0)
    reads = [d.reader(item, f"b{WIDTHS[kind]}") for item in items]
    container = CONTAINERS[WIDTHS[kind]]

    def run(m: Any, mask: np.ndarray) -> None:
        lanes = np.nonzero(mask)[0]
        values: np.ndarray = np.empty((len(lanes), count), container)
        for i, read in enumerate(reads):
            value = read(m)
            values[:, i] = value[lanes] if len(value) > 1 else value
        accessor.store(m, lanes, where(m)[lanes], values.view(np.uint8))

    return run


def _add_halves(kind: str) -> Callable[[Any, Any], Any]:
    def add(a: Any, b: Any) -> Any:
        parts = [half_parts(np.array([x]), kind).astype(np.float64) for x in (a, b)]
        bits = np.ascontiguousarray(to_half(sum_odd(*parts), kind))
        return bits.view(CONTAINERS[WIDTHS[kind]]).reshape(-1)[0]

    return add


_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "exch": lambda a, b: b,
    "inc": lambda a, b: type(a)(0) if a >= b else a + type(a)(1),
    "dec": lambda a, b: b if a == 0 or a > b else a - type(a)(1),
}


@op("atom", "red")
def _atomic(d: Decoder) -> Run:
    """Lane by lane, in the order of the lanes."""
    kind = d.take_type()
    space = take_space(d) or "global"
    if space not in ("global", "shared"):
        raise d.error("needs global or shared memory")
    name = d.one_of(*_ATOMICS, "cas")
    d.ignore("noftz", *_ORDERING, *_SCOPES)
    returns = d.instr.base == "atom"
    first = 1 if returns else 0
    d.done(first + (3 if name == "cas" else 2))
    halves = kind in ("f16", "f16x2", "bf16", "bf16x2")
    if halves and name != "add":
        raise d.error("only add of halves is executed")
    combine = _add_halves(kind) if halves else _ATOMICS.get(name)
    where = address(d, first)
    values = [d.read(i, kind) for i in range(first + 1, len(d.ops))]
    write = d.write(0, kind) if returns else None
    dtype = dtype_of(kind)
    size = WIDTHS[kind] // 8

    def run(m: Any, mask: np.ndarray) -> None:
        lanes = np.nonzero(mask)[0]
        addresses = where(m)[lanes]
        if space == "global":
            offsets = m.arena.locate(lanes, addresses, size)
            m.arena.write(m.order, lanes, offsets, size, atomic=True)
            memory = m.arena.data.view(dtype)
        else:
            offsets = m.shared.locate(lanes, addresses, size)
            m.shared.write(lanes, offsets, size, atomic=True)
            memory = m.shared.data.view(dtype)
        operands = [np.broadcast_to(read(m), m.lanes) for read in values]
        before = np.zeros(m.lanes, dtype)
        for lane, at in zip(lanes, offsets // size, strict=True):
            old = memory[at]
            before[lane] = old
            if combine is None:
                memory[at] = operands[1][lane] if old == operands[0][lane] else old
            else:
                memory[at] = combine(old, operands[0][lane])
        if write is not None:
            write(m, mask, before)

    return run


@op("cp")
def _copy(d: Decoder) -> Run:
    d.one_of("async")
    if d.flag("commit_group"):
        d.done(0)
        return lambda m, mask: m.shared.commit(mask)
    if d.flag("wait_all"):
        d.done(0)

        def wait_all(m: Any, mask: np.ndarray) -> None:
            m.shared.commit(mask)
            m.shared.wait(mask, 0)

        return wait_all
    if d.flag("wait_group"):
        d.done(1)
        newest = d.ops[0]
        if not isinstance(newest, Imm):
            raise d.error("needs a constant")
        return lambda m, mask: m.shared.wait(mask, newest.bits)
    return _copy_issue(d)


def _copy_issue(d: Decoder) -> Run:
    """Reads global memory at once; the bytes arrive in shared memory at the wait."""
    cached = d.one_of("ca", "cg")
    d.one_of("shared::cta", "shared")
    d.one_of("global")
    hint = d.flag("L2::cache_hint")
    d.ignore_prefix("L2::")
    count = len(d.ops) - hint
    d.done(3 + hint, 4 + hint)
    size_operand = d.ops[2]
    if not isinstance(size_operand, Imm) or size_operand.bits not in (4, 8, 16):
        raise d.error("copies 4, 8 or 16 bytes")
    size = size_operand.bits
    if cached == "cg" and size != 16:
        raise d.error(".cg copies 16 bytes")
    target, source = address(d, 0), address(d, 1)
    extra = d.ops[3] if count == 4 else None
    ignore = isinstance(extra, Reg) and extra.width == 1
    amount = d.read(3, "pred" if ignore else "u32") if count == 4 else None

    def run(m: Any, mask: np.ndarray) -> None:
        lanes = np.nonzero(mask)[0]
        offsets = m.shared.locate(lanes, target(m)[lanes], size)
        addresses = source(m)[lanes]
        valid = np.full(len(lanes), size)
        if amount is not None:
            value = np.broadcast_to(amount(m), m.lanes)[lanes]
            valid = np.where(value, 0, size) if ignore else value.astype(np.int64)
        if (valid > size).any():
            raise OutOfBounds(f"source of {valid.max()} bytes for a copy of {size}")
        data = np.zeros((len(lanes), size), np.uint8)
        for length in np.unique(valid[valid > 0]):
            part = valid == length
            data[part, :length] = _copy_source(m, lanes[part], addresses[part], size, int(length))
        used = valid > 0
        if used.any():
            site = m.site(m.stats.global_, d.instr)
            m.recorder.global_(site, lanes[used], addresses[used], size)
        m.recorder.shared(m.site(m.stats.shared, d.instr), lanes, offsets, size)
        m.shared.copy(lanes, offsets, data)

    return run


def _copy_source(
    m: Any, lanes: np.ndarray, addresses: np.ndarray, size: int, length: int
) -> np.ndarray:
    """The first `length` bytes at addresses that are aligned to `size`."""
    if length == size:
        flat = m.arena.locate(lanes, addresses, size)
        m.arena.read(m.order, lanes, flat, size)
        return rows(m.arena.data, flat, size)
    m.arena.locate(lanes, addresses & ~np.uint64(size - 1), 1)
    parts = []
    for i in range(length):
        flat = m.arena.locate(lanes, addresses + np.uint64(i), 1)
        m.arena.read(m.order, lanes, flat, 1)
        parts.append(rows(m.arena.data, flat, 1))
    if (addresses & np.uint64(size - 1)).any():
        m.arena.locate(lanes, addresses, size)
    return np.concatenate(parts, axis=1)


@op("membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "nanosleep")
@op("griddepcontrol", "pmevent")
def _nothing(d: Decoder) -> Run:
    """Ordering between threads comes from barriers alone, and caches are not modelled."""
    return lambda m, mask: None


@op("createpolicy")
def _policy(d: Decoder) -> Run:
    write = d.write(0, "b64")
    return lambda m, mask: write(m, mask, np.zeros(1, np.uint64))
