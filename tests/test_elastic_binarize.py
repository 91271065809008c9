# SPDX-License-Identifier: Apache-2.0
"""Values, planes and gradients of elastic binarization against the reference and the papers."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from elastic_oracle import PAPERS
from fastbb import nn, reference
from fastbb.ops import elastic_binarize
from fastbb.ops.elastic_binarize import KINDS, STES, needs_x, plane_count
from fastbb.testing import TOLERANCES, assert_close, assert_grads_close
from fastbb.testing.elastic_binarize import CASES, build, exact_planes
from fastbb.testing.sample import in_float64, leaves, random_like
from window_oracle import threads

FORWARD = torch.ops.fastbb.elastic_binarize.default
BACKWARD = torch.ops.fastbb.elastic_binarize_backward.default
TOLERANCE = TOLERANCES["fastbb::elastic_binarize"]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
SETTINGS = [(kind, ste) for kind in KINDS for ste in STES]


def run(kwargs: dict[str, Any], impl: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Result and gradients, for the same gradient of the result."""
    out = elastic_binarize(**kwargs, impl=impl)
    dtype = torch.float32 if out.dtype == torch.float64 else out.dtype
    wanted = leaves(kwargs)
    grads = torch.autograd.grad(out, list(wanted.values()), random_like(out.to(dtype), 3).to(out))
    return out.detach(), dict(zip(wanted, grads, strict=True))


@functools.cache
def expected(name: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    kwargs = in_float64(build(name, dtype=dtype, requires_grad=True).kwargs)
    out = elastic_binarize(**kwargs, impl="reference")
    grad = random_like(out.to(dtype), 3).double()
    wanted = leaves(kwargs)
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return out.detach(), dict(zip(wanted, grads, strict=True))


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(isa: str, name: str, dtype: torch.dtype) -> None:
    kwargs = build(name, dtype=dtype, requires_grad=True).kwargs
    out, grads = run(kwargs, "fused")
    expected_out, expected_grads = expected(name, dtype)
    assert out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out, expected_out.to(dtype))
    for key, grad in grads.items():
        assert grad.dtype == kwargs[key].dtype
    if kwargs["ste"] != "bireal":
        assert torch.equal(grads["x"].double(), expected_grads["x"])
    assert_grads_close(grads, expected_grads, TOLERANCE[dtype].grad)


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_planes(isa: str, name: str, dtype: torch.dtype) -> None:
    sample = build(name, dtype=dtype)
    args, kwargs = sample.args[:-1], sample.kwargs
    out, planes = FORWARD(*args, True)
    assert torch.equal(planes, exact_planes(kwargs))
    assert planes.shape[-2] == plane_count(kwargs["kind"], kwargs["ste"])
    without, none = FORWARD(*args, False)
    assert torch.equal(without, out) and none.shape == (0,)


@pytest.mark.parametrize("name", ["ternary_clip", "unsigned", "plus_bireal"])
def test_reference_in_the_same_precision(isa: str, name: str) -> None:
    kwargs = build(name, requires_grad=True).kwargs
    (out, grads), (same_out, same) = run(kwargs, "fused"), run(kwargs, "reference")
    assert torch.equal(out, same_out)
    assert_grads_close(grads, same, TOLERANCE[torch.float32].grad.times(2))


@DTYPES
@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_below_the_floor_is_the_floor(kind: str, impl: str, dtype: torch.dtype) -> None:
    x = (torch.randint(-9, 10, (5, 70)) / 4).to(dtype)
    results = []
    for size in (1e-5, 1e-7, 0.0, -0.5):
        alpha = torch.tensor([size], requires_grad=True)
        out = elastic_binarize(x, alpha, kind=kind, impl=impl)
        results.append((out, *torch.autograd.grad(out, alpha, random_like(out, 1))))
    for out, dalpha in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(dalpha, results[0][1]) and dalpha != 0


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("paper", PAPERS)
def test_quantizers_of_the_papers(isa: str, paper: str, impl: str) -> None:
    quantizer, kind, ste, learned = PAPERS[paper]
    generator = torch.Generator().manual_seed(5)
    # Multiples of 1/64, so that -alpha, -alpha/2, 0, alpha/2 and alpha occur.
    x = torch.randint(-160, 161, (9, 150), generator=generator) / 64
    shift = torch.randint(-16, 17, (150,), generator=generator) / 64
    alpha = torch.tensor([1.25])
    grad = torch.randn(9, 150, generator=generator)
    inputs = [x.requires_grad_()]
    if learned:
        inputs += [alpha.requires_grad_(), shift.requires_grad_()]
    out = elastic_binarize(*inputs, kind=kind, ste=ste, impl=impl)
    grads = torch.autograd.grad(out, inputs, grad)

    moved = x.detach().double().numpy() + (shift.detach().double().numpy() if learned else 0)
    size = alpha.item() if learned else 1.0
    value, dx, dalpha = quantizer(moved, size, grad.double().numpy())
    for threshold in (-size, -size / 2, 0.0, size / 2, size):
        assert (moved == threshold).any()
    assert np.array_equal(out.detach().double().numpy(), value)
    assert np.allclose(grads[0].double().numpy(), dx, rtol=1e-6, atol=1e-6)
    if ste != "bireal":
        assert np.array_equal(grads[0].double().numpy(), dx)
    if learned:
        assert math.isclose(grads[1].item(), dalpha, rel_tol=1e-5, abs_tol=1e-6)
        assert np.allclose(grads[2].double().numpy(), dx.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "ste"), SETTINGS)
def test_thresholds_by_one_unit_in_the_last_place(isa: str, kind: str, ste: str) -> None:
    """The comparisons of the kernel and the rounded quotients of the definition agree, for scales
    whose quotients are not exact.
    """
    for size in (0.7, 1.0, 1 / 3, 1.9999999, 1e-5, 3e5):
        alpha = torch.tensor([size])
        points = torch.cat([f * alpha for f in (0.0, 1e-20, 0.5, 1.0)])
        near = [points]
        for direction in (-math.inf, math.inf):
            step = torch.nextafter(points, torch.tensor(direction))
            near += [step, torch.nextafter(step, torch.tensor(direction))]
        x = torch.cat([torch.cat(near), -torch.cat(near)])
        # Quotients of subnormal numbers round to 0, which the kernel's comparisons do not.
        x = x[(x == 0) | (x.abs() > 1e-30)].requires_grad_()
        kwargs = {"x": x, "alpha": alpha, "shift": None, "kind": kind, "ste": ste}
        (out, grads), (same_out, same) = run(kwargs, "fused"), run(kwargs, "reference")
        assert torch.equal(out, same_out)
        if ste == "bireal" and kind != "unsigned":
            assert torch.allclose(grads["x"], same["x"], atol=3e-7)
        else:
            assert torch.equal(grads["x"], same["x"])


@pytest.mark.parametrize(("kind", "ste"), SETTINGS)
def test_nan_and_infinity(isa: str, kind: str, ste: str) -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 0.3, 2.0] * 12).requires_grad_()
    for size in (1.0, nan, inf):
        alpha = torch.tensor([size], requires_grad=True)
        kwargs = {"x": x, "alpha": alpha, "shift": None, "kind": kind, "ste": ste}
        (out, grads), (same_out, same) = run(kwargs, "fused"), run(kwargs, "reference")
        assert torch.equal(out.nan_to_num(7.0), same_out.nan_to_num(7.0))
        assert torch.equal(grads["x"].nan_to_num(7.0), same["x"].nan_to_num(7.0))
        assert_close(grads["alpha"], same["alpha"], TOLERANCE[torch.float32].grad)
    bits = reference.unpack_bits(FORWARD(x, None, None, kind, ste, True)[1], 84, kind="unsigned")
    assert not bits[:, ::7].any()


@pytest.mark.parametrize(("kind", "ste"), SETTINGS)
def test_gradients_that_are_not_finite_are_not_lost(isa: str, kind: str, ste: str) -> None:
    x = torch.tensor([-3.0, 0.0, 0.25, 3.0] * 20).requires_grad_()
    for bad in (math.nan, math.inf):
        grad = torch.full((80,), bad)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            dx = []
            for impl in ("fused", "reference"):
                out = elastic_binarize(x.to(dtype), kind=kind, ste=ste, impl=impl)
                dx += torch.autograd.grad(out, x, grad.to(dtype))
            assert torch.equal(dx[0].nan_to_num(7.0), dx[1].nan_to_num(7.0))
            assert not torch.isfinite(dx[0]).any()


@pytest.mark.parametrize("kind", ["ternary", "unsigned"])
def test_same_bits_at_any_number_of_threads(isa: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 700, generator=generator).requires_grad_()
    shift = torch.randn(700, generator=generator).requires_grad_()
    alpha = torch.tensor([0.8], requires_grad=True)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            out, grads = run(
                {"x": x, "alpha": alpha, "shift": shift, "kind": kind, "ste": "clip"}, "fused"
            )
        results.append((out, *grads.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_levels_agree_on_bits(isa: str) -> None:
    x = torch.randn(33, 517, generator=torch.Generator().manual_seed(2))
    for kind, ste in SETTINGS:
        kwargs = {"x": x, "alpha": torch.tensor([0.9]), "shift": None, "kind": kind, "ste": ste}
        assert torch.equal(FORWARD(*kwargs.values(), True)[1], exact_planes(kwargs))


def saved_bytes(x: Tensor, **settings: Any) -> tuple[int, set[torch.dtype]]:
    """Bytes and dtypes of what the graph keeps of a call."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    alpha = torch.ones(1, requires_grad=True)
    shift = torch.zeros(x.shape[-1], requires_grad=True)
    with saved_tensors_hooks(pack, lambda t: t):
        elastic_binarize(x, alpha, shift, **settings, impl="fused")
    return sum(t.untyped_storage().nbytes() for t in saved), {t.dtype for t in saved}


@pytest.mark.parametrize(("kind", "ste"), SETTINGS)
def test_saved_bytes(kind: str, ste: str) -> None:
    x = torch.randn(64, 768, requires_grad=True)
    count, dtypes = saved_bytes(x, kind=kind, ste=ste)
    if needs_x(kind, ste):
        assert count >= x.nbytes and torch.float32 in dtypes
        return
    assert dtypes == {torch.uint8}
    assert count * 32 == plane_count(kind, ste) * x.nbytes
    assert plane_count(kind, ste) <= 3 if kind == "ternary" else 2


def test_nothing_is_saved_without_gradients() -> None:
    x = torch.randn(4, 64)
    with saved_tensors_hooks(lambda t: pytest.fail("saved"), lambda t: t):
        elastic_binarize(x)
        with torch.no_grad():
            elastic_binarize(x.requires_grad_())


@pytest.mark.parametrize("kind", ["plus", "minus", "ternary", "unsigned"])
def test_alpha_without_dimension(kind: str) -> None:
    x = torch.randn(3, 40)
    alpha = torch.tensor(0.7, requires_grad=True)
    one = torch.tensor([0.7], requires_grad=True)
    for side in (alpha, one):
        elastic_binarize(x, side, kind=kind, impl="fused").sum().backward()
    assert alpha.grad.shape == () and torch.equal(alpha.grad, one.grad[0])


def test_sides_of_16_bits(isa: str) -> None:
    x = torch.randn(6, 70)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        sides = [torch.full((1,), 0.75), torch.linspace(-1, 1, 70).bfloat16().float()]
        leaf = [side.to(dtype).requires_grad_() for side in sides]
        out = elastic_binarize(x, *leaf, kind="unsigned", impl="fused")
        assert out.dtype == torch.float32
        grads.append(torch.autograd.grad(out.square().sum(), leaf))
    for wide, narrow in zip(*grads, strict=True):
        assert torch.equal(wide.bfloat16(), narrow)


def test_expanded_gradient() -> None:
    x = torch.randn(5, 70, requires_grad=True)
    elastic_binarize(x, ste="identity", impl="fused").sum().backward()
    assert torch.equal(x.grad, torch.ones(5, 70))


def test_some_gradients_only() -> None:
    shift = torch.zeros(40, requires_grad=True)
    x = torch.randn(6, 40)
    elastic_binarize(x, torch.ones(1), shift, impl="fused").sum().backward()
    assert torch.equal(shift.grad, (x.abs() <= 1).float().sum(0))


def test_second_derivative_raises() -> None:
    x = torch.randn(5, requires_grad=True)
    (dx,) = torch.autograd.grad(
        elastic_binarize(x, kind="unsigned", impl="fused").sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize(("kind", "factor"), [("ternary", 2), ("unsigned", 4)])
def test_module(kind: str, factor: int) -> None:
    module = nn.ElasticBinarize(24, kind=kind)
    assert list(module.state_dict()) == ["alpha", "shift"]
    with torch.no_grad():
        module.shift.uniform_(-1, 1)
    x = torch.randn(10, 24)
    assert module.calibrate_(x) is module
    assert torch.allclose(module.alpha, factor * (x + module.shift).abs().mean().reshape(1))
    out = module(x)
    assert torch.equal(out, reference.elastic_binarize(x, module.alpha, module.shift, kind))
    out.square().sum().backward()
    assert module.alpha.grad is not None and module.shift.grad.shape == (24,)
    assert f"24, kind='{kind}'" in repr(module)
    assert list(nn.ElasticBinarize(kind=kind).state_dict()) == ["alpha"]


@pytest.mark.parametrize(
    "bad", [{"features": 0}, {"kind": "signed"}, {"ste": "none"}], ids=["features", "kind", "ste"]
)
def test_module_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ElasticBinarize: {next(iter(bad))} must be"):
        nn.ElasticBinarize(**bad)
