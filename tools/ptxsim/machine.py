# SPDX-License-Identifier: Apache-2.0
"""Runs the blocks of a launch: registers, program counters, and which lanes run next."""

from __future__ import annotations

import numpy as np

from ptxsim.arena import Arena
from ptxsim.barriers import Barriers
from ptxsim.decode import CONTAINERS
from ptxsim.errors import Deadlock, Divergence, LaunchError, PtxError
from ptxsim.image import BARRIER, BRANCH, CALL, EXIT, PLAIN, RETURN, SWITCH, Image
from ptxsim.order import WARP, Order
from ptxsim.program import Instr
from ptxsim.shared import SHARED_START, LaneMemory, Shared
from ptxsim.stats import Recorder, Site, Stats

END = np.int64(1) << 40
POISON = 0xCDCDCDCDCDCDCDCD
CALL_DEPTH = 16
SCHEDULES = ("lockstep", "random")
Dim3 = tuple[int, int, int]


class Machine:
    """One launch of one kernel.

    Lanes are numbered through the block; the last warp is filled up with `absent` lanes that never
    run. All lanes of the block that stand at the smallest program counter run together, or, with
    the random schedule, those of a warp drawn for every few instructions.
    """

    def __init__(
        self,
        image: Image,
        arena: Arena,
        params: bytes,
        grid: Dim3,
        block: Dim3,
        dynamic_shared: int,
        widths: list[int],
        schedule: str,
        seed: int,
        max_steps: int,
    ) -> None:
        if schedule not in SCHEDULES:
            raise LaunchError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
        self.image = image
        self.arena = arena
        self.params = np.frombuffer(params + bytes(16), np.uint8).copy()
        self.param_size = len(params)
        self.grid = grid
        self.threads = block[0] * block[1] * block[2]
        self.warps = -(-self.threads // WARP)
        self.lanes = self.warps * WARP
        self.dynamic_shared = dynamic_shared
        self.schedule = schedule
        self.random = np.random.default_rng(seed)
        self.max_steps = max_steps
        self.stats = Stats()
        self.recorder = Recorder(self.stats)
        self.order = Order(self.lanes, arena.now)
        self.shared = Shared(self._shared_size(), self.order)
        self.counts = np.zeros(len(image.steps), np.int64)
        self.steps = 0
        self.current = image.steps[0].instr
        self._make_constants(block)
        self._make_registers(widths)

    def _shared_size(self) -> int:
        """Static variables, then the dynamic part, where every extern array begins."""
        end = self.image.shared_size
        for variable in self.image.dynamic:
            end = -(-end // variable.align) * variable.align
        for variable in self.image.dynamic:
            variable.address = SHARED_START + end
        return end + self.dynamic_shared

    def _make_constants(self, block: Dim3) -> None:
        index = np.arange(self.lanes)
        self.absent = index >= self.threads
        x, y = index % block[0], index // block[0] % block[1]
        self.tid = [axis.astype(np.uint32) for axis in (x, y, index // (block[0] * block[1]))]
        self.ntid = [np.full(1, size, np.uint32) for size in block]
        self.nctaid = [np.full(1, size, np.uint32) for size in self.grid]
        self.lane_in_warp = (index % WARP).astype(np.uint32)
        self.warp_of_lane = (index // WARP).astype(np.uint32)
        self.constant32 = np.full(1, WARP, np.uint32)

    def _make_registers(self, widths: list[int]) -> None:
        self.banks: dict[int, np.ndarray] = {
            width: np.empty((max(widths.count(width), 1), self.lanes), CONTAINERS[width])
            for width in CONTAINERS
        }
        used = dict.fromkeys(CONTAINERS, 0)
        self.regs: list[np.ndarray] = []
        for width in widths:
            self.regs.append(self.banks[width][used[width]])
            used[width] += 1

    def run(self) -> None:
        """All blocks, x fastest."""
        with np.errstate(all="ignore"):
            for z in range(self.grid[2]):
                for y in range(self.grid[1]):
                    for x in range(self.grid[0]):
                        self._run_block((x, y, z))
        self.arena.now = self.order.now
        for step, count in zip(self.image.steps, self.counts, strict=True):
            if step.instr.line and count:
                self.stats.opcodes[step.instr.opcode] += int(count)
                self.stats.lines[step.instr.line] += int(count)

    def _start_block(self, position: Dim3) -> None:
        self.order.start_block()
        self.shared.reset()
        self.local = LaneMemory(self.lanes, self.image.local_size, "local")
        self.lane_params = LaneMemory(self.lanes, self.image.lane_param_size, "parameter")
        self.barriers = Barriers(self)
        self.ctaid = [np.full(1, index, np.uint32) for index in position]
        for width, bank in self.banks.items():
            bank[:] = False if width == 1 else POISON & ((1 << width) - 1)
        self.pc = np.full(self.lanes, self.image.entry, np.int64)
        self.done = self.absent.copy()
        self.runnable = ~self.absent
        self.depth = np.zeros(self.lanes, np.int64)
        self.returns = np.zeros((self.lanes, CALL_DEPTH), np.int64)

    def _run_block(self, position: Dim3) -> None:
        self._start_block(position)
        first = self.steps
        try:
            while self.runnable.any():
                self._run_group()
                if self.steps - first > self.max_steps:
                    raise Deadlock(f"no end after {self.max_steps} steps")
            if not self.done.all():
                raise self.barriers.deadlock()
            self.shared.finish()
        except PtxError as error:
            raise error.at(f"block {position}; {self.current.location}") from None

    def _run_group(self) -> None:
        """Picks lanes and runs them until they branch apart, stop, or reach other lanes."""
        allowed = self.runnable
        quantum = self.max_steps
        if self.schedule == "random":
            ready = np.nonzero(allowed.reshape(-1, WARP).any(axis=1))[0]
            warp = self.random.choice(ready)
            allowed = allowed & (self.warp_of_lane == warp)
            quantum = int(self.random.integers(1, 64))
        counters = np.where(allowed, self.pc, END)
        first = counters.min()
        group = counters == first
        self._advance(int(first), group, int(np.where(group, END, counters).min()), quantum)

    def _advance(self, pc: int, group: np.ndarray, stop: int, quantum: int) -> None:
        steps = self.image.steps
        warps = int(group.reshape(-1, WARP).any(axis=1).sum())
        last = self.steps + quantum
        while pc < stop and self.steps < last:
            step = steps[pc]
            self.current = step.instr
            self.counts[pc] += warps
            self.steps += 1
            active = group
            if step.guard >= 0:
                guard = self.regs[step.guard]
                active = group & ~guard if step.negate else group & guard
                if not active.any():
                    pc += 1
                    continue
            if step.kind == PLAIN:
                step.run(self, active)  # type: ignore[misc]
                pc += 1
            elif step.kind == BRANCH:
                if active is group or (active == group).all():
                    pc = step.targets[0]
                    continue
                self.pc[group] = pc + 1
                self.pc[active] = step.targets[0]
                return
            else:
                self.pc[group] = pc + 1
                self._control(step, active)
                return
        self.pc[group] = pc

    def _control(self, step, active: np.ndarray) -> None:
        """Exit, call, return, switch, barrier: the lanes' counters already point behind it."""
        if step.kind == BARRIER:
            step.run(self, active)
        elif step.kind == EXIT:
            self._exit(active)
        elif step.kind == CALL:
            if (self.depth[active] >= CALL_DEPTH).any():
                raise Deadlock("calls are nested too deep")
            step.run(self, active)
            self.returns[active, self.depth[active]] = self.pc[active]
            self.depth[active] += 1
            self.pc[active] = step.targets[0]
        elif step.kind == RETURN:
            inside = active & (self.depth > 0)
            self._exit(active & ~inside)
            self.depth[inside] -= 1
            self.pc[inside] = self.returns[inside, self.depth[inside]]
        elif step.kind == SWITCH:
            index = step.index(self)
            index = np.broadcast_to(index, self.lanes)[active].astype(np.int64)
            if (index >= len(step.targets)).any():
                raise LaunchError(f"brx.idx with index {index.max()} of {len(step.targets)}")
            self.pc[active] = np.array(step.targets)[index]

    def _exit(self, lanes: np.ndarray) -> None:
        self.done |= lanes
        self.runnable &= ~lanes

    def whole_warps(self, mask: np.ndarray) -> np.ndarray:
        """The warps of a mask; raises if a warp is there in part or lanes of it have exited."""
        present = mask.reshape(-1, WARP)
        some = present.any(axis=1)
        if (some != present.all(axis=1)).any():
            warp = int(np.argmax(some != present.all(axis=1)))
            raise Divergence(
                f"{int(present[warp].sum())} of 32 lanes of warp {warp} execute a collective "
                f"instruction: lanes {np.nonzero(present[warp])[0].tolist()}"
            )
        return np.nonzero(some)[0]

    def live_warps(self, mask: np.ndarray) -> None:
        """Raises unless every warp of the mask is there with all lanes that the block has."""
        self.whole_warps(mask | (self.absent & np.repeat(self._touched(mask), WARP)))

    @staticmethod
    def _touched(mask: np.ndarray) -> np.ndarray:
        return np.asarray(mask.reshape(-1, WARP).any(axis=1))

    def site(self, table: dict[int, Site], instr: Instr) -> Site:
        """The statistics of an access."""
        if instr.line not in table:
            table[instr.line] = Site(instr.text, instr.source)
        return table[instr.line]
