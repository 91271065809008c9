# SPDX-License-Identifier: Apache-2.0
"""Forward pass of the fused operator against the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import fastbb
from fastbb import reference
from fastbb.ops import window_attention
from fastbb.reference.window_attention import window_partition, window_reverse
from fastbb.testing import TOLERANCES, assert_close
from fastbb.testing.window_attention import CASES, build, in_float64, raw_args
from window_oracle import gather_attention, threads

TOLERANCE = TOLERANCES["fastbb::window_attention"]
raw_forward = torch.ops.fastbb.window_attention.default

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


@functools.cache
def expected(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Result of the reference and log-sum-exp of the oracle, shared by the ISA levels."""
    kwargs = in_float64(build(name, dtype=dtype).kwargs)
    with threads(1):
        return window_attention(**kwargs, impl="reference"), gather_attention(**kwargs)[1]


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_forward(isa: str, name: str, dtype: torch.dtype) -> None:
    sample = build(name, dtype=dtype)
    # Work is divided in the same way for every dtype; a team of threads in one sweep is enough.
    with threads(2 if dtype == torch.float32 else 1):
        out, lse = raw_forward(*sample.args)
    expected_out, expected_lse = expected(name, dtype)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    assert_close(out, expected_out, TOLERANCE[dtype].forward_for(sample.difficulty), "out")
    # Inputs are exact in float32 and so are products of bfloat16: lse has no 16-bit rounding.
    exact = TOLERANCE[torch.float32].forward_for(sample.difficulty)
    assert_close(lse, expected_lse, exact, "lse")


@pytest.mark.parametrize("name", CASES)
def test_public_function_is_the_raw_operator(name: str) -> None:
    sample = build(name)
    result = window_attention(**sample.kwargs, impl="fused")
    assert torch.equal(result, raw_forward(*sample.args)[0])


@DTYPES
def test_reference_path_in_every_dtype(dtype: torch.dtype) -> None:
    """With fused kernels off, the same function serves the same calls."""
    for name in CASES:
        sample = build(name, dtype=dtype)
        with fastbb.use_fused(False):
            result = window_attention(**sample.kwargs)
        assert result.dtype == dtype
        bounds = TOLERANCE[dtype].forward_for(2 * sample.difficulty)
        assert_close(result, expected(name, dtype)[0], bounds, name)


def test_use_fused_chooses_the_path() -> None:
    kwargs = build("swin").kwargs
    by_reference = window_attention(**kwargs, impl="reference")
    by_kernel = window_attention(**kwargs, impl="fused")
    with fastbb.use_fused(True):
        assert torch.equal(window_attention(**kwargs), by_kernel)
        with fastbb.use_fused(False):
            assert torch.equal(window_attention(**kwargs), by_reference)
        assert torch.equal(window_attention(**kwargs), by_kernel)
    assert not torch.equal(by_kernel, by_reference)


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [(129, torch.float32, "head dim 129 is above 128"), (8, torch.float64, "float64")],
)
def test_calls_without_a_kernel(dim: int, dtype: torch.dtype, reason: str) -> None:
    q, k, v = (torch.randn(1, 6, 2, dim, dtype=dtype) for _ in range(3))
    with pytest.raises(NotImplementedError, match=f"window_attention: no fused.*{reason}"):
        window_attention(q, k, v, impl="fused")
    expected_out = reference.window_attention(q, k, v)
    assert torch.equal(window_attention(q, k, v), expected_out)


def test_arguments_may_be_ints_flat_or_shaped() -> None:
    """One int means both axes; scale [h] or [h, 1, 1]; pads [h*d] or [h, d]."""
    sample = build("roll_pad_v2")
    kwargs = sample.kwargs
    same = kwargs | {
        "window": 4,
        "shift": [2, 2],
        "scale": kwargs["scale"].view(-1, 1, 1),
        "k_pad": kwargs["k_pad"].flatten(),
        "v_pad": kwargs["v_pad"].flatten(),
    }
    for impl in ("fused", "reference"):
        first, second = (window_attention(**x, impl=impl) for x in (kwargs, same))
        assert torch.equal(first, second)


def test_integer_scale() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    first, second = (window_attention(q, k, v, scale=s, impl="fused") for s in (2, 2.0))
    assert torch.equal(first, second)


def test_images_do_not_see_each_other() -> None:
    """Image 1 of a batch of 3 has the result that it has alone, bit for bit."""
    for name in ("gcvit_global", "gcvit_global_padded", "dense_bias", "full_sliced"):
        kwargs = build(name).kwargs
        alone = kwargs | {key: kwargs[key][1:2] for key in ("q", "k", "v")}
        batch = window_attention(**kwargs, impl="fused")
        assert torch.equal(window_attention(**alone, impl="fused"), batch[1:2]), name


@pytest.mark.parametrize("name", ["swin", "gcvit_local", "roll_pad_both", "pvt_1050_keys"])
def test_layout_does_not_change_the_result(isa: str, name: str) -> None:
    kwargs = build(name).kwargs
    packed = kwargs | {key: kwargs[key].contiguous() for key in ("q", "k", "v")}
    first, second = (window_attention(**x, impl="fused") for x in (kwargs, packed))
    assert torch.equal(first, second)


def test_minus_inf_mask_removes_keys(isa: str) -> None:
    """Huge values behind a mask of -inf leave no trace."""
    kwargs = dict(build("mask_per_window").kwargs)
    before = window_attention(**kwargs, impl="fused")
    hidden = 1  # every third key from 1 is masked for all queries
    wh, ww = kwargs["window"]
    v = kwargs["v"].clone()
    tokens = window_partition(v, (wh, ww))
    tokens[..., hidden::3, :] = 1e30
    kwargs["v"] = window_reverse(tokens, (wh, ww), tuple(v.shape[1:3]))
    assert torch.equal(window_attention(**kwargs, impl="fused"), before)


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_autocast(inputs: torch.dtype) -> None:
    kwargs = build("swin_v2", requires_grad=True).kwargs
    cast = kwargs | {key: kwargs[key].detach().to(inputs) for key in ("q", "k", "v")}
    for key in ("q", "k", "v"):
        cast[key].requires_grad_()
    explicit = kwargs | {key: kwargs[key].to(torch.bfloat16) for key in ("q", "k", "v")}
    for impl in ("fused", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            result = window_attention(**cast, impl=impl)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, window_attention(**explicit, impl=impl))
        leaves = [cast[key] for key in ("q", "k", "v", "bias_table", "scale")]
        for leaf, grad in zip(leaves, torch.autograd.grad(result.sum(), leaves), strict=True):
            assert grad.dtype == leaf.dtype


def test_autocast_leaves_float64_alone() -> None:
    kwargs = in_float64(build("pad_only").kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        assert window_attention(**kwargs).dtype == torch.float64


def test_inference_mode_and_no_grad_agree() -> None:
    kwargs = build("swin", requires_grad=True).kwargs
    with_graph = window_attention(**kwargs, impl="fused")
    assert with_graph.requires_grad
    with torch.no_grad():
        assert torch.equal(window_attention(**kwargs, impl="fused"), with_graph)
    with torch.inference_mode():
        assert torch.equal(window_attention(**kwargs, impl="fused"), with_graph)


def test_raw_arguments_of_defaults() -> None:
    """The defaults of the public function reach the operator: no bias, d**-0.5, no mask."""
    q, k, v = (torch.randn(2, 7, 3, 16) for _ in range(3))
    args = raw_args({"q": q, "k": k, "v": v, "qk_l2norm": False})
    assert torch.equal(window_attention(q, k, v, impl="fused"), raw_forward(*args)[0])
