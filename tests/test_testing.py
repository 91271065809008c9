# SPDX-License-Identifier: Apache-2.0
"""The comparison helpers must catch planted errors, and the samples must mean what they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastbb
from fastbb import testing
from fastbb.testing import (
    CUDA_KINDS,
    CUDA_TOLERANCES,
    SAMPLES,
    TOLERANCES,
    Bounds,
    OutOfBounds,
    assert_close,
    assert_grad_close,
    assert_grads_close,
)
from fastbb.testing.window_attention import CASES, PACKED, build

BF16 = TOLERANCES["fastbb::window_attention"][torch.bfloat16].forward
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def truncated(x: Tensor) -> Tensor:
    """To bfloat16 by cutting bits: every element within one unit, all errors toward zero."""
    bits = x.float().view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_passes(dtype: torch.dtype) -> None:
    x = exact(40, 50)
    tolerance = TOLERANCES["fastbb::window_attention"][dtype]
    assert_close(x.to(dtype), x, tolerance.forward)
    assert_grad_close(1e4 * x.to(dtype), 1e4 * x, tolerance.grad)


def test_one_wrong_element_is_named() -> None:
    x = exact(3, 4, 5)
    wrong = x.float()
    wrong[2, 1, 3] += 0.01
    with pytest.raises(AssertionError, match=r"dq\[2, 1, 3\].*1 of 60 elements"):
        assert_close(wrong, x, Bounds(1e-5, 1e-5, 1.0), "dq")


def test_share_is_the_largest_error_in_units_of_its_bound() -> None:
    x = exact(4000)
    near = x.clone()
    near[7] += 0.003
    assert assert_close(near, x, Bounds(0.0, 0.01, 1.0)) == pytest.approx(0.3)
    assert assert_close(near, x, Bounds(0.0, 1.0, 1e-4)) == pytest.approx(
        0.003 / x.norm().item() / 1e-4
    )
    assert assert_close(x, x, Bounds(0.0, 0.0, 0.0)) == 0.0
    assert assert_close(x[:0], x[:0], Bounds(0.0, 0.0, 0.0)) == 0.0
    for bounds, share in ((Bounds(0.0, 0.002, 1.0), 1.5), (Bounds(0.0, 0.0, 0.0), math.inf)):
        with pytest.raises(OutOfBounds) as error:
            assert_close(near, x, bounds)
        assert error.value.share == pytest.approx(share)
    with pytest.raises(OutOfBounds) as error:
        assert_close(x[1:], x, Bounds(1.0, 1.0, 1.0))
    assert error.value.share == math.inf


def test_gradients_of_one_call() -> None:
    bounds = Bounds(1e-3, 1e-3, 1e-3)
    exact_grads = {"q": exact(40, 8), "k": exact(40, 8), "scale": torch.zeros(3).double()}
    exact_grads["q"][3] *= 1e12
    grads = {name: x.clone() for name, x in exact_grads.items()}
    # What cancels is judged by the other gradients; a huge row does not hide errors of others.
    grads["scale"] += 1e-6
    assert 0 < assert_grads_close(grads, exact_grads, bounds) < 0.1
    for name, row, factor in (("k", 5, 1.01), ("q", 3, 1.01), ("q", 4, 1.1)):
        wrong = {key: x.clone() for key, x in grads.items()}
        wrong[name][row] *= factor
        with pytest.raises(OutOfBounds, match=f"d{name}"):
            assert_grads_close(wrong, exact_grads, bounds)
    with pytest.raises(OutOfBounds, match="gradients of"):
        assert_grads_close({"q": grads["q"]}, exact_grads, bounds)


def test_kinds_of_cuda_arithmetic() -> None:
    """Every operator has bounds for every kind; what rounds more is allowed more."""
    assert set(CUDA_TOLERANCES) == set(SAMPLES)
    for op, by_kind in CUDA_TOLERANCES.items():
        assert set(by_kind) == set(CUDA_KINDS)
        for part in ("forward", "grad"):
            # Operators without products of floats round nothing to tf32.
            rounds = by_kind["tf32"] != by_kind["f32"]
            kinds = ("f32", "f16", "tf32", "bf16") if rounds else ("f32", "f16", "bf16")
            sizes = [getattr(by_kind[kind], part) for kind in kinds]
            assert sizes == sorted(sizes), op
            for kind, dtype in CUDA_KINDS.items():
                on_cpu = getattr(TOLERANCES[op][dtype], part)
                assert getattr(by_kind[kind], part).relative_l2 >= on_cpu.relative_l2


def test_first_wrong_element_comes_before_the_worst() -> None:
    x = exact(6)
    wrong = x.clone()
    wrong[1] += 0.1
    wrong[4] += 0.5
    with pytest.raises(AssertionError, match=r"result\[1\].*2 of 6 elements.*worst \[4\]"):
        assert_close(wrong, x, Bounds(1e-5, 1e-5, 1.0))


def test_truncation_is_a_direction() -> None:
    x = exact(4000)
    loose = Bounds(1.0, 1.0, BF16.relative_l2)
    assert_close(x.to(torch.bfloat16), x, loose)
    with pytest.raises(AssertionError, match="error along the expected"):
        assert_close(truncated(x), x, loose)


def test_constant_offset_is_found() -> None:
    x = exact(4000)
    with pytest.raises(AssertionError, match="mean error"):
        assert_close(x + 0.5 * BF16.relative_l2, x, BF16)


def test_noise_below_the_element_bound_is_found() -> None:
    x = exact(4000)
    noisy = x + 3 * BF16.relative_l2 * exact(4000)
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_close(noisy, x, Bounds(1.0, 1.0, BF16.relative_l2))


def test_wrong_direction_is_found() -> None:
    x = exact(100)
    with pytest.raises(AssertionError, match="1 - cosine"):
        assert_close(x.flip(0), x, Bounds(10.0, 10.0, 0.5))


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.inf, 1.0),
        (math.inf, -math.inf),
        (math.nan, math.inf),
        (3e38, math.inf),
    ],
)
def test_non_finite_mismatch_is_found(got: float, want: float) -> None:
    x = exact(2, 3)
    actual, expected = x.clone(), x.clone()
    actual[1, 0], expected[1, 0] = got, want
    with pytest.raises(AssertionError, match=r"result\[1, 0\].*1 of 6"):
        assert_close(actual, expected, BF16)


def test_equal_non_finite_values_pass() -> None:
    x = exact(9)
    x[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    assert_close(x.float(), x, BF16)
    x[4] = 1e6
    assert_close(x.half(), x, BF16)


def test_errors_beside_non_finite_values_are_found() -> None:
    x = exact(9)
    x[0] = math.nan
    wrong = x.clone()
    wrong[8] += 1
    with pytest.raises(AssertionError, match=r"result\[8\]"):
        assert_close(wrong, x, BF16)


def test_shape_mismatch_is_found() -> None:
    with pytest.raises(AssertionError, match=r"shape \[3, 1\], not \[3\]"):
        assert_close(exact(3, 1), exact(3), BF16)
    assert_close(exact(0, 3), exact(0, 3), BF16)


def test_gradient_bounds_scale_with_the_gradient() -> None:
    bounds = Bounds(0.0, 1e-3, 1.0)
    large = 1e5 * exact(50)
    assert_grad_close(large + 10, large, bounds)
    small = 1e-5 * exact(50)
    with pytest.raises(AssertionError, match=r"gradient\["):
        assert_grad_close(small + 1e-6, small, bounds)


def test_vanishing_gradient_needs_a_floor() -> None:
    zero, noise = torch.zeros(50), 1e-7 * torch.randn(50)
    bounds = TOLERANCES["fastbb::window_attention"][torch.float32].grad
    with pytest.raises(AssertionError):
        assert_grad_close(noise, zero, bounds)
    assert_grad_close(noise, zero, bounds, floor=1.0)
    with pytest.raises(AssertionError):
        assert_grad_close(1e3 * noise, zero, bounds, floor=1.0)


@pytest.mark.parametrize("op", SAMPLES)
def test_every_sampled_op_exists_and_has_tolerances(op: str) -> None:
    namespace, name = op.split("::")
    assert hasattr(getattr(torch.ops, namespace), name)
    assert set(TOLERANCES[op]) == set(DTYPES)


def test_samples_are_named_seeded_and_differentiable() -> None:
    op = "fastbb::window_attention"
    first = {s.name: s for s in SAMPLES[op]("cpu", torch.float32, requires_grad=True)}
    again = {s.name: s for s in SAMPLES[op]("cpu", torch.float32)}
    other = {s.name: s for s in SAMPLES[op]("cpu", torch.float32, seed=1)}
    assert list(first) == list(again) == [*CASES, *(f"{name}_packed" for name in PACKED)]
    for name, sample in first.items():
        tensors = [x for x in sample.args if isinstance(x, Tensor)]
        twins = [x for x in again[name].args if isinstance(x, Tensor)]
        for a, b in zip(tensors, twins, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
        mask = sample.args[5]
        assert all(x.requires_grad == (x is not mask) for x in tensors)
        if tensors[0].numel():
            assert not torch.equal(tensors[0], other[name].args[0])


def test_layouts_are_strided_as_named() -> None:
    strides = {name: build(name).kwargs["k"].stride() for name in CASES}
    heads, dim = CASES["swin"].heads, CASES["swin"].dim
    assert strides["swin"][2] == 3 * heads * dim
    assert strides["expanded"][0] == 0
    assert strides["transposed_map"][1] < strides["transposed_map"][2]
    assert strides["broken_last_dim"][-1] != 1
    assert build("broken_last_dim").args[1].stride(-1) == 1


def test_isa_params_are_the_levels_of_this_machine() -> None:
    assert testing.isa_params() == fastbb.isa_levels()
    assert fastbb.isa() in testing.isa_params()
