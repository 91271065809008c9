# SPDX-License-Identifier: Apache-2.0
"""q, k and v packed as a projection leaves them: the same results, packed gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastbb
from fastbb.ops import window_attention
from fastbb.testing.window_attention import PACKED, build, build_packed, packed

FORWARD = torch.ops.fastbb.window_attention.default
BACKWARD = torch.ops.fastbb.window_attention_backward.default
CASES = pytest.mark.parametrize("name", PACKED)


def gradients(kwargs: dict[str, Any], impl: str) -> tuple[Tensor, dict[str, Tensor]]:
    wanted = {k: x for k, x in kwargs.items() if isinstance(x, Tensor) and x.requires_grad}
    out = window_attention(**kwargs, impl=impl)
    generator = torch.Generator().manual_seed(5)
    grad_out = torch.randn(out.shape, generator=generator).to(out)
    grads = torch.autograd.grad(out, list(wanted.values()), grad_out)
    return out, dict(zip(wanted, grads, strict=True))


def packed_gradients(apart: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of q, k, v given apart, in the form of packed ones."""
    for x in apart.values():
        x.requires_grad_(False)
    names = ("q", "k") if apart["q"].shape != apart["k"].shape else ("q",)
    both = packed({**apart, "qk_l2norm": False})
    return {name: both[name] for name in names} | {
        name: x for name, x in apart.items() if name not in ("q", "k", "v")
    }


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_apart(isa: str, name: str, dtype: torch.dtype) -> None:
    apart = build(name, dtype=dtype, requires_grad=True).kwargs
    out, grads = gradients(apart, "fused")
    out_packed, grads_packed = gradients(packed(apart), "fused")
    assert torch.equal(out_packed, out)
    expected = packed_gradients(grads)
    assert grads_packed.keys() == expected.keys()
    for key, x in expected.items():
        assert torch.equal(grads_packed[key], x), key
        assert grads_packed[key].is_contiguous()


@CASES
def test_packed_equals_apart_in_the_reference(name: str) -> None:
    """Batched products of torch round differently for other strides."""
    apart = build(name, requires_grad=True).kwargs
    out, grads = gradients(apart, "reference")
    out_packed, grads_packed = gradients(packed(apart), "reference")
    torch.testing.assert_close(out_packed, out, rtol=1e-5, atol=1e-5)
    for key, x in packed_gradients(grads).items():
        if x.numel() == 0:
            continue
        torch.testing.assert_close(
            grads_packed[key], x, rtol=1e-4, atol=1e-4 * float(x.abs().max())
        )


@CASES
def test_opcheck(name: str) -> None:
    torch.library.opcheck(FORWARD, build_packed(name, requires_grad=True).args)


def test_opcheck_backward_returns_only_what_was_given() -> None:
    for name in ("swin", "pvt"):
        *args, qk_l2norm = build_packed(name).args
        out, lse = FORWARD(*args, qk_l2norm)
        args = [torch.ones_like(out), *args[:3], lse, *args[3:], qk_l2norm, [True] * 5]
        torch.library.opcheck(BACKWARD, tuple(args))
        dq, dk, dv = BACKWARD(*args)[:3]
        assert dq.shape == args[1].shape
        assert dk.shape == ((0,) if args[2] is None else args[2].shape)
        assert dv.shape == (0,)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_of_a_projection(backend: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3 * 32, 32, requires_grad=True)
    table = torch.randn(169, 2, requires_grad=True)
    x = torch.randn(2, 14, 7, 32)

    def layer(x: Tensor) -> Tensor:
        qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, 2, 16))
        return window_attention(qkv, window=7, bias_table=table, impl="fused").flatten(3)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for function in (layer, compiled):
        grads = torch.autograd.grad(function(x).square().sum(), (weight, table))
        if function is layer:
            expected = grads
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_views_of_a_larger_projection() -> None:
    """A packed tensor that is itself a strided view, as when heads of two layers are projected."""
    wide = torch.randn(2, 8, 8, 3, 4, 16)
    half = wide[:, :, :, :, 1:3]
    expected = window_attention(*half.contiguous().unbind(3), window=4)
    assert torch.equal(window_attention(half, window=4, impl="fused"), expected)
    broken = half.transpose(-1, 1).contiguous().transpose(-1, 1)
    assert torch.equal(window_attention(broken, window=4, impl="fused"), expected)


def test_autocast_casts_packed_tensors() -> None:
    qkv, kv = torch.randn(2, 8, 8, 3, 2, 16), torch.randn(2, 5, 2, 2, 16)
    q = torch.randn(2, 9, 2, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            window_attention(qkv, window=4), window_attention(qkv.bfloat16(), window=4)
        )
        assert torch.equal(window_attention(q, kv), window_attention(q, kv.bfloat16()))


def test_head_dims_beyond_the_kernel_take_the_reference() -> None:
    qkv = torch.randn(1, 4, 4, 3, 1, 136)
    expected = window_attention(*qkv.unbind(3), window=4)
    assert torch.equal(window_attention(qkv, window=4), expected)
    with pytest.raises(NotImplementedError, match="head dim 136"):
        window_attention(qkv, window=4, impl="fused")


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"q": (2, 8, 8, 2, 4)}, ValueError, "q must be packed .*3, h, d.* got"),
        ({"q": (2, 8, 8, 2, 2, 4)}, ValueError, "q must be packed .*3, h, d.* got"),
        ({"q": (3, 2, 4)}, ValueError, "q must be packed"),
        ({"q": (2, 8, 8, 2, 4), "k": (2, 8, 8, 3, 2, 4)}, ValueError, "k must be packed .*2, h"),
        ({"q": (2, 8, 8, 2, 4), "k": (2, 8, 8, 2, 4)}, ValueError, "k must be packed"),
        ({"q": (2, 8, 8, 2, 4), "v": (2, 8, 8, 2, 4)}, ValueError, "k must be given with v"),
        ({"q": (2, 8, 7, 2, 4), "k": (2, 8, 8, 2, 2, 4)}, ValueError, "q must have shape"),
    ],
)
def test_bad_packing_is_named(
    tensors: dict[str, tuple[int, ...]], error: type[Exception], message: str
) -> None:
    kwargs = {name: torch.randn(shape) for name, shape in tensors.items()}
    for impl in ("auto", "fused", "reference"):
        with pytest.raises(error, match=f"window_attention: {message}"):
            window_attention(**kwargs, window=4, impl=impl)
    with pytest.raises(TypeError, match=r"q must be a torch\.Tensor, got list"):
        window_attention([1.0], window=4)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.randn(2, 14, 21, 2, 2, 32), "q must be packed"),
        (0, torch.randn(3, 2, 4), "q must be packed"),
        (1, torch.randn(2, 14, 21, 3, 2, 32), "k must be packed"),
        (2, torch.randn(2, 14, 21, 2, 32), "v must not be given without k"),
    ],
)
def test_raw_operator_checks_packing(index: int, value: Tensor, message: str) -> None:
    args = list(build_packed("swin").args)
    args[index] = value
    with pytest.raises(RuntimeError, match=f"window_attention: {message}"):
        FORWARD(*args)


def test_reference_path_serves_packed_calls() -> None:
    qkv = torch.randn(2, 8, 8, 3, 2, 16)
    expected = window_attention(qkv, window=4, impl="reference")
    with fastbb.use_fused(False):
        assert torch.equal(window_attention(qkv, window=4), expected)
