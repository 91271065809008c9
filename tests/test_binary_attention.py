# SPDX-License-Identifier: Apache-2.0
"""Binary attention against its definition in float64: results, planes, gradients, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbb
from fastbb import reference
from fastbb.ops import binary_attention
from fastbb.reference.binary_pack import pack_bool, unpack_bool
from fastbb.reference.philox import philox_keep
from fastbb.testing import TOLERANCES, Bounds, assert_close, assert_grads_close
from fastbb.testing.binary_attention import CASES, build, raw_args
from fastbb.testing.sample import in_float64, leaves, random_like

OP = torch.ops.fastbb.binary_attention.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = TOLERANCES["fastbb::binary_attention"]

Grads = dict[str, Tensor]


def gradients(kwargs: dict[str, Any], impl: str, grad_out: Tensor) -> Grads:
    """Of all leaves; zeros where nothing depends on one."""
    wanted = leaves(kwargs)
    result = binary_attention(**kwargs, impl=impl)
    grads = torch.autograd.grad(
        result, list(wanted.values()), grad_out, allow_unused=impl == "reference"
    )
    return {
        key: torch.zeros_like(x) if grad is None else grad
        for (key, x), grad in zip(wanted.items(), grads, strict=True)
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_matches_reference(dtype: torch.dtype) -> None:
    for name in CASES:
        sample = build(name, dtype=dtype)
        exact = binary_attention(**in_float64(sample.kwargs), impl="reference")
        for level in fastbb.isa_levels():
            with fastbb.cap_isa(level):
                out = binary_attention(**sample.kwargs, impl="fused")
                assert torch.equal(out, OP(*sample.args)[0])
            assert out.is_contiguous() and out.dtype == dtype
            assert_close(out, exact, TOLERANCE[dtype].forward, f"{name}, {level}")


def grad_bounds(kwargs: dict[str, Any]) -> Bounds:
    """Of the coarsest type that a gradient is rounded to."""
    types = {x.dtype for x in leaves(kwargs).values()}
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in types:
            return TOLERANCE[dtype].grad
    return TOLERANCE[torch.float32].grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_reference(dtype: torch.dtype) -> None:
    for name in CASES:
        kwargs = build(name, dtype=dtype, requires_grad=True).kwargs
        grad_out = random_like(kwargs["q"].detach(), 1)
        exact = gradients(in_float64(kwargs), "reference", grad_out.double())
        found = gradients(kwargs, "fused", grad_out)
        for key, x in leaves(kwargs).items():
            assert found[key].dtype == x.dtype
        assert_grads_close(found, exact, grad_bounds(kwargs))


@pytest.mark.parametrize("wanted", ["q", "v", "alphas", "est_q", "est_k", "v_p"])
def test_one_gradient_alone(wanted: str) -> None:
    kwargs = build("bipft").kwargs
    kwargs[wanted] = kwargs[wanted].detach().requires_grad_()
    grad_out = torch.randn(kwargs["q"].shape)
    exact = gradients(in_float64(kwargs), "reference", grad_out.double())
    assert_grads_close(gradients(kwargs, "fused", grad_out), exact, grad_bounds(kwargs))


def test_gradients_at_every_level(isa: str) -> None:
    """Planes are what depends on the level."""
    for name in ("bipft_zeros", "bit_dropout", "bibert_dropout", "dim_250"):
        kwargs = build(name, requires_grad=True).kwargs
        grad_out = random_like(kwargs["q"].detach(), 1)
        exact = gradients(in_float64(kwargs), "reference", grad_out.double())
        found = gradients(kwargs, "fused", grad_out)
        assert_grads_close(found, exact, TOLERANCE[torch.float32].grad)


# What is saved


@pytest.mark.parametrize("ste", ["clip", "clip_open", "identity"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_planes_of_inputs(isa: str, ste: str, dtype: torch.dtype) -> None:
    """With elements at, just within and just beyond alpha, zeros, infinities and NaN."""
    alphas = torch.tensor([0.75, -1.0, 0.3, 1.0])  # -1 is raised to 1e-5
    for dim in (1, 33, 130):
        q, k, v = (torch.randn(2, n, 2, dim, dtype=dtype) for n in (3, 70, 70))
        for x, alpha in ((q, 0.75), (k, 1e-5), (v, alphas[2].item())):
            special = torch.tensor([alpha, -alpha, 0.0, -0.0, torch.inf, -torch.inf, torch.nan])
            special = torch.cat((special, special[:2] * (1 + 1e-7), special[:2] * (1 - 1e-7)))
            x.view(-1)[: min(len(special), x.numel())] = special[: x.numel()].to(dtype)
        args = (q, k, v, alphas, *(None,) * 4, 0.5, "softmax", ste, 0.0, 0, True)
        _, _, *planes, _ = OP(*args)
        for x, alpha, found in zip((q, k, v), alphas.clamp(min=1e-5)[:3], planes, strict=True):
            wide = x.float()
            u = (wide / alpha).abs()
            passes = {"clip": u <= 1, "clip_open": u < 1, "identity": torch.ones_like(u).bool()}
            exact = pack_bool(torch.stack((wide > 0, wide < 0, passes[ste]), -2))
            assert torch.equal(found, exact)


@pytest.mark.parametrize("name", ["bit_dropout", "bipft_dropout", "bipft", "bibert_dropout"])
def test_saved_planes_of_probabilities(isa: str, name: str) -> None:
    """The kept ones are those of philox_keep; the result is made of the bits."""
    kwargs = build(name).kwargs
    q, k, v = (kwargs[key].double() for key in "qkv")
    out, _, _, _, _, planes = OP(*raw_args(kwargs))
    bits, *kept = unpack_bool(planes, k.shape[1]).unbind(-2)
    assert planes.shape[3] == (2 if kwargs["dropout_p"] > 0 else 1)
    if kept:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        expected = philox_keep(shape, kwargs["dropout_p"], kwargs["seed"], q.device)
        assert torch.equal(kept[0], expected)
        assert not (bits & ~kept[0]).any()
    assert bits.any() and not bits.all()
    a_v, a_p = kwargs["alphas"].double()[2:] if "alphas" in kwargs else (1.0, 1.0)
    values = a_v * v.sign()
    if "v_p" in kwargs:
        values = values + kwargs["v_p"].double()[:, :, None, None]
    exact = a_p * torch.einsum("bhij,bjhd->bihd", bits.double(), values)
    assert_close(out, exact, TOLERANCE[torch.float32].forward)


def test_log_sum_exp(isa: str) -> None:
    kwargs = build("pair_mask").kwargs
    kwargs["mask"][0, 2] = -torch.inf
    lse = OP(*raw_args(kwargs))[1]
    q, k = (
        kwargs[x].sign().transpose(1, 2).double() * a
        for x, a in zip("qk", kwargs["alphas"].double(), strict=False)
    )
    estimate = kwargs["est_q"].double() @ kwargs["est_k"].double().mT
    scores = (q @ k.mT + estimate[:, None]) * kwargs["scale"] + kwargs["mask"][:, None]
    assert_close(lse, scores.logsumexp(-1), Bounds(2e-6, 2e-6, 2e-6))
    assert (lse[0, :, 2] == -torch.inf).all()


def test_without_gradients_nothing_is_saved() -> None:
    kwargs = build("bipft").kwargs
    out, *rest = OP(*raw_args(kwargs, save=False))
    assert all(x.numel() == 0 for x in rest)
    assert torch.equal(out, OP(*raw_args(kwargs))[0])
    kwargs["q"] = kwargs["q"].detach().requires_grad_()
    with pytest.raises(RuntimeError, match="save must be True where gradients are wanted"):
        OP(*raw_args(kwargs, save=False))[0].sum().backward()


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Of the distinct tensors that autograd keeps for a backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_only_bits_are_saved(dropout_p: float) -> None:
    b, n, h, d = 2, 256, 3, 128
    q, k, v = (torch.randn(b, n, h, d, requires_grad=True) for _ in range(3))
    alphas = torch.rand(4, requires_grad=True)
    options = {"alphas": alphas, "dropout_p": dropout_p, "scale": d**-0.5}
    bits = 3 * 3 * b * n * h * d + (2 if dropout_p else 1) * b * h * n * n
    ours = saved_bytes(lambda: binary_attention(q, k, v, **options, impl="fused"))
    assert ours == bits // 8 + alphas.nbytes

    def full_precision() -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        scores = next(heads) @ next(heads).mT * d**-0.5
        return torch.dropout(scores.softmax(-1), dropout_p, dropout_p > 0) @ next(heads)

    assert saved_bytes(full_precision) > 12 * ours
    reference_bytes = saved_bytes(lambda: binary_attention(q, k, v, **options, impl="reference"))
    assert reference_bytes > 20 * ours


# Registration


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield


@pytest.mark.parametrize("name", ["bipft_dropout", "bibert"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(OP, build(name, requires_grad=True).args)


def test_opcheck_without_grad() -> None:
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    for save in (False, True):
        torch.library.opcheck(OP, raw_args(build("bipft").kwargs, save), test_utils=cheap)


@pytest.mark.parametrize("name", ["bipft_dropout", "bibert"])
def test_compile(name: str) -> None:
    kwargs = build(name, requires_grad=True).kwargs
    fixed = {key: x for key, x in kwargs.items() if not isinstance(x, Tensor)}
    tensors = {key: x for key, x in kwargs.items() if isinstance(x, Tensor)}

    def eager(tensors: dict[str, Tensor]) -> Tensor:
        return binary_attention(**tensors, **fixed, impl="fused") * 2

    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    expected, result = eager(tensors), compiled(tensors)
    assert torch.equal(result, expected)
    wanted = list(leaves(kwargs).values())
    grad_out = torch.randn_like(expected)
    first, second = (torch.autograd.grad(y, wanted, grad_out) for y in (expected, result))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(compiled(tensors), expected)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compile_dynamic_sizes_once() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return binary_attention(q, k, v, scale=0.3, impl="fused")

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, nq, nk in [(5, 9, 7), (3, 30, 150)]:
        q = torch.randn(batch, nq, 2, 24, requires_grad=True)
        k, v = torch.randn(2, batch, nk, 2, 24).unbind(0)
        expected, result = attend(q, k, v), compiled(q, k, v)
        assert torch.equal(result, expected)
        (a,), (b,) = (torch.autograd.grad(y.sum(), q) for y in (expected, result))
        torch.testing.assert_close(a, b)


def test_backward_within_autocast_keeps_float32() -> None:
    kwargs = build("bipft", requires_grad=True).kwargs
    grad_out = torch.randn(kwargs["q"].shape)
    expected = gradients(kwargs, "fused", grad_out)
    with torch.autocast("cpu", torch.bfloat16):
        assert binary_attention(**kwargs).dtype == torch.float32
        found = gradients(kwargs, "fused", grad_out)
    for key, grad in expected.items():
        assert torch.equal(found[key], grad)


def test_second_derivatives_are_refused() -> None:
    kwargs = build("bipft", requires_grad=True).kwargs
    out = binary_attention(**kwargs, impl="fused")
    (dq,) = torch.autograd.grad(out.square().sum(), kwargs["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives have no kernel"):
        dq.square().sum().backward()


def test_reference_path() -> None:
    kwargs = build("bipft").kwargs
    with fastbb.use_fused(False):
        out = binary_attention(**kwargs)
    assert torch.equal(out, reference.binary_attention(**kwargs))
    assert torch.equal(out, binary_attention(**kwargs, impl="reference"))
    default = {key: x for key, x in kwargs.items() if key not in ("scale", "ste", "probs", "seed")}
    assert torch.equal(binary_attention(**default), binary_attention(**kwargs))
