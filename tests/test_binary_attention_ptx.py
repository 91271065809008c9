# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of binary attention, executed as the PTX that nvcc wrote, against the reference:
planes are equal, results and log-sum-exps close.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch

import ptxsim
from binary_attention_ptx import KINDS, SOURCES, Call, Case, Params
from fastbb import _C
from ptx_text import kernel_of
from ptxsim import toolkit

TOOLKIT, WHERE = toolkit.find()
needs_toolkit = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}")


@functools.cache
def ptx(kind: str, arch: str = "80") -> str:
    assert TOOLKIT is not None
    return TOOLKIT.compile(SOURCES[kind], arch).read_text()


@functools.cache
def module(kind: str, arch: str = "80") -> ptxsim.Module:
    return ptxsim.load(ptx(kind, arch))


def check(case: Case, arch: str = "80", **options: Any) -> Call:
    assert case.sure.all()
    call = Call(case)
    call.run(module(KINDS[case.dtype], arch), **options)
    call.check()
    return call


CASES: dict[str, dict[str, Any]] = {
    "one key": {"nq": 1, "nk": 1, "dim": 1},
    "small": {"nq": 5, "nk": 7, "dim": 3, "heads": 2, "batch": 2},
    "tokens_49": {"nq": 49, "nk": 49, "dim": 32, "mask": "keys"},
    "dim_64": {"nq": 20, "nk": 130, "dim": 64, "rank": 2, "mask": "keys", "v_p": True},
    "dim_64_inference": {"nq": 20, "nk": 50, "dim": 64, "rank": 1, "v_p": True, "save": False},
    "dim_96": {"nq": 17, "nk": 33, "dim": 96, "heads": 2, "v_p": True},
    "dim_128": {"nq": 16, "nk": 48, "dim": 128, "rank": 3, "save": False},
    "odd dim": {"nq": 9, "nk": 21, "dim": 65, "strided": True, "mask": "full"},
    "full mask": {"nq": 18, "nk": 35, "dim": 30, "batch": 2, "mask": "full", "rank": 1},
    "dropout": {"nq": 7, "nk": 29, "dim": 40, "heads": 2, "dropout_p": 0.3, "v_p": True},
    "dropout, rows of 4": {"nq": 17, "nk": 36, "dim": 64, "dropout_p": 0.5, "mask": "keys"},
    "bool": {"nq": 18, "nk": 50, "dim": 64, "probs": "bool", "ste": "clip_open"},
    "bool, all": {
        "nq": 8,
        "nk": 20,
        "dim": 16,
        "probs": "bool",
        "dropout_p": 0.2,
        "mask": "full",
        "rank": 2,
        "alphas": False,
    },
    "identity": {"nq": 4, "nk": 18, "dim": 12, "ste": "identity", "special": True},
    "special": {"nq": 19, "nk": 40, "dim": 64, "special": True, "strided": True},
    "no alphas": {"nq": 4, "nk": 3, "dim": 8, "alphas": False, "heads": 3},
}


@needs_toolkit
@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    check(Case(**CASES[name]))


@needs_toolkit
@pytest.mark.parametrize("name", ["small", "dim_64", "dim_96", "odd dim", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check(Case(**CASES[name], dtype=dtype))


@needs_toolkit
@pytest.mark.parametrize("name", ["softmax", "bool"])
def test_keys_in_chunks(name: str) -> None:
    """A rank that leaves room for one tile of keys at a time."""
    call = check(Case(18, 270, 16, rank=60, probs=name, mask="keys", v_p=True))
    assert call.plan["chunk"] == 128


@needs_toolkit
def test_blocks_of_queries() -> None:
    call = check(Case(150, 20, 16, dtype=torch.float16))
    assert call.plan["launch"] == {"grid": 2, "block": 256, "shared_bytes": 6656}


@needs_toolkit
def test_no_queries() -> None:
    check(Case(0, 5, 8))


@needs_toolkit
@pytest.mark.parametrize("arch", ["90", "100", "120"])
def test_code_for_later_architectures(arch: str) -> None:
    check(Case(**CASES["dim_64"], dtype=torch.float16), arch)


@needs_toolkit
def test_warps_in_random_order() -> None:
    check(Case(36, 140, 16, rank=24, v_p=True), schedule="random", seed=1)


@needs_toolkit
def test_shared_memory_is_read_without_conflicts() -> None:
    call = Call(Case(**CASES["dim_64"], dtype=torch.float16))
    result = call.run(module("f16"))
    assert result is not None
    assert result.stats.bank_conflicts("ld.shared") == 1


# Deleted; made a constant; made a copy of its operand; the second half of B in place of the first.
BARRIER = re.compile(r"^\s*bar\.(warp\.)?sync.*$", re.MULTILINE)
BALLOT = re.compile(r"vote\.sync\.ballot\.b32\s+(\S+),[^;]*;")
SHUFFLE = re.compile(r"shfl\.sync\.bfly\.b32\s+(\S+)\|\S+, (\S+),[^;]*;")
MMA = re.compile(r"(mma\.sync\S+ \{[^}]*\}, \{[^}]*\}, )\{([^,]*), ([^}]*)\}")
MUTATED = [
    Case(17, 40, 64, rank=1, v_p=True, dropout_p=0.25, mask="keys"),
    Case(17, 130, 64, rank=24, dropout_p=0.25),
]


def survives(text: str) -> bool:
    try:
        changed = ptxsim.load(text)
        for case in MUTATED:
            call = Call(case)
            call.run(changed)
            call.check()
    except (ptxsim.PtxError, AssertionError):
        return False
    return True


@needs_toolkit
def test_mutations_are_noticed() -> None:
    header, kernel = kernel_of(ptx("f32"), "Li2ELb1E")
    assert survives(header + kernel)
    found = {each: list(each.finditer(kernel)) for each in (BARRIER, BALLOT, SHUFFLE, MMA)}
    changes = [(match, "") for match in found[BARRIER]]
    changes += [(match, f"mov.b32 {match[1]}, 1;") for match in found[BALLOT][::50]]
    changes += [(match, f"mov.b32 {match[1]}, {match[2]};") for match in found[SHUFFLE][::16]]
    changes += [(match, match.expand(r"\1{\3, \3}")) for match in found[MMA][::5]]
    assert len(found[BARRIER]) == 5 and len(changes) > 15
    for match, instead in changes:
        changed = kernel[: match.start()] + instead + kernel[match.end() :]
        line = kernel.count("\n", 0, match.start())
        assert not survives(header + changed), f"line {line}: {match[0]}"


def test_plan_covers_all_queries_once() -> None:
    """The C++ plan alone, at sizes that are too large to run."""
    for nq, nk, dim, rank in ((1, 1, 1, 0), (128, 128, 64, 2), (4096, 10**6, 128, 64)):
        params = Params(batch=3, heads=12, nq=nq, nk=nk, head_dim=dim, rank=rank, v_p=1)
        plan = _C.binary_attention_cuda_plan(bytes(params))
        launch = plan["launch"]
        assert plan["q_block"] == launch["block"] // 2 <= (128 if dim <= 64 else 64)
        assert launch["grid"] == 36 * -(-nq // plan["q_block"])
        assert plan["chunk"] % 128 == 0 and plan["chunk"] < nk + 128
        # What a block may have on every device.
        assert launch["shared_bytes"] <= 99 * 1024
