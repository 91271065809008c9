# SPDX-License-Identifier: Apache-2.0
"""Gradients of the fused operator against float64 autograd through the reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb.ops import window_attention
from fastbb.testing import TOLERANCES, assert_close, assert_grad_close, assert_grads_close
from fastbb.testing.sample import leaves, random_like
from fastbb.testing.window_attention import CASES, build, build_backward, in_float64
from window_oracle import threads

TOLERANCE = TOLERANCES["fastbb::window_attention_backward"]
raw_backward = torch.ops.fastbb.window_attention_backward.default
GRADIENTS = ("dq", "dk", "dv", "dbias_table", "dbias", "dscale", "dk_pad", "dv_pad")

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
# One case per branch of the backward: chunks of windows, merged images, split queries, pads.
BRANCHES = [
    "swin",
    "swin_v2",
    "gcvit_global_many_windows",
    "gcvit_global_odd_windows",
    "gcvit_global_padded",
    "roll_pad_both",
    "dense_bias",
    "many_windows",
    "window_24",
    "pvt_long_queries",
    "full_long_queries_bias",
    "pvt_2500_keys",
    "side_same_dtype",
]


def gradients(kwargs: dict[str, Any], grad_out: Tensor, impl: str) -> dict[str, Tensor]:
    wanted = leaves(kwargs)
    result = window_attention(**kwargs, impl=impl)
    grads = torch.autograd.grad(result, list(wanted.values()), grad_out.to(result))
    return dict(zip(wanted, grads, strict=True))


def random_grad(kwargs: dict[str, Any]) -> Tensor:
    return random_like(kwargs["k"] if kwargs["k"].dim() == 5 else kwargs["q"], 7)


@functools.cache
def expected(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Float64 gradients, shared by the ISA levels."""
    kwargs = build(name, dtype=dtype, requires_grad=True).kwargs
    grad_out = random_grad(kwargs)
    doubles = in_float64(kwargs)
    with threads(1):
        return gradients(doubles, grad_out, "reference")


def compare(name: str, dtype: torch.dtype, actual: dict[str, Tensor], difficulty: float) -> None:
    assert_grads_close(actual, expected(name, dtype), TOLERANCE[dtype].grad_for(difficulty))


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_gradients(isa: str, name: str, dtype: torch.dtype) -> None:
    sample = build(name, dtype=dtype, requires_grad=True)
    # Work is divided in the same way for every dtype; a team of threads in one sweep is enough.
    with threads(2 if dtype == torch.float32 else 1):
        actual = gradients(sample.kwargs, random_grad(sample.kwargs), "fused")
    for key, leaf in leaves(sample.kwargs).items():
        assert actual[key].dtype == leaf.dtype
    compare(name, dtype, actual, sample.difficulty)


@pytest.mark.parametrize("name", BRANCHES)
def test_directional_derivative(isa: str, name: str) -> None:
    """The backward matches finite differences of the kernel's own forward."""
    sample = build(name, requires_grad=True)
    kwargs = sample.kwargs
    grad_out = random_grad(kwargs)
    grads = gradients(kwargs, grad_out, "fused")
    for key, leaf in leaves(kwargs).items():
        direction = grads[key] / grads[key].norm().clamp_min(1e-12)
        step = 1e-2 * leaf.detach().norm() / leaf.numel() ** 0.5

        def loss(amount: Tensor, key: str = key, direction: Tensor = direction) -> Tensor:
            moved = kwargs | {key: kwargs[key].detach() + amount * direction}
            with torch.no_grad():
                result = window_attention(**moved, impl="fused")
            return (result.double() * grad_out).sum()

        slope = (loss(step) - loss(-step)) / (2 * step)
        predicted = (grads[key] * direction).double().sum()
        # Relative to the largest gradient: differences of a float32 sum resolve no less.
        floor = 1e-2 * max(g.norm().item() for g in grads.values())
        assert abs(slope - predicted) <= 2e-2 * max(abs(predicted.item()), floor), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BRANCHES)
def test_determinism(isa: str, name: str, dtype: torch.dtype) -> None:
    """Results and gradients are bitwise equal in every run and for every number of threads."""
    args = build_backward(name, dtype=dtype).args
    kwargs = build(name, dtype=dtype).kwargs
    first_out = window_attention(**kwargs, impl="fused")
    first = raw_backward(*args)
    for count in (2, 1, 3):
        torch.set_num_threads(count)
        assert torch.equal(window_attention(**kwargs, impl="fused"), first_out)
        for label, a, b in zip(GRADIENTS, first, raw_backward(*args), strict=True):
            assert torch.equal(a, b), label


@pytest.mark.parametrize("name", ["gcvit_global_padded", "side_float64", "scale_per_head"])
def test_only_needed_side_gradients_are_made(name: str) -> None:
    """A flag switches its gradient off, to an empty tensor, and changes no other gradient."""
    *args, need_side = build_backward(name).args
    full = raw_backward(*args, need_side)
    sides = (args[5], args[6], args[8], args[9], args[10])
    for i, (side, grad) in enumerate(zip(sides, full[3:], strict=True)):
        assert grad.dtype == torch.float32
        assert grad.shape == (side.shape if side is not None else (0,))
        fewer = [need and j != i for j, need in enumerate(need_side)]
        partial = raw_backward(*args, fewer)
        assert partial[3 + i].shape == (0,)
        for j, label in enumerate(GRADIENTS):
            if j != 3 + i:
                assert_close(partial[j], full[j], TOLERANCE[torch.float32].forward, label)


def test_frozen_inputs_get_no_gradient() -> None:
    kwargs = build("pad_roll_both", requires_grad=True).kwargs
    expected_table = gradients(kwargs, random_grad(kwargs), "fused")["bias_table"]
    frozen = {
        key: x.detach() if isinstance(x, Tensor) and key != "bias_table" else x
        for key, x in kwargs.items()
    }
    only = gradients(frozen, random_grad(kwargs), "fused")
    assert list(only) == ["bias_table"]
    assert torch.equal(only["bias_table"], expected_table)


@pytest.mark.parametrize(
    "layout",
    [
        lambda g: g[..., :1].expand_as(g),
        lambda g: g[:1, :1].expand_as(g),
        lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
        lambda g: g.movedim(-1, 1).contiguous().movedim(1, -1),
    ],
    ids=["constant_over_channels", "constant_over_rows", "transposed", "broken_last_dim"],
)
def test_layout_of_the_incoming_gradient(isa: str, layout: Any) -> None:
    kwargs = build("swin", requires_grad=True).kwargs
    grad_out = layout(random_grad(kwargs))
    result = window_attention(**kwargs, impl="fused")
    wanted = list(leaves(kwargs).values())
    strided = torch.autograd.grad(result, wanted, grad_out, retain_graph=True)
    packed = torch.autograd.grad(result, wanted, grad_out.contiguous())
    for a, b in zip(strided, packed, strict=True):
        assert torch.equal(a, b)


def test_gradient_reaches_a_shared_qkv_tensor() -> None:
    """Views of one leaf: the gradient of the leaf is that of q, k and v stacked."""
    qkv = torch.randn(2, 8, 8, 3, 2, 16, requires_grad=True)
    q, k, v = qkv.unbind(3)
    result = window_attention(q, k, v, window=4, shift=2, mask="swin", impl="fused")
    grad_out = torch.randn_like(result)
    (grad,) = torch.autograd.grad(result, qkv, grad_out, retain_graph=True)
    parts = torch.autograd.grad(result, (q, k, v), grad_out)
    assert torch.equal(grad, torch.stack(parts, 3))


def test_one_tensor_as_q_k_and_v() -> None:
    x = torch.randn(2, 6, 2, 16, requires_grad=True)
    y = x.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(window_attention(x, x, x, impl="fused").square().sum(), x)
    (exact,) = torch.autograd.grad(window_attention(y, y, y, impl="reference").square().sum(), y)
    assert_grad_close(grad, exact, TOLERANCE[torch.float32].grad)


def test_second_derivatives_are_refused() -> None:
    """The backward operator has no derivative: an error, not a silently missing term."""
    kwargs = build("pad_only", requires_grad=True).kwargs
    result = window_attention(**kwargs, impl="fused")
    (grad,) = torch.autograd.grad(result.sum(), kwargs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="window_attention_backward"):
        grad.square().sum().backward()


def test_padding_takes_its_share_of_the_value_gradient() -> None:
    """Softmax rows sum to 1, so for a gradient of ones dv and dv_pad together count the queries."""
    kwargs = build("pad_roll_both", requires_grad=True).kwargs
    ones = torch.ones_like(random_grad(kwargs))
    grads = gradients(kwargs, ones, "fused")
    total = grads["v"].sum((0, 1, 2)) + grads["v_pad"]
    assert_close(total, ones.double().sum((0, 1, 2)), TOLERANCE[torch.float32].forward)
    assert grads["v_pad"].abs().min() > 0
