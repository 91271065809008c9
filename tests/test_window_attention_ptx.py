# SPDX-License-Identifier: Apache-2.0
"""The CUDA forward kernels, executed as the PTX that nvcc wrote, against the reference."""

from __future__ import annotations

import functools

import pytest
import torch

import ptxsim
from fastbb.ops import window_attention
from fastbb.testing import CUDA_KINDS, CUDA_TOLERANCES, assert_close
from fastbb.testing.window_attention import CASES, build, in_float64
from ptx_text import kernel_of, mutants
from ptxsim import toolkit
from window_attention_ptx import SOURCES, Call
from window_oracle import gather_attention

TOOLKIT, WHERE = toolkit.find()
pytestmark = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}")
BOUNDS = CUDA_TOLERANCES["fastbb::window_attention"]

# Many blocks of a few keys each, which add time and no branch.
SLOW = ("window_3x700", "window_24", "many_windows", "pvt_2500_keys")
# Strided layouts are the same kernel with other strides, and are made contiguous here.
ALL = [name for name, case in CASES.items() if case.batch and name not in (*SLOW, "no_queries")]
SOME = ["swin", "swin_v2", "gcvit_global_padded", "dim_30", "dim_64", "dim_128", "pvt_50_keys"]
SOME += ["roll_pad_both", "window_1x1", "full_bias_mask"]


@functools.cache
def ptx(kind: str, arch: str = "80") -> str:
    assert TOOLKIT is not None
    return TOOLKIT.compile(SOURCES[kind], arch).read_text()


@functools.cache
def module(kind: str, arch: str = "80") -> ptxsim.Module:
    return ptxsim.load(ptx(kind, arch))


def check(
    name: str, kind: str, arch: str = "80", many_blocks: int = 2048, **options: object
) -> Call:
    sample = build(name, dtype=CUDA_KINDS[kind])
    call = Call(sample.kwargs, kind == "tf32", many_blocks)
    call.run(module(kind, arch), **options)
    doubles = in_float64(sample.kwargs)
    expected = window_attention(**doubles, impl="reference")
    assert_close(call.result(), expected, BOUNDS[kind].forward_for(sample.difficulty), "out")
    lse = gather_attention(**doubles)[1]
    # Weights are rounded after their sum was taken: lse has no 16-bit rounding.
    unrounded = BOUNDS["tf32" if kind == "tf32" else "f32"].forward_for(sample.difficulty)
    assert_close(call.lse(), lse, unrounded, "lse")
    return call


@pytest.mark.parametrize("name", ALL)
def test_float16(name: str) -> None:
    check(name, "f16")


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["bf16", "f32", "tf32"])
def test_other_types(name: str, kind: str) -> None:
    check(name, kind)


# Case, blocks that are enough -> problems side by side, rounds of a block.
WALKS = {
    ("swin", 4): (1, 4),
    ("swin_v2", 2): (1, 2),
    ("pad_roll_both", 5): (1, 3),
    ("gcvit_global", 4): (1, 4),
    ("window_5x3", 2): (4, 3),
    ("many_windows", 5): (4, 3),
    ("full_l2norm", 1): (2, 2),
    ("dim_128", 1): (1, 1),
}


@pytest.mark.parametrize(("name", "many_blocks"), WALKS)
def test_blocks_that_take_several_problems(name: str, many_blocks: int) -> None:
    plan = check(name, "f16", many_blocks=many_blocks).plan
    assert (plan["pack"], plan["walk"]) == WALKS[name, many_blocks]


@pytest.mark.parametrize("arch", ["90", "100", "120"])
def test_code_for_later_architectures(arch: str) -> None:
    check("swin", "f16", arch)


@pytest.mark.parametrize("seed", [1, 2])
def test_warps_in_random_order(seed: int) -> None:
    check("window_12", "f16", schedule="random", seed=seed)
    check("full_l2norm", "f16", schedule="random", seed=seed)


def test_reads_of_shared_memory_do_not_conflict() -> None:
    call = Call(build("gcvit_local", dtype=torch.float16).kwargs)
    stats = call.run(module("f16")).stats
    assert stats.bank_conflicts("ldmatrix") == 1


# Deleting one barrier, wait or commit, or swapping the operands of one product, must be noticed.
MUTATED = ("window_12", "full_long_keys_l2norm")


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
            assert_close(call.result(), expected_of_mutated(name), BOUNDS["f16"].forward, "out")
    except (ptxsim.PtxError, AssertionError):
        return False
    return True


def test_mutations_are_noticed() -> None:
    start, kernel = kernel_of(ptx("f16"), "HalfMathELi32ELi1E")
    assert survives(start + kernel)
    for change, mutant in mutants(kernel):
        assert not survives(start + mutant), change
