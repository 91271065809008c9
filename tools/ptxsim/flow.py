# SPDX-License-Identifier: Apache-2.0
"""Puts the basic blocks of a function into an order in which running the lanes with the smallest
program counter first makes diverged lanes meet again as early as the program allows.

The order is topological but for back edges, and the blocks of a loop stand together: when a block
is about to run, no lane is left in a block before it, so everything that can still reach the
block without another turn of a loop has arrived.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from ptxsim.errors import PtxError
from ptxsim.program import Function, Instr, Sym

ENDS = {"ret", "exit", "trap"}
JUMPS = {"bra", "brx"}


@dataclass
class Block:
    """Instructions first..last (exclusive) of the body, and the blocks that may follow."""

    first: int
    last: int
    targets: list[int]
    falls_to: int | None


def branch_targets(function: Function, instr: Instr) -> list[int]:
    """Body indices that a branch may go to."""
    if instr.base == "bra":
        names = [op.name for op in instr.ops if isinstance(op, Sym)]
    else:
        (table,) = [op.name for op in instr.ops if isinstance(op, Sym)]
        names = function.tables.get(table, [])
    missing = [name for name in names if name not in function.labels]
    if missing or not names:
        raise PtxError(f"no label {missing}").at(instr.location)
    return [function.labels[name] for name in names]


def blocks_of(function: Function) -> list[Block]:
    """Basic blocks in the order of the text."""
    body = function.body
    leaders = {0}
    for i, instr in enumerate(body):
        if instr.base in JUMPS:
            leaders.update(branch_targets(function, instr))
        if instr.base in JUMPS | ENDS:
            leaders.add(i + 1)
    starts = sorted(index for index in leaders if index < len(body))
    number = {start: i for i, start in enumerate(starts)}
    result = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(body)
        last = body[end - 1]
        targets: list[int] = []
        if last.base in JUMPS:
            if any(t >= len(body) for t in branch_targets(function, last)):
                raise PtxError("branch to the end of a function").at(last.location)
            targets = [number[t] for t in branch_targets(function, last)]
        stops = last.base in JUMPS | ENDS and last.guard is None
        falls = None if stops else i + 1
        if falls == len(starts):
            raise PtxError(f"function {function.name} runs past its end").at(last.location)
        result.append(Block(start, end, targets, falls))
    return result


def _components(nodes: list[int], edges: dict[int, list[int]]) -> list[list[int]]:
    """Strongly connected components (Tarjan, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in nodes:
        if root in index:
            continue
        work = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in index:
                    index[child] = low[child] = len(index)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(edges[child])))
                    break
                if child in on_stack:
                    low[node] = min(low[node], index[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = []
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        component.append(member)
                        if member == node:
                            break
                    found.append(sorted(component))
    return found


def _order(nodes: list[int], edges: dict[int, list[int]]) -> list[int]:
    """Topological order of the components; loops are ordered by themselves without back edges."""
    inside = set(nodes)
    local = {node: [t for t in edges[node] if t in inside] for node in nodes}
    components = _components(nodes, local)
    of = {node: i for i, component in enumerate(components) for node in component}
    follows: list[set[int]] = [set() for _ in components]
    waits = [0] * len(components)
    for node in nodes:
        for target in local[node]:
            if of[node] != of[target] and of[target] not in follows[of[node]]:
                follows[of[node]].add(of[target])
                waits[of[target]] += 1
    ready = [(component[0], i) for i, component in enumerate(components) if not waits[i]]
    heapq.heapify(ready)
    result: list[int] = []
    while ready:
        _, i = heapq.heappop(ready)
        component = components[i]
        if len(component) == 1:
            result += component
        else:
            entries = {t for n in edges if n not in component for t in edges[n]} & set(component)
            header = min(entries or component)
            inner = {n: [t for t in local[n] if t != header] for n in component}
            result += _order(component, inner)
        for j in follows[i]:
            waits[j] -= 1
            if not waits[j]:
                heapq.heappush(ready, (components[j][0], j))
    return result


def layout(function: Function) -> tuple[list[Instr], dict[int, int]]:
    """The body in execution order, and the new place of every block's first instruction.

    Where a block does not stand before the block it falls through to, a branch is added; added
    branches have line 0 and are not counted as instructions of the program.
    """
    blocks = blocks_of(function)
    edges = {
        i: [*block.targets, *([] if block.falls_to is None else [block.falls_to])]
        for i, block in enumerate(blocks)
    }
    reachable, queue = {0}, [0]
    while queue:
        for target in edges[queue.pop()]:
            if target not in reachable:
                reachable.add(target)
                queue.append(target)
    order = _order(sorted(reachable), {node: edges[node] for node in reachable})
    labels = {index: name for name, index in function.labels.items()}
    code: list[Instr] = []
    place: dict[int, int] = {}
    for position, node in enumerate(order):
        block = blocks[node]
        place[block.first] = len(code)
        code += function.body[block.first : block.last]
        following = order[position + 1] if position + 1 < len(order) else None
        if block.falls_to is not None and block.falls_to != following:
            first = blocks[block.falls_to].first
            name = labels.setdefault(first, f"$fall{first}")
            function.labels[name] = first
            code.append(Instr("bra.uni", [Sym(name)], 0, f"bra.uni {name}"))
    return code, place
