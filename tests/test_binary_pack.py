# SPDX-License-Identifier: Apache-2.0
"""Packing: bits, weights, values and embeddings against their definitions, at every level."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbb
from fastbb import ops, reference
from fastbb.selftest.checks import CHECKS
from fastbb.testing import SAMPLES, TOLERANCES, assert_close
from fastbb.testing.binary_pack import spoil

OPS = ("pack_bits", "pack_weight", "unpack_bits", "binary_embedding")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def raw(op: str) -> Any:
    return getattr(torch.ops.fastbb, op).default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_samples_match_reference(isa: str, op: str, dtype: torch.dtype) -> None:
    check = CHECKS[op]
    for sample in SAMPLES[f"fastbb::{op}"]("cpu", dtype):
        results = raw(op)(*sample.args)
        results = (results,) if isinstance(results, Tensor) else results
        exact = check.exact(sample)
        for name, result in zip(check.names, results, strict=True):
            assert result.is_contiguous()
            if result.dtype == torch.uint8:
                assert torch.equal(result, exact[name]), sample.name
            else:
                bounds = TOLERANCES[f"fastbb::{op}"][dtype].forward
                assert_close(result, exact[name], bounds, sample.name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(isa: str, dtype: torch.dtype) -> None:
    """All ends of a row: within a vector, a byte, a word, a unit, and beyond one."""
    for k in (*range(1, 68), 96, *range(120, 137), 191, 192, 193):
        x = spoil(torch.randn(3, k).to(dtype))
        shift = torch.randn(k)
        for policy in ("plus", "minus", "ternary"):
            for by in (None, shift):
                bits = ops.pack_sign(x, by, zero_policy=policy, impl="fused")
                assert torch.equal(bits, reference.pack_sign(x, by, policy)), (k, policy)
        kind = "ternary" if k % 2 else "signed"
        packed = bits if k % 2 else bits[:, 0]
        values = ops.unpack_bits(packed, k, kind=kind, dtype=dtype, impl="fused")
        assert torch.equal(values, reference.unpack_bits(packed, k, kind, dtype)), k
        weight = torch.randn(3, k).to(dtype)
        bits, scale = ops.pack_weight(weight, center="row", scale="row", impl="fused")
        expected = reference.pack_weight(weight, "row", "row", "plus")
        assert torch.equal(bits, expected[0]) and torch.equal(scale, expected[1]), k


def test_layout() -> None:
    """Bit j % 8 of byte j // 8 is element j, 16 bytes for every 128 begun, zeros beyond."""
    for j in range(130):
        x = -torch.ones(130)
        x[j] = 1
        bits = ops.pack_sign(x, zero_policy="plus", impl="fused")
        assert bits.shape == (32,)
        assert bits[j // 8] == 1 << (j % 8) and bits.sum() == bits[j // 8]
    ones = ops.pack_sign(torch.ones(2, 3), zero_policy="plus", impl="fused")
    assert ones.tolist() == [[7] + [0] * 15] * 2


def test_padding_is_written(isa: str) -> None:
    """Results come from memory that was used before: all of it is written."""
    for k in (1, 63, 64, 65, 127, 129, 192):
        for kind, width in (("plus", 1), ("ternary", 2)):
            size = 50 * width * reference.bit_row_bytes(k)
            torch.full((size,), 255, dtype=torch.uint8)
            bits = ops.pack_sign(torch.ones(50, k), zero_policy=kind, impl="fused")
            assert torch.equal(bits, reference.pack_sign(torch.ones(50, k), None, kind))


def test_special_values(isa: str) -> None:
    """NaN is 0 in every plane, infinities and the smallest numbers count by their sign."""
    tiny = 1e-45
    x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, tiny, -tiny])

    def planes(bits: Tensor) -> list[str]:
        rows = bits.view(-1, 16)[:, 0].tolist()
        return [f"{row:08b}"[::-1] for row in rows]

    def signs(policy: Any) -> list[str]:
        return planes(ops.pack_sign(x, zero_policy=policy, impl="fused"))

    assert signs("plus") == ["00101110"]
    assert signs("minus") == ["00100010"]
    assert signs("ternary") == ["00100010", "00010001"]
    alpha = torch.tensor(1e-5)
    assert planes(ops.pack_unsigned(x, alpha, impl="fused")) == ["00100000"]
    assert planes(ops.pack_unsigned(x, alpha * math.nan, impl="fused")) == ["00000000"]
    assert planes(ops.pack_unsigned(x, -alpha, impl="fused")) == ["00100000"]


def test_shift_is_added_in_float32(isa: str) -> None:
    """Not in x's dtype, in which the first two sums would be 0."""
    x = torch.tensor([1.0, 1.0, 0.5], dtype=torch.bfloat16)
    shift = torch.tensor([-1.001, -1 + 6e-8, -0.5])
    expected = reference.pack_sign(x, shift)
    assert torch.equal(ops.pack_sign(x, shift, impl="fused"), expected)
    assert expected[:, 0].tolist() == [0b010, 0b001]
    half = torch.tensor([0.35], dtype=torch.float32)
    alpha = torch.tensor([0.7])
    assert ops.pack_unsigned(half, alpha, impl="fused").sum() == 0, "exactly half rounds to even"


def test_weights_are_the_same_at_every_level() -> None:
    """Sums run in one order: scales too are equal bit by bit."""
    for k in (5, 100, 768):
        weight = torch.randn(40, k)
        results = []
        for level in fastbb.isa_levels():
            with fastbb.cap_isa(level):
                results.append(ops.pack_weight(weight, scale="row", impl="fused"))
        for bits, scale in results[1:]:
            assert torch.equal(bits, results[0][0]) and torch.equal(scale, results[0][1])


def test_nan_in_a_weight(isa: str) -> None:
    """It spoils what shares its mean, and nothing else."""
    weight = torch.randn(3, 50)
    weight[1, 7] = math.nan
    for center in ("none", "tensor", "row"):
        bits, scale = ops.pack_weight(weight, center=center, scale="row", impl="fused")
        assert torch.equal(bits, reference.pack_weight(weight, center, "row")[0])
        assert scale.isnan().tolist() == [False, True, False]
        assert bits.any(1).tolist() == [center != "tensor", center == "none", center != "tensor"]
    assert ops.pack_weight(weight, impl="fused")[1].isnan().all()


def test_number_of_threads_changes_nothing() -> None:
    weight = torch.randn(700, 300)
    one = torch.get_num_threads()
    torch.set_num_threads(1)
    first = ops.pack_weight(weight, impl="fused")
    torch.set_num_threads(max(one, 2))
    second = ops.pack_weight(weight, impl="fused")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_round_trip() -> None:
    x = torch.randn(4, 6, 99)
    x[..., ::7] = 0
    assert torch.equal(ops.unpack_bits(ops.pack_sign(x), 99, kind="ternary"), x.sign())
    plus = ops.unpack_bits(ops.pack_sign(x, zero_policy="plus"), 99)
    assert torch.equal(plus, torch.where(x >= 0, 1.0, -1.0))
    positive = ops.pack_unsigned(x, torch.tensor(0.5))
    assert torch.equal(ops.unpack_bits(positive, 99, kind="unsigned"), (x > 0.25).float())


def test_packed_weight_approximates_the_weight() -> None:
    """scale * sign(weight - mean) is the best of its kind for the centred weight's scale."""
    weight = torch.randn(20, 90, dtype=torch.float32) + 0.3
    bits, scale = ops.pack_weight(weight, center="row", scale="row", impl="fused")
    values = ops.unpack_bits(bits, 90)
    assert torch.equal(values, torch.where(weight >= weight.mean(1, keepdim=True), 1.0, -1.0))
    torch.testing.assert_close(scale, weight.abs().mean(1))
    table = ops.binary_embedding(torch.arange(20), bits, scale, k=90, impl="fused")
    assert torch.equal(table, values * scale[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_rounds_once(isa: str, dtype: torch.dtype) -> None:
    weight = torch.randn(11, 70)
    bits, scale = ops.pack_weight(weight, scale="row")
    ids = torch.tensor([[3, 10, 0], [3, 3, 5]])
    rows = ops.binary_embedding(ids, bits, scale, k=70, dtype=dtype, impl="fused")
    exact = (ops.unpack_bits(bits, 70) * scale[:, None])[ids]
    assert torch.equal(rows, exact.to(dtype)) and rows.shape == (2, 3, 70)


def test_reference_path_and_float64() -> None:
    x = torch.randn(3, 40, dtype=torch.float64)
    assert ops.pack_sign(x).shape == (3, 2, 16)
    assert ops.pack_unsigned(x, torch.tensor(1.0)).shape == (3, 16)
    bits, scale = ops.pack_weight(x)
    assert bits.shape == (3, 16) and scale.dtype == torch.float32
    assert ops.unpack_bits(bits, 40, dtype=torch.float64).dtype == torch.float64
    with fastbb.use_fused(False):
        single = ops.pack_weight(x.float())
        embedded = ops.binary_embedding(torch.tensor([1]), *single, k=40)
    fused = ops.binary_embedding(torch.tensor([1]), *single, k=40, impl="fused")
    assert torch.equal(embedded, fused)


def test_results_have_no_gradient() -> None:
    x = torch.randn(4, 30, requires_grad=True)
    scale = torch.rand(4, requires_grad=True)
    alpha = torch.tensor([0.5], requires_grad=True)
    for impl in ("fused", "reference"):
        bits, size = ops.pack_weight(x, impl=impl)
        results = [
            ops.pack_sign(x, x[0], impl=impl),
            ops.pack_unsigned(x, alpha, x[0], impl=impl),
            ops.binary_embedding(torch.tensor([1]), bits, scale, k=30, impl=impl),
            bits,
            size,
        ]
        assert not any(y.requires_grad for y in results)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    samples = list(SAMPLES[f"fastbb::{op}"]("cpu", torch.float32))
    for sample in samples[:: max(1, len(samples) // 6)]:
        torch.library.opcheck(raw(op), sample.args)
    assert not raw(op)._schema.is_mutable


def _layer(x: Tensor, shift: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    bits, scale = ops.pack_weight(x * 2, scale="row", impl="fused")
    return (
        ops.pack_sign(x + 1, shift, impl="fused") ^ 1,
        ops.pack_unsigned(x, scale[:1], shift, impl="fused"),
        ops.binary_embedding(ids, bits, scale, k=x.shape[1], dtype=x.dtype, impl="fused") * 2,
        ops.unpack_bits(bits, x.shape[1], kind="unsigned", dtype=torch.bfloat16, impl="fused"),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, backend=backend)
    for grad in (False, True)[: 2 if backend == "aot_eager" else 1]:
        x = torch.randn(5, 70, requires_grad=grad)
        args = (x, torch.randn(70), torch.tensor([[1, 4]]))
        for a, b in zip(compiled(*args), _layer(*args), strict=True):
            assert torch.equal(a, b) and not a.requires_grad


def test_compiles_dynamic_rows_once() -> None:
    """K is a number in the graph, as it is in the schema of embeddings."""
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, k, count in ((5, 70, 3), (9, 70, 4), (6, 70, 2)):
            args = (torch.randn(rows, k), torch.randn(k), torch.arange(count))
            for a, b in zip(compiled(*args), _layer(*args), strict=True):
                assert torch.equal(a, b)


def test_reference_path_compiles() -> None:
    def call(x: Tensor, ids: Tensor) -> Tensor:
        bits, scale = ops.pack_weight(x, impl="reference")
        return ops.binary_embedding(ids, bits, scale, k=x.shape[1], impl="reference")

    torch._dynamo.reset()
    args = (torch.randn(5, 70), torch.tensor([0, 3]))
    compiled: Callable[..., Tensor] = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), call(*args))


def test_export() -> None:
    class Embed(torch.nn.Module):
        def forward(self, ids: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
            return ops.binary_embedding(ids, bits, scale, k=30, impl="fused")

    inputs = (torch.tensor([0, 2]), torch.zeros(4, 16, dtype=torch.uint8), torch.rand(4))
    program = torch.export.export(Embed(), inputs)
    assert raw("binary_embedding") in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(*inputs), Embed()(*inputs))
