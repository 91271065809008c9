# SPDX-License-Identifier: Apache-2.0
"""The CUDA forward kernel, executed as the PTX that nvcc wrote, against the reference."""

from __future__ import annotations

import functools
import re

import pytest
import torch

import ptxsim
from fastbb.ops import window_attention
from fastbb.testing import TOLERANCES, Bounds, assert_close
from fastbb.testing.window_attention import CASES, build
from ptxsim import toolkit
from window_attention_ptx import SOURCE, Call
from window_oracle import gather_attention, in_float64

TOOLKIT, WHERE = toolkit.find()
pytestmark = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}")
EXACT = TOLERANCES["fastbb::window_attention"][torch.float32]
# One rounding of each weight and one of the result, for values of order 1.
BOUNDS = {torch.float16: Bounds(1e-3, 1e-3, 1e-3), torch.bfloat16: Bounds(8e-3, 8e-3, 8e-3)}

# Many blocks of a few keys each, which add time and no branch.
SLOW = ("window_3x700", "window_24", "many_windows", "pvt_2500_keys")
# Strided layouts are the same kernel with other strides, and are made contiguous here.
HALF = [name for name, case in CASES.items() if case.batch and name not in (*SLOW, "no_queries")]
BFLOAT = ["swin", "swin_v2", "gcvit_global_padded", "dim_30", "pvt", "roll_pad_both"]


@functools.cache
def ptx(arch: str = "80") -> str:
    assert TOOLKIT is not None
    return TOOLKIT.compile(SOURCE, arch).read_text()


@functools.cache
def module(arch: str = "80") -> ptxsim.Module:
    return ptxsim.load(ptx(arch))


def check(name: str, dtype: torch.dtype, arch: str = "80", **options: object) -> None:
    sample = build(name, dtype=dtype)
    call = Call(sample.kwargs)
    call.run(module(arch), **options)
    doubles = in_float64(sample.kwargs)
    expected = window_attention(**doubles, impl="reference")
    assert_close(call.result(), expected, BOUNDS[dtype], "out")
    exact = EXACT.forward_for(4 * sample.difficulty)
    assert_close(call.lse(), gather_attention(**doubles)[1], exact, "lse")


@pytest.mark.parametrize("name", HALF)
def test_float16(name: str) -> None:
    if CASES[name].dim % 8 and CASES[name].dim > 32:
        pytest.skip("no such instantiation in the test's source")
    check(name, torch.float16)


@pytest.mark.parametrize("name", BFLOAT)
def test_bfloat16(name: str) -> None:
    check(name, torch.bfloat16)


@pytest.mark.parametrize("arch", ["90", "100", "120"])
def test_code_for_later_architectures(arch: str) -> None:
    check("swin", torch.float16, arch)


@pytest.mark.parametrize("seed", [1, 2])
def test_warps_in_random_order(seed: int) -> None:
    check("window_12", torch.float16, schedule="random", seed=seed)
    check("full_l2norm", torch.float16, schedule="random", seed=seed)


def test_reads_of_shared_memory_do_not_conflict() -> None:
    call = Call(build("gcvit_local", dtype=torch.float16).kwargs)
    stats = call.run(module()).stats
    assert stats.bank_conflicts("ldmatrix") == 1


# Deleting one barrier, wait or commit, or swapping the operands of one product, must be noticed.
MUTATED = ("window_12", "full_long_keys_l2norm")
REMOVED = re.compile(r"^\s*(bar\.sync|cp\.async\.(wait_group|commit_group)).*$", re.MULTILINE)
MMA = re.compile(r"(mma\.sync\S+ \{[^}]*\}, )\{([^,]*), ([^,]*), ([^}]*)\}")


def kernel_text(name: str) -> str:
    """The PTX of one kernel alone."""
    header, *bodies = re.split(r"(?=^\.visible \.entry )", ptx(), flags=re.MULTILINE)
    (body,) = (b for b in bodies if name in b.split("(", 1)[0])
    return header + body


@functools.cache
def expected_of_mutated(name: str) -> torch.Tensor:
    return window_attention(**build(name, dtype=torch.float16).kwargs, impl="reference")


def survives(text: str) -> bool:
    """Whether the changed kernel runs without an error and gives the right results."""
    try:
        changed = ptxsim.load(text)
        for name in MUTATED:
            call = Call(build(name, dtype=torch.float16).kwargs)
            call.run(changed)
            assert_close(call.result(), expected_of_mutated(name), BOUNDS[torch.float16], "out")
    except (ptxsim.PtxError, AssertionError):
        return False
    return True


def test_mutations_are_noticed() -> None:
    text = kernel_text("HalfMathELi32ELb1E")
    assert survives(text)
    removals = list(REMOVED.finditer(text))
    assert {m[1].split(".")[0] for m in removals} == {"bar", "cp"}
    for match in removals:
        changed = text[: match.start()] + text[match.end() :]
        line = text.count("\n", 0, match.start()) + 1
        assert not survives(changed), f"line {line}: {match[0].strip()}"
    products = list(MMA.finditer(text))
    assert len(products) > 16
    for match in products[:: len(products) // 4]:
        swapped = match.expand(r"\1{\3, \2, \4}")
        assert not survives(text[: match.start()] + swapped + text[match.end() :])


@pytest.mark.parametrize("arch", ["80", "86", "89", "90", "100", "120"])
def test_nothing_spills(arch: str) -> None:
    assert TOOLKIT is not None
    strict = ("-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror")
    assert TOOLKIT.compile(SOURCE, arch, "cubin", strict).is_file()
