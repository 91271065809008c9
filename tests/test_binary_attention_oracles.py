# SPDX-License-Identifier: Apache-2.0
"""Binary attention against attention as BiPFT and BiBERT write it, restated from their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb.ops import binary_attention
from fastbb.testing import TOLERANCES, assert_close, assert_grads_close

TOLERANCE = TOLERANCES["fastbb::binary_attention"][torch.float32]
B, N, H, D = 2, 31, 3, 16


class ElasticSign(torch.autograd.Function):
    """BiT's quantizer of signed activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return torch.sign(x) * alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha = ctx.saved_tensors
        outside = ((x / alpha) < -1) | ((x / alpha) > 1)
        dalpha = (torch.sign(x) * grad).sum() / math.sqrt(x.numel())
        return grad.masked_fill(outside, 0), dalpha.reshape(1)


class ElasticRound(torch.autograd.Function):
    """BiT's quantizer of probabilities: round(x / alpha), to even at a half, clamped to 0 and 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return (x / alpha).round().clamp(0, 1) * alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, alpha = ctx.saved_tensors
        u = x / alpha
        small, big = (u < 0).double(), (u > 1).double()
        middle = 1 - small - big
        dalpha = ((big + middle * (u.round() - u)) * grad).sum() / math.sqrt(x.numel())
        return middle * grad, dalpha.reshape(1)


class HardSign(torch.autograd.Function):
    """BiBERT's sign, and its Boolean function of scores, with the gradient of a clipped line."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, boolean: bool) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype) if boolean else torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x > -1) & (x < 1), grad, 0.0), None


def bipft(
    qkv: tuple[Tensor, ...], alphas: tuple[Tensor, ...], estimates: tuple[Tensor, ...], mask: Tensor
) -> Tensor:
    """qkv `[B, h, N, d]`; q_p, k_p, q_m, k_m, v_p `[B, N, 1]`; mask `[B, 1, 1, N]`."""
    q_p, k_p, q_m, k_m, v_p = estimates
    q, k, v = (ElasticSign.apply(x, a) for x, a in zip(qkv, alphas, strict=False))
    scores = torch.matmul(q, k.transpose(-1, -2))
    residual = q_m @ k_p.transpose(1, 2) + q_p @ k_m.transpose(1, 2) + q_p @ k_p.transpose(1, 2)
    scores = (scores + residual.unsqueeze(1)) / math.sqrt(D) + mask
    weights = ElasticRound.apply(scores.softmax(-1), alphas[3])
    return torch.matmul(weights, v) + torch.matmul(weights, v_p.unsqueeze(1))


def bibert(qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = (HardSign.apply(x, False) for x in qkv)
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D) + mask
    return torch.matmul(HardSign.apply(scores, True), v)


def make_qkv() -> tuple[Tensor, ...]:
    qkv = torch.randn(B, N, 3, H, D)
    qkv[:, 3] = 0
    return tuple(x.contiguous().requires_grad_() for x in qkv.unbind(2))


def exact_heads(qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().transpose(1, 2).requires_grad_() for x in qkv)


def key_mask() -> Tensor:
    mask = torch.zeros(B, N)
    mask[1, 20:] = -10000.0
    return mask


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_bipft(impl: str) -> None:
    qkv, mask = make_qkv(), key_mask()
    alphas = torch.tensor([1.1, 0.8, 0.9, 0.07], requires_grad=True)
    estimates = tuple(torch.randn(B, N, 1, requires_grad=True) for _ in range(5))
    q_p, k_p, q_m, k_m, v_p = estimates
    out = binary_attention(
        *qkv,
        alphas=alphas,
        mask=mask,
        est_q=torch.cat((q_m + q_p, q_p), -1),
        est_k=torch.cat((k_p, k_m), -1),
        v_p=v_p.squeeze(-1),
        scale=1 / math.sqrt(D),
        impl=impl,
    )
    heads = exact_heads(qkv)
    sizes = tuple(a.detach().double().requires_grad_() for a in alphas.split(1))
    doubles = tuple(x.detach().double().requires_grad_() for x in estimates)
    exact = bipft(heads, sizes, doubles, mask.double()[:, None, None])
    assert_close(out, exact.transpose(1, 2), TOLERANCE.forward)
    assert (exact != 0).double().mean() > 0.02

    grad_out = torch.randn(out.shape)
    found = torch.autograd.grad(out, (*qkv, alphas, *estimates), grad_out)
    inputs = (*heads, *sizes, *doubles)
    expected = torch.autograd.grad(exact, inputs, grad_out.double().transpose(1, 2))
    names = ("q", "k", "v", "alphas", "q_p", "k_p", "q_m", "k_m", "v_p")
    flat = (*(g.transpose(1, 2) for g in expected[:3]), torch.cat(expected[3:7]), *expected[7:])
    assert_grads_close(
        dict(zip(names, found, strict=True)), dict(zip(names, flat, strict=True)), TOLERANCE.grad
    )


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_bibert(impl: str) -> None:
    qkv, mask = make_qkv(), key_mask()
    out = binary_attention(
        *qkv, mask=mask, scale=1 / math.sqrt(D), probs="bool", ste="clip_open", impl=impl
    )
    heads = exact_heads(qkv)
    exact = bibert(heads, mask.double()[:, None, None])
    assert_close(out, exact.transpose(1, 2), TOLERANCE.forward)
    grad_out = torch.randn(out.shape)
    found = torch.autograd.grad(out, qkv, grad_out)
    expected = torch.autograd.grad(exact, heads, grad_out.double().transpose(1, 2))
    assert_grads_close(
        dict(zip("qkv", found, strict=True)),
        {name: g.transpose(1, 2) for name, g in zip("qkv", expected, strict=True)},
        TOLERANCE.grad,
    )
