# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of elastic binarization, executed as the PTX that nvcc wrote, against the
reference: values, planes and gradients of x are equal, sums close.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch

import ptxsim
from elastic_binarize_ptx import DTYPES, KINDS, SOURCE, STES, BackwardCall, Call, Case, Params
from fastbb import _C
from ptx_text import kernels_of
from ptxsim import toolkit

TOOLKIT, WHERE = toolkit.find()
needs_toolkit = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}")


@functools.cache
def ptx(arch: str = "80") -> str:
    assert TOOLKIT is not None
    return TOOLKIT.compile(SOURCE, arch).read_text()


@functools.cache
def module(arch: str = "80") -> ptxsim.Module:
    return ptxsim.load(ptx(arch))


def check(case: Case, arch: str = "80", **options: object) -> None:
    for call in (Call(case), BackwardCall(case)):
        call.run(module(arch), **options)
        call.check()


@needs_toolkit
@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, ste: str) -> None:
    check(Case(9, 133, kind, ste, special=True))


# rows, k, padding of a row, whether there are alpha and shift.
SIZES = {
    "one element": (1, 1, 0, True, True),
    "one unit": (7, 128, 0, True, False),
    "a column more": (33, 129, 3, False, True),
    "odd stride": (40, 200, 1, True, True),
    "several tasks": (70, 31, 0, True, True),
    "three units": (3, 300, 5, False, False),
}


@needs_toolkit
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, dtype: torch.dtype) -> None:
    rows, k, padding, alpha, shift = SIZES[name]
    names = list(SIZES)
    kind = KINDS[(names.index(name) + DTYPES[dtype]) % len(KINDS)]
    check(Case(rows, k, kind, "clip", dtype, alpha, shift, padding))


@needs_toolkit
@pytest.mark.parametrize(("rows", "k"), [(0, 5), (4, 0)])
def test_empty(rows: int, k: int) -> None:
    """Sums of nothing are zero."""
    params = Params(rows=rows, k=k)
    plan = _C.elastic_binarize_cuda_plan(bytes(params))
    assert plan["forward"]["grid"] == plan["backward"]["grid"] == plan["tasks"] == 0
    arena = ptxsim.Arena()
    params.dshift = arena.add(torch.full((k,), torch.nan).numpy(), "out")
    dalpha = arena.add(torch.full((1,), torch.nan).numpy(), "out")
    (kernel,) = (name for name in module().kernels if "sums" in name)
    launch = {"grid": plan["sums"]["grid"], "block": plan["sums"]["block"]}
    args = [params, plan["bytes"], dalpha.to_bytes(8, "little")]
    module().launch(kernel, args=args, arena=arena, **launch)
    assert not arena.get(dalpha).any() and not arena.get(params.dshift).any()


@needs_toolkit
def test_results_that_nobody_wants() -> None:
    case = Case(5, 40, "ternary")
    for call in (Call(case, save=False), Call(case, out=False), BackwardCall(case, sums=False)):
        call.run(module())
        call.check()


@needs_toolkit
@pytest.mark.parametrize("arch", ["90", "100", "120"])
def test_code_for_later_architectures(arch: str) -> None:
    check(Case(9, 133, "ternary", dtype=torch.float16), arch)


@needs_toolkit
def test_warps_in_random_order() -> None:
    check(Case(40, 133, "ternary"), schedule="random", seed=1)


# Deleted, made a constant, and made a copy of its operand.
BARRIER = re.compile(r"^\s*bar\.sync.*$", re.MULTILINE)
BALLOT = re.compile(r"vote\.sync\.ballot\.b32\s+(\S+),[^;]*;")
SHUFFLE = re.compile(r"shfl\.sync\.bfly\.b32\s+(\S+)\|\S+, (\S+),[^;]*;")


def survives(text: str) -> bool:
    case = Case(32, 133, "ternary")
    try:
        for call in (Call(case), BackwardCall(case)):
            call.run(ptxsim.load(text))
            call.check()
    except (ptxsim.PtxError, AssertionError):
        return False
    return True


@needs_toolkit
def test_mutations_are_noticed() -> None:
    header, bodies = kernels_of(ptx())
    kept = [body for name, body in bodies.items() if "IfE" in name or "IfLb0" in name]
    text = header + "".join(kept) + next(body for name, body in bodies.items() if "sums" in name)
    assert survives(text)
    barriers, ballots, shuffles = (list(each.finditer(text)) for each in (BARRIER, BALLOT, SHUFFLE))
    assert len(barriers) == 2 and len(ballots) >= 12 and len(shuffles) == 5
    changes = [(match, "") for match in barriers]
    changes += [(match, f"mov.b32 {match[1]}, 1;") for match in ballots[::7]]
    changes += [(match, f"mov.b32 {match[1]}, {match[2]};") for match in shuffles]
    for match, instead in changes:
        assert not survives(text[: match.start()] + instead + text[match.end() :]), match[0]


def test_plan_covers_all_rows_once() -> None:
    """The C++ plan alone, at sizes that are too large to run."""
    for rows, k in ((1, 1), (4096, 768), (10**6, 96), (3, 10**6), (10**7, 3072)):
        plan = _C.elastic_binarize_cuda_plan(bytes(Params(rows=rows, k=k)))
        units = -(-k // 128)
        assert plan["forward"] == {"grid": -(-rows // 32) * units, "block": 256, "shared_bytes": 0}
        assert plan["forward"]["grid"] < 2**31
        assert plan["backward"]["grid"] == plan["tasks"] * units <= max(1056, units)
        assert (plan["tasks"] - 1) * plan["rows_per_task"] < rows
        assert rows <= plan["tasks"] * plan["rows_per_task"]
        assert plan["sums"]["grid"] == -(-k // 32) + 1
