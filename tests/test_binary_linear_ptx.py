# SPDX-License-Identifier: Apache-2.0
"""Products of packed bits: the CUDA kernels, executed as the PTX that nvcc wrote, against the
definition.
"""

from __future__ import annotations

import functools

import pytest
import torch

import ptxsim
from binary_linear_ptx import LARGE, SMALL, SOURCE, Call, Case, Params
from fastbb import _C
from ptx_text import kernel_of, mutants
from ptxsim import toolkit

TOOLKIT, WHERE = toolkit.find()
needs_toolkit = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}")

CASES = {
    "one": Case(1, 1, 1),
    "odd": Case(5, 3, 130),
    "chunks": Case(33, 130, 700),
    "six_chunks": Case(3, 9, 2900),
    "minus_unsigned": Case(7, 20, 200, a="minus", b="unsigned"),
    "unsigned_plus": Case(40, 12, 384, a="unsigned"),
    "unsigned_unsigned": Case(9, 40, 65, a="unsigned", b="unsigned"),
    "ternary_plus": Case(35, 129, 600, a="ternary"),
    "ternary_unsigned": Case(4, 8, 513, a="ternary", b="unsigned"),
    "overlap": Case(4, 8, 100, a="ternary", overlap=True),
    "batch": Case(3, 5, 200, batch=4, gap=32),
    "batch_ternary": Case(3, 5, 200, a="ternary", b="minus", batch=3, gap=16),
    "float": Case(6, 12, 200, out=torch.float32, alpha=0.3, scale="one"),
    "float_odd": Case(6, 13, 200, out=torch.float32, scale="all", bias=True, batch=2),
    "float_relu": Case(6, 132, 200, out=torch.float32, scale="all", activation="relu"),
    "float_gelu": Case(6, 12, 200, a="ternary", out=torch.float32, bias=True, activation="gelu"),
    "bf16": Case(6, 12, 200, out=torch.bfloat16, alpha=0.3, scale="all", bias=True),
    "bf16_odd": Case(6, 15, 200, a="unsigned", out=torch.bfloat16, alpha=1e-9, scale="one"),
    "f16_relu": Case(6, 12, 200, out=torch.float16, scale="all", bias=True, activation="relu"),
    "f16_gelu": Case(9, 14, 200, out=torch.float16, scale="all", activation="gelu"),
    "bits_plus": Case(33, 131, 200, out="plus"),
    "bits_minus": Case(33, 70, 200, out="minus", alpha=0.2, scale="all", bias=True),
    "bits_ternary": Case(35, 140, 300, a="ternary", out="ternary", shift=True, batch=2),
    "bits_unsigned": Case(
        5, 256, 300, a="unsigned", out="unsigned", scale="all", bias=True, activation="gelu",
        shift=True,
    ),
    "nan": Case(3, 9, 64, out="plus", alpha=float("nan"), bias=True),
}  # fmt: skip
LATER = ["chunks", "minus_unsigned", "ternary_plus", "overlap", "bits_ternary", "f16_gelu"]


@functools.cache
def ptx(arch: str = "80") -> str:
    assert TOOLKIT is not None
    return TOOLKIT.compile(SOURCE, arch).read_text()


@functools.cache
def module(arch: str = "80") -> ptxsim.Module:
    return ptxsim.load(ptx(arch))


def check(name: str, many_tiles: int, arch: str = "80", **options: object) -> ptxsim.Result:
    call = Call(CASES[name], many_tiles)
    result = call.run(module(arch), **options)
    call.check()
    return result


@needs_toolkit
@pytest.mark.parametrize("name", CASES)
def test_small_tiles(name: str) -> None:
    check(name, SMALL)


@needs_toolkit
@pytest.mark.parametrize("name", CASES)
def test_large_tiles(name: str) -> None:
    check(name, LARGE)


@needs_toolkit
@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("arch", ["90", "100", "120"])
def test_code_for_later_architectures(arch: str, name: str) -> None:
    """Bits from sm_100 on are spread to int8."""
    kind = "s8" if int(arch) >= 100 else "b1"
    for many_tiles in (SMALL, LARGE) if arch == "100" else (SMALL,):
        stats = check(name, many_tiles, arch).stats
        products = [opcode for opcode in stats.opcodes if opcode.startswith("mma")]
        assert products and all(kind in each for each in products)


@needs_toolkit
def test_warps_in_random_order() -> None:
    for seed in (1, 2):
        check("ternary_plus", SMALL, schedule="random", seed=seed)
        check("chunks", LARGE, schedule="random", seed=seed)


@needs_toolkit
@pytest.mark.parametrize("many_tiles", [SMALL, LARGE])
def test_memory_is_used_well(many_tiles: int) -> None:
    """Shared memory without conflicts, global memory by whole sectors."""
    for a in ("plus", "ternary"):
        call = Call(Case(128, 128, 1024, a=a, out=torch.float16, scale="all"), many_tiles)
        stats = call.run(module()).stats
        call.check()
        assert stats.count("ldmatrix") > 0 and stats.bank_conflicts("ldmatrix") == 1
        assert stats.bank_conflicts("cp.async") <= 1
        assert stats.sector_overhead("cp.async") == stats.sector_overhead("st.global") == 1.0


# Deleting one barrier, wait or commit, or swapping the operands of one product, must be noticed.
MUTATED = [Case(40, 130, 2100, out="ternary", shift=True, scale="all"), Case(33, 140, 1600)]


@needs_toolkit
@pytest.mark.parametrize(("kernel", "many_tiles"), [("Li32ELi1E", SMALL), ("Li128ELi2E", LARGE)])
def test_mutations_are_noticed(kernel: str, many_tiles: int) -> None:
    kind = "ternary" if "Li2E" in kernel else "plus"

    def survives(text: str) -> bool:
        try:
            changed = ptxsim.load(text)
            for case in MUTATED:
                call = Call(Case(**{**vars(case), "a": kind}), many_tiles)
                call.run(changed)
                call.check()
        except (ptxsim.PtxError, AssertionError):
            return False
        return True

    header, text = kernel_of(ptx(), f"binary_linearI{kernel}")
    assert survives(header + text)
    for change, mutant in mutants(text):
        assert not survives(header + mutant), change


def test_plan_covers_the_result() -> None:
    """The C++ plan alone, at sizes that are too large to run."""
    for batch, m, n in (
        (1, 4096, 3072),
        (12, 197, 64),
        (1, 1, 10**6),
        (1, 10**6, 1),
        (3, 129, 129),
    ):
        plan = _C.binary_linear_cuda_plan(bytes(Params(batch=batch, m=m, n=n, k=768)))
        tiles = -(-m // plan["rows"]) * -(-n // 128)
        assert plan["launch"]["grid"] == batch * tiles < 2**31
        assert plan["aligned"] == (n % 4 == 0)
        large = batch * -(-m // 128) * -(-n // 128) >= 256
        assert plan["rows"] == (128 if large else 32)
    for empty in (Params(m=1, n=1), Params(batch=1, n=1), Params(batch=1, m=1)):
        assert _C.binary_linear_cuda_plan(bytes(empty))["launch"]["grid"] == 0
