# SPDX-License-Identifier: Apache-2.0
"""The CUDA backward kernels, executed as the PTX that nvcc wrote, against float64 gradients."""

from __future__ import annotations

import functools

import pytest
import torch

import ptxsim
from fastbb.testing import CUDA_KINDS, CUDA_TOLERANCES, assert_grads_close
from fastbb.testing.window_attention import CASES, build
from ptx_text import kernel_of, mutants
from ptxsim import toolkit
from test_window_attention_backward import expected, random_grad
from window_attention_ptx import BACKWARD_SOURCES, BackwardCall

TOOLKIT, WHERE = toolkit.find()
pytestmark = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}")
TOLERANCES = CUDA_TOLERANCES["fastbb::window_attention_backward"]

# Packs of 1, 2 and 4 problems, one kernel or two, split queries, shared queries, pads, bias and
# table, masks, scale, normalised rows, rows of 30 unaligned channels.
CASES_16_BIT = [
    *("swin", "swin_v2", "gcvit_global", "gcvit_global_padded", "roll_pad_both", "pad_roll_both"),
    *("dim_30", "dim_64", "dim_128", "pvt_50_keys", "pvt_long_queries", "pvt_one_key"),
    *("full_bias_mask", "full_l2norm", "full_l2norm_keys", "full_one_mask", "window_1x1"),
    *("window_5x3", "window_12"),
    *("many_windows", "l2norm_zero_rows", "swin_minus_inf", "saturated", "pvt_1050_keys"),
    *("gcvit_global_many_windows", "window_beyond_map", "dense_bias", "mask_repeats"),
]
SOME = ["swin_v2", "dim_30", "dim_64", "dim_128", "full_bias_mask", "roll_pad_both", "window_12"]


@functools.cache
def ptx(kind: str, arch: str) -> str:
    assert TOOLKIT is not None
    return TOOLKIT.compile(BACKWARD_SOURCES[kind], arch).read_text()


@functools.cache
def module(kind: str, arch: str = "80") -> ptxsim.Module:
    return ptxsim.load(ptx(kind, arch))


@functools.cache
def lse_of(name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.ops.fastbb.window_attention.default(*build(name, dtype=dtype).args)[1]


def call_of(name: str, kind: str, many_blocks: int = 1024) -> BackwardCall:
    dtype = CUDA_KINDS[kind]
    kwargs = build(name, dtype=dtype, requires_grad=True).kwargs
    lse = lse_of(name, dtype)
    return BackwardCall(kwargs, random_grad(kwargs), lse, kind == "tf32", many_blocks)


def compare(call: BackwardCall, name: str, kind: str) -> None:
    exact = expected(name, CUDA_KINDS[kind])
    actual = {key: x.reshape(exact[key].shape) for key, x in call.results().items()}
    bounds = TOLERANCES[kind].grad_for(CASES[name].difficulty)
    assert_grads_close(actual, exact, bounds)


def check(
    name: str, kind: str, arch: str = "80", many_blocks: int = 1024, **options: object
) -> BackwardCall:
    call = call_of(name, kind, many_blocks)
    call.run(module(kind, arch), **options)
    compare(call, name, kind)
    return call


@pytest.mark.parametrize("name", CASES_16_BIT)
def test_float16(name: str) -> None:
    check(name, "f16")


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["bf16", "f32", "tf32"])
def test_other_types(name: str, kind: str) -> None:
    check(name, kind)


# Case, blocks that are enough -> problems side by side, rounds of a block, splits of the queries.
WALKS = {
    ("swin", 3): (1, 8, 1),
    ("swin_v2", 1): (1, 2, 1),
    ("gcvit_global_padded", 3): (1, 6, 1),
    ("dense_bias", 3): (4, 4, 1),
    ("many_windows", 1): (4, 9, 1),
    ("roll_pad_both", 3): (1, 6, 1),
    ("pvt_long_queries", 1): (1, 1, 1),
    ("pvt_long_queries", 8): (1, 1, 2),
}


@pytest.mark.parametrize(("name", "many_blocks"), WALKS)
def test_how_work_is_divided(name: str, many_blocks: int) -> None:
    plan = check(name, "f16", many_blocks=many_blocks).plan
    assert (plan["pack"], plan["walk"], plan["q_splits"]) == WALKS[name, many_blocks]


@pytest.mark.parametrize("arch", ["90", "100", "120"])
def test_code_for_later_architectures(arch: str) -> None:
    check("gcvit_global_padded", "f16", arch)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["full_l2norm", "window_12"])
def test_warps_in_random_order(name: str, seed: int) -> None:
    """Whatever the order, the same bits: sums have an order of their own."""
    first = check(name, "f16").results()
    again = check(name, "f16", schedule="random", seed=seed).results()
    for key, gradient in first.items():
        assert torch.equal(gradient, again[key]), key


# Deleting one barrier, wait or commit, or swapping the operands of one product, must be noticed.
# Kernel -> cases, and blocks that are enough, which together need every barrier: several tiles,
# several problems of a block, normalised rows, a scale.
MUTATED = {
    "keysINS0_8HalfMathELi32ELi1ELb1E": [("swin_v2", 1), ("full_l2norm_queries", 1)],
    "queriesINS0_8HalfMathELi32E": [("full_l2norm_keys", 1)],
}


def survives(text: str, cases: list[tuple[str, int]]) -> bool:
    """Whether the changed kernels run without an error and give the right results."""
    changed = ptxsim.load(text)
    try:
        for case, many_blocks in cases:
            call = call_of(case, "f16", many_blocks)
            call.run(changed, module("f16"))
            compare(call, case, "f16")
    except (ptxsim.PtxError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("name", MUTATED)
def test_mutations_are_noticed(name: str) -> None:
    cases = MUTATED[name]
    # The kernel that is launched after the one for queries stays as it is.
    partners = ["keysINS0_8HalfMathELi32ELi1ELb0E"] if name.startswith("queries") else []
    start, kernel = kernel_of(ptx("f16", "80"), name, *partners)
    assert survives(start + kernel, cases)
    for change, mutant in mutants(kernel):
        assert not survives(start + mutant, cases), change
