# SPDX-License-Identifier: Apache-2.0
"""Instructions of a whole warp or of the lanes of a mask: shuffles, votes, matrix loads; and
barriers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim.arena import rows, set_rows
from ptxsim.decode import Decoder, Run, dtype_of, op
from ptxsim.errors import Divergence, Trap
from ptxsim.ops_memory import address
from ptxsim.order import WARP
from ptxsim.program import Both

_U32 = np.uint32
_LANES = np.arange(WARP)


def warp_bits(mask: np.ndarray) -> np.ndarray:
    """A mask as one 32-bit word per warp, spread over the lanes of the warp."""
    packed = np.packbits(mask.reshape(-1, WARP), axis=1, bitorder="little").view(_U32)
    return np.repeat(packed[:, 0], WARP)


def members(m: Any, mask: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Checks a member mask: each lane names itself, and all lanes it names are here.

    Lanes that have exited, or that the block does not have, are not waited for. Returns the masks.
    """
    named = np.broadcast_to(named, m.lanes)
    active = warp_bits(mask)
    outside = mask & (named >> m.lane_in_warp & _U32(1) == 0)
    if outside.any():
        lane = int(np.argmax(outside))
        raise Divergence(f"lane {lane} is not in its member mask {int(named[lane]):#x}")
    missing = np.where(mask, named & ~active & ~warp_bits(m.done), _U32(0))
    if missing.any():
        lane = int(np.argmax(missing != 0))
        raise Divergence(
            f"warp {lane // WARP}: lanes {int(missing[lane]):#010x} of the member mask "
            f"{int(named[lane]):#010x} are elsewhere"
        )
    return named


@op("shfl")
def _shuffle(d: Decoder) -> Run:
    d.take_type()
    d.one_of("sync")
    mode = d.one_of("up", "down", "bfly", "idx")
    d.done(5)
    target = d.ops[0]
    pair = target if isinstance(target, Both) else None
    write = d.writer(pair.first if pair else target, "b32")
    valid = d.writer(pair.second, "pred") if pair else None
    a, b, c, named = (d.read(i, "b32") for i in (1, 2, 3, 4))

    def run(m: Any, mask: np.ndarray) -> None:
        members(m, mask, named(m))
        lane = m.lane_in_warp.astype(np.int64)
        shift = b(m).astype(np.int64) & 31
        control = c(m).astype(np.int64)
        segment = control >> 8 & 31
        limit = (lane & segment) | (control & 31 & ~segment)
        if mode == "up":
            source = lane - shift
            inside = source >= limit
        else:
            source = {
                "down": lane + shift,
                "bfly": lane ^ shift,
                "idx": (lane & segment) | (shift & ~segment),
            }[mode]
            inside = source <= limit
        source = np.where(inside, source, lane)
        absolute = m.warp_of_lane.astype(np.int64) * WARP + source
        absent = mask & ~mask[absolute]
        if absent.any():
            lane_id = int(np.argmax(absent))
            raise Divergence(f"lane {lane_id} takes a value from lane {absolute[lane_id]}, absent")
        write(m, mask, np.broadcast_to(a(m), m.lanes)[absolute])
        if valid is not None:
            valid(m, mask, np.broadcast_to(inside, m.lanes))

    return run


@op("vote")
def _vote(d: Decoder) -> Run:
    d.take_type()
    d.one_of("sync")
    mode = d.one_of("all", "any", "uni", "ballot")
    d.done(3)
    write = d.write(0, "b32" if mode == "ballot" else "pred")
    value, named = d.read(1, "pred"), d.read(2, "b32")

    def run(m: Any, mask: np.ndarray) -> None:
        group = members(m, mask, named(m)) & warp_bits(mask)
        yes = warp_bits(mask & value(m)) & group
        results = {
            "all": yes == group,
            "any": yes != 0,
            "uni": (yes == group) | (yes == 0),
            "ballot": yes,
        }
        write(m, mask, results[mode])

    return run


_REDUCE: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _groups(mask: np.ndarray, named: np.ndarray) -> list[np.ndarray]:
    """Lane numbers of each set of lanes that share a warp and a member mask."""
    lanes = np.nonzero(mask)[0]
    keys = (lanes // WARP).astype(np.uint64) << np.uint64(32) | named[lanes]
    return [lanes[keys == key] for key in np.unique(keys)]


@op("redux")
def _redux(d: Decoder) -> Run:
    kind = d.take_type()
    d.one_of("sync")
    reduce = _REDUCE[d.one_of(*_REDUCE)]
    d.done(3)
    write, a, named = d.write(0, kind), d.read(1, kind), d.read(2, "b32")

    def run(m: Any, mask: np.ndarray) -> None:
        value = np.broadcast_to(a(m), m.lanes)
        result = np.zeros(m.lanes, dtype_of(kind))
        for lanes in _groups(mask, members(m, mask, named(m))):
            result[lanes] = reduce.reduce(value[lanes])
        write(m, mask, result)

    return run


@op("match")
def _match(d: Decoder) -> Run:
    kind = d.take_type()
    d.one_of("sync")
    every = d.one_of("any", "all") == "all"
    d.done(3)
    target = d.ops[0]
    pair = target if isinstance(target, Both) else None
    write = d.writer(pair.first if pair else target, "b32")
    same = d.writer(pair.second, "pred") if pair else None
    a, named = d.read(1, kind), d.read(2, "b32")

    def run(m: Any, mask: np.ndarray) -> None:
        value = np.broadcast_to(a(m), m.lanes)
        result = np.zeros(m.lanes, _U32)
        for lanes in _groups(mask, members(m, mask, named(m))):
            for lane in lanes:
                equal = lanes[value[lanes] == value[lane]]
                if every and len(equal) != len(lanes):
                    continue
                result[lane] = sum(1 << int(other % WARP) for other in equal)
        write(m, mask, result)
        if same is not None:
            same(m, mask, result != 0)

    return run


@op("activemask")
def _active(d: Decoder) -> Run:
    d.take_type()
    d.done(1)
    write = d.write(0, "b32")
    return lambda m, mask: write(m, mask, warp_bits(mask))


@op("elect")
def _elect(d: Decoder) -> Run:
    d.one_of("sync")
    d.done(2)
    target = d.ops[0]
    if not isinstance(target, Both):
        raise d.error("needs two results")
    write, chosen = d.writer(target.first, "b32"), d.writer(target.second, "pred")
    named = d.read(1, "b32")

    def run(m: Any, mask: np.ndarray) -> None:
        leader = np.zeros(m.lanes, _U32)
        for lanes in _groups(mask, members(m, mask, named(m))):
            leader[lanes] = lanes[0] % WARP
        write(m, mask, leader)
        chosen(m, mask, leader == m.lane_in_warp)

    return run


# 8 x 8 matrices of 16-bit elements, one row of 16 bytes per address.


def _matrix(d: Decoder) -> tuple[int, bool]:
    if d.take_type() != "b16":
        raise d.error("moves .b16")
    for word in ("sync", "aligned", "m8n8"):
        d.one_of(word)
    count = int(d.one_of("x1", "x2", "x4")[1])
    trans = d.flag("trans")
    d.one_of("shared::cta", "shared", default="shared")
    d.done(2)
    return count, trans


def _matrix_places(
    m: Any, d: Decoder, mask: np.ndarray, addresses: np.ndarray, count: int, trans: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Lanes, shared offsets and size of what each lane holds, for [warp, matrix, lane(, half)]."""
    warps = m.whole_warps(mask)
    givers = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
    row = m.shared.locate(givers, addresses[givers], 16)
    phases = np.arange(len(givers))
    m.recorder.shared(m.site(m.stats.shared, d.instr), phases, row, 16)
    row = row.reshape(len(warps), count, 8)
    if trans:
        which = 2 * (_LANES % 4)[:, None] + np.arange(2)
        offsets = row[:, :, which] + (2 * (_LANES // 4))[:, None]
    else:
        offsets = row[:, :, _LANES // 4] + 4 * (_LANES % 4)
    lanes = np.broadcast_to(
        (warps[:, None, None] * WARP + _LANES).reshape(len(warps), 1, WARP, *([1] * trans)),
        offsets.shape,
    )
    return lanes.reshape(-1), offsets.reshape(-1), 2 if trans else 4


@op("ldmatrix")
def _ldmatrix(d: Decoder) -> Run:
    count, trans = _matrix(d)
    writes = [d.writer(item, "b32") for item in d.items(0)]
    if len(writes) != count:
        raise d.error(f"{len(writes)} results for {count} matrices")
    where = address(d, 1)

    def run(m: Any, mask: np.ndarray) -> None:
        lanes, offsets, size = _matrix_places(m, d, mask, where(m), count, trans)
        m.shared.read(lanes, offsets, size)
        raw = rows(m.shared.data, offsets, size).reshape(-1, 4)
        words = raw.view(_U32).reshape(-1, count, WARP)
        for i, write in enumerate(writes):
            full = np.zeros(m.lanes, _U32)
            full[mask] = words[:, i].reshape(-1)
            write(m, mask, full)

    return run


@op("stmatrix")
def _stmatrix(d: Decoder) -> Run:
    count, trans = _matrix(d)
    reads = [d.reader(item, "b32") for item in d.items(1)]
    if len(reads) != count:
        raise d.error(f"{len(reads)} values for {count} matrices")
    where = address(d, 0)

    def run(m: Any, mask: np.ndarray) -> None:
        lanes, offsets, size = _matrix_places(m, d, mask, where(m), count, trans)
        words = np.stack([np.broadcast_to(read(m), m.lanes)[mask] for read in reads])
        values = np.ascontiguousarray(words.reshape(count, -1, WARP).swapaxes(0, 1))
        m.shared.write(lanes, offsets, size)
        set_rows(m.shared.data, offsets, size, values.view(np.uint8).reshape(-1, size))

    return run


@op("movmatrix")
def _movmatrix(d: Decoder) -> Run:
    d.take_type()
    for word in ("sync", "aligned", "m8n8", "trans"):
        d.one_of(word)
    d.done(2)
    write, a = d.write(0, "b32"), d.read(1, "b32")

    def run(m: Any, mask: np.ndarray) -> None:
        m.whole_warps(mask)
        halves = np.broadcast_to(a(m), m.lanes).copy().view(np.uint16).reshape(-1, 8, 8)
        turned = np.ascontiguousarray(halves.swapaxes(1, 2))
        write(m, mask, turned.view(_U32).reshape(-1))

    return run


# Barriers.


@op("bar", "barrier")
def _barrier(d: Decoder) -> Run:
    if d.flag("warp"):
        return _warp_barrier(d)
    aligned = d.flag("aligned") or d.instr.base == "bar"
    d.ignore("cta")
    action = d.one_of("sync", "arrive", "red")
    reduction, kind = "", ""
    if action == "red":
        kind = d.take_type()
        reduction = d.one_of("popc", "and", "or")
    d.done(*((3, 4) if reduction else (1, 2)))
    first = 1 if reduction else 0
    number = d.read(first, "u32")
    extra = len(d.ops) - first - (2 if reduction else 1)
    expected = d.read(first + 1, "u32") if extra else None
    if action == "arrive" and expected is None:
        raise d.error("needs a number of threads")
    value = d.read(len(d.ops) - 1, "pred") if reduction else None
    write = d.write(0, kind) if reduction else None

    def combine(m: Any) -> Callable[..., None]:
        def finish(mask: np.ndarray, values: np.ndarray) -> None:
            result = {"popc": values.sum(), "and": values.all(), "or": values.any()}[reduction]
            assert write is not None
            write(m, mask, np.full(1, result, dtype_of(kind)))

        return finish

    def run(m: Any, mask: np.ndarray) -> None:
        if aligned:
            m.live_warps(mask)
        numbers = np.broadcast_to(number(m), m.lanes)
        counts = np.full(m.lanes, m.lanes) if expected is None else expected(m)
        counts = np.broadcast_to(counts, m.lanes)
        for each in np.unique(numbers[mask]):
            part = mask & (numbers == each)
            sizes = np.unique(counts[part])
            if len(sizes) > 1:
                raise Divergence(f"barrier {each}: lanes expect {sizes.tolist()} threads")
            vote = None if value is None else (np.broadcast_to(value(m), m.lanes), combine(m))
            m.barriers.arrive(int(each), part, int(sizes[0]), action != "arrive", vote)

    return run


def _warp_barrier(d: Decoder) -> Run:
    d.one_of("sync")
    d.done(1)
    named = d.read(0, "b32")

    def run(m: Any, mask: np.ndarray) -> None:
        members(m, mask, named(m))
        m.order.meet_warps(mask | m.done)

    return run


@op("trap", "brkpt")
def _trap(d: Decoder) -> Run:
    def run(m: Any, mask: np.ndarray) -> None:
        raise Trap(f"lane {int(np.argmax(mask))} of the block executes {d.instr.base}")

    return run
