# SPDX-License-Identifier: Apache-2.0
"""Registration of the operator: opcheck, fake tensors, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbb
from fastbb.ops import window_attention
from fastbb.testing import TOLERANCES, assert_close
from fastbb.testing.window_attention import build, build_backward

FORWARD = torch.ops.fastbb.window_attention.default
BACKWARD = torch.ops.fastbb.window_attention_backward.default
TOLERANCE = TOLERANCES["fastbb::window_attention"][torch.float32]

# Together: every optional argument present and absent, both domains, empty batches, all layouts.
OPCHECK_CASES = [
    "swin",
    "gcvit_global_padded",
    "gcvit_global_odd_windows",
    "roll_pad_v2",
    "side_float64",
    "full_bias_mask",
    "pvt_one_key",
    "l2norm_default_scale",
    "expanded",
    "transposed_map",
    "batch_0",
    "no_queries",
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_forward(name: str) -> None:
    torch.library.opcheck(FORWARD, build(name, requires_grad=True).args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_16_bit(dtype: torch.dtype) -> None:
    torch.library.opcheck(FORWARD, build("pad_roll_both", dtype=dtype, requires_grad=True).args)
    torch.library.opcheck(BACKWARD, build_backward("pad_roll_both", dtype=dtype).args)


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_without_grad(name: str) -> None:
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(FORWARD, build(name).args, test_utils=cheap)


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck_backward(name: str) -> None:
    torch.library.opcheck(BACKWARD, build_backward(name).args)


def test_opcheck_backward_with_some_gradients() -> None:
    *args, _ = build_backward("gcvit_global_padded").args
    for need_side in ([False] * 5, [False, True, True, False, True]):
        torch.library.opcheck(BACKWARD, (*args, need_side), test_utils="test_faketensor")


@pytest.mark.parametrize("op", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_operator_has_no_side_effect_in_its_schema(op: torch._ops.OpOverload) -> None:
    assert not op._schema.is_mutable
    assert all(r.alias_info is None for r in op._schema.returns)


def call(kwargs: dict[str, Any]) -> Callable[..., Tensor]:
    """The function of the tensors in `kwargs`, the other arguments fixed."""
    fixed = {key: x for key, x in kwargs.items() if not isinstance(x, Tensor)}
    return lambda tensors: window_attention(**tensors, **fixed, impl="fused")


def tensors_of(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return {key: x for key, x in kwargs.items() if isinstance(x, Tensor)}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["roll_pad_both", "gcvit_global_padded", "pvt"])
def test_compile(backend: str, name: str) -> None:
    kwargs = build(name, requires_grad=True).kwargs
    tensors = tensors_of(kwargs)
    eager = call(kwargs)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    expected, result = eager(tensors), compiled(tensors)
    assert torch.equal(result, expected)
    wanted = [x for x in tensors.values() if x.requires_grad]
    grad_out = torch.randn_like(expected)
    first, second = (torch.autograd.grad(y, wanted, grad_out) for y in (expected, result))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_compile_inside_a_layer() -> None:
    """Between linears, with views of one qkv tensor, as modules call it."""
    weight = torch.randn(3 * 32, 32, requires_grad=True)
    table = torch.randn(49, 2, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        qkv = torch.nn.functional.linear(x, weight)
        q, k, v = qkv.unflatten(-1, (3, 2, 16)).unbind(3)
        out = window_attention(
            q,
            k,
            v,
            window=4,
            shift=2,
            mask="swin",
            bias_table=table,
            pad_mode="roll_then_pad",
            impl="fused",
        )
        return torch.nn.functional.gelu(out.flatten(-2))

    x = torch.randn(2, 7, 9, 32)
    compiled = torch.compile(layer, fullgraph=True)
    assert_close(compiled(x), layer(x).double(), TOLERANCE.forward)
    for y in (weight, table):
        grads = [torch.autograd.grad(f(x).square().sum(), y)[0] for f in (compiled, layer)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


# In the next two tests the sizes of the first call differ: equal ones would become one symbol.
@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("shared_q", [False, True])
def test_compile_dynamic_sizes_once(shared_q: bool) -> None:
    """Batch, H and W are symbols of one graph, trained at several sizes."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(
            q,
            k,
            v,
            window=(4, 3),
            shift=(2, 1),
            mask="swin",
            pad_mode="pad_then_roll",
            impl="fused",
        )

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, height, width in [(5, 9, 7), (3, 8, 12), (4, 4, 21)]:
        kv = torch.randn(2, batch, height, width, 2, 8, requires_grad=True)
        k, v = kv.unbind(0)
        q = torch.randn(batch, 12, 2, 8) if shared_q else torch.randn(batch, height, width, 2, 8)
        expected = attend(q, k, v)
        result = compiled(q, k, v)
        assert torch.equal(result, expected)
        (first,), (second,) = (torch.autograd.grad(y.sum(), kv) for y in (result, expected))
        assert torch.equal(first, second)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compile_dynamic_tokens_once() -> None:
    compiled = torch.compile(window_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, nq, nk in [(5, 9, 7), (3, 30, 2), (4, 6, 64)]:
        q = torch.randn(batch, nq, 2, 8)
        k, v = torch.randn(2, batch, nk, 2, 8).unbind(0)
        assert torch.equal(compiled(q, k, v), window_attention(q, k, v))


def test_compile_with_autocast() -> None:
    kwargs = build("swin").kwargs
    eager = call(kwargs)

    def cast(tensors: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return eager(tensors)

    result = torch.compile(cast, fullgraph=True, backend="aot_eager")(tensors_of(kwargs))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, cast(tensors_of(kwargs)))


@pytest.mark.parametrize("name", ["swin_v2", "pvt", "gcvit_global_padded"])
def test_reference_path_compiles(name: str) -> None:
    kwargs = build(name).kwargs
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    with fastbb.use_fused(False):
        result = compiled(**kwargs)
    assert torch.equal(result, window_attention(**kwargs, impl="reference"))


def test_export() -> None:
    """torch.export keeps the operator as one node."""

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return window_attention(q, k, v, window=4, impl="fused")

    inputs = tuple(torch.randn(3, 2, 8, 8, 2, 8).unbind(0))
    program = torch.export.export(Layer(), inputs)
    targets = [node.target for node in program.graph.nodes]
    assert FORWARD in targets
    assert torch.equal(program.module()(*inputs), Layer()(*inputs))
