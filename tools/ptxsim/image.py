# SPDX-License-Identifier: Apache-2.0
"""The executable form of a kernel: one list of steps with the functions that it calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptxsim.decode import Decoder, Read, decode
from ptxsim.errors import PtxError, Unsupported
from ptxsim.flow import branch_targets, layout
from ptxsim.program import Function, Group, Instr, Sym, Unit, Variable

PLAIN, BRANCH, SWITCH, EXIT, RETURN, CALL, BARRIER = range(7)
KINDS = {
    "bra": BRANCH,
    "brx": SWITCH,
    "exit": EXIT,
    "ret": RETURN,
    "call": CALL,
    "bar": BARRIER,
    "barrier": BARRIER,
}
LOCAL_START = 1 << 16  # of parameters of device functions, behind those of the kernel


@dataclass
class Step:
    """One instruction, ready to run.

    Attributes:
        kind: how the scheduler treats it.
        run: what it does to the lanes of a mask (plain instructions and barriers).
        guard, negate: register of the guard predicate, or -1.
        targets: where a branch goes.
    """

    kind: int
    instr: Instr
    run: Callable[..., Any] | None = None
    guard: int = -1
    negate: bool = False
    targets: list[int] = field(default_factory=list)
    index: Read | None = None


@dataclass
class Image:
    """Code and memory layout of one kernel."""

    kernel: Function
    functions: list[Function]
    steps: list[Step]
    entry: int
    shared_size: int
    local_size: int
    param_size: int
    lane_param_size: int
    dynamic: list[Variable]


def _calls(function: Function) -> list[str]:
    names = []
    for instr in function.body:
        if instr.base == "call":
            names += [op.name for op in instr.ops if isinstance(op, Sym)][:1]
    return names


def _order(unit: Unit, kernel: Function) -> list[Function]:
    """The kernel and what it calls, callees first: lanes inside a call run before those outside."""
    done: list[Function] = []
    active: set[str] = set()

    def visit(name: str) -> None:
        if name in active:
            raise Unsupported(f"{name} calls itself")
        if any(each.name == name for each in done):
            return
        if name not in unit.functions:
            raise Unsupported(f"function {name} has no body")
        active.add(name)
        for callee in _calls(unit.functions[name]):
            visit(callee)
        active.discard(name)
        done.append(unit.functions[name])

    visit(kernel.name)
    return done


def _place(variables: list[Variable], start: int) -> int:
    """Gives addresses to variables one after the other; returns the end."""
    for variable in variables:
        start = -(-start // variable.align) * variable.align
        variable.address = start
        start += variable.size
    return start


def _variables(unit: Unit, functions: list[Function], space: str) -> list[Variable]:
    own = [v for f in functions for v in f.variables if v.space == space]
    return own + [v for v in unit.variables.values() if v.space == space]


def _call_parts(unit: Unit, instr: Instr) -> tuple[Function, list, list]:
    """The callee, and pairs (from, to) of parameter variables before and after the call."""
    at = next(i for i, op in enumerate(instr.ops) if isinstance(op, Sym))
    callee = unit.functions[instr.ops[at].name]  # type: ignore[union-attr]
    outside = {"before": instr.ops[at + 1 :], "after": instr.ops[:at]}
    pairs = {}
    for key, formal in (("before", callee.params), ("after", callee.results)):
        actual = [item for op in outside[key] if isinstance(op, Group) for item in op.items]
        names = [item.variable for item in actual if isinstance(item, Sym) and item.variable]
        if len(names) != len(actual) or [v.size for v in names] != [v.size for v in formal]:
            raise Unsupported("call with other arguments than the function has")
        pairs[key] = list(zip(names, formal, strict=True))
    return callee, pairs["before"], [(inside, actual) for actual, inside in pairs["after"]]


def _copier(pairs: list[tuple[Variable, Variable]]) -> Callable[..., None]:
    def run(m: Any, mask: np.ndarray) -> None:
        lanes = np.nonzero(mask)[0]
        for source, target in pairs:
            for i in range(source.size):
                here = lanes * m.lane_params.room + source.address - LOCAL_START + i
                there = lanes * m.lane_params.room + target.address - LOCAL_START + i
                m.lane_params.data[there] = m.lane_params.data[here]
                m.lane_params.state[there] = m.lane_params.state[here]

    return run


def build(unit: Unit, kernel: Function, shared_start: int) -> Image:
    """Lays out a kernel. Raises Unsupported for any instruction that is not known."""
    functions = _order(unit, kernel)
    variables = _variables(unit, functions, "shared")
    dynamic = [v for v in variables if v.extern or not v.size]
    shared_end = _place([v for v in variables if v not in dynamic], shared_start)
    local_size = _place(_variables(unit, functions, "local"), 0)
    param_size = _place(kernel.params, 0)
    lane_params = [v for f in functions for v in f.variables if v.space == "param"]
    lane_params += [v for f in functions if f is not kernel for v in [*f.params, *f.results]]
    lane_end = _place(lane_params, LOCAL_START)

    steps: list[Step] = []
    entries: dict[str, int] = {}
    for function in functions:
        entries[function.name] = len(steps)
        _add_function(unit, function, steps, entries)
    return Image(
        kernel,
        functions,
        steps,
        entries[kernel.name],
        shared_end - shared_start,
        local_size,
        param_size,
        lane_end - LOCAL_START,
        dynamic,
    )


def _add_function(
    unit: Unit, function: Function, steps: list[Step], entries: dict[str, int]
) -> None:
    code, place = layout(function)
    where: list[int] = []
    branches: list[Step] = []
    for instr in code:
        where.append(len(steps))
        kind = KINDS.get(instr.base, PLAIN)
        step = Step(kind, instr)
        if instr.guard is not None:
            step.guard, step.negate = instr.guard.index, instr.guard_not
        steps.append(step)
        try:
            if kind in (PLAIN, BARRIER):
                step.run = decode(instr)
            elif kind in (BRANCH, SWITCH):
                branches.append(step)
                if kind == SWITCH:
                    step.index = Decoder(instr).read(0, "u32")
            elif kind == CALL:
                callee, before, after = _call_parts(unit, instr)
                step.targets = [entries[callee.name]]
                step.run = _copier(before)
                receive = Instr("", [], 0, instr.text, instr.source)
                steps.append(Step(PLAIN, receive, _copier(after), step.guard, step.negate))
            allowed = {"uni", "idx"} if kind != PLAIN else set()
            if kind not in (PLAIN, BARRIER) and set(instr.mods) - allowed:
                raise Unsupported(f"instruction {instr.opcode} is not known")
        except PtxError as error:
            raise error.at(instr.location) from None
    for step in branches:
        step.targets = [where[place[t]] for t in branch_targets(function, step.instr)]
