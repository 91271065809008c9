# SPDX-License-Identifier: Apache-2.0
"""Packing at the sizes of BERT-base: fastbb and plain PyTorch.

    python -m pytest bench/bench_binary_pack.py -k "pack_sign and not compile"

pytest-benchmark times one candidate after the other; results are compared first. The kernels are
bound by memory: reported is the share that their least traffic, floats and bits once, has in the
bandwidth of a copy that fits no cache. What stays in a cache can exceed it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb import ops
from fastbb.bench.roofline import measure_roofline

ROWS = (1, 128, 4096)
WIDTH = 768
CANDIDATES = ("eager", "torch.compile", "fastbb")
FUNCTIONS = ("pack_sign", "pack_unsigned", "pack_weight", "unpack_bits", "binary_embedding")
IMPLEMENTATIONS = {"eager": "reference", "torch.compile": "reference", "fastbb": "fused"}
VOCABULARY = 30522


def arguments(
    name: str, rows: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Tensors and settings of a call, float tensors with some zeros."""
    x = torch.randn(rows, WIDTH).mul(8).round().div(8).to(dtype)
    shift = torch.randn(WIDTH).mul(8).round().div(8)
    if name == "pack_sign":
        return (x, shift), {"zero_policy": "ternary"}
    if name == "pack_unsigned":
        return (x, torch.tensor([0.75]), shift), {}
    if name == "pack_weight":
        return (x,), {}
    if name == "unpack_bits":
        return (ops.pack_sign(x),), {"k": WIDTH, "kind": "ternary", "dtype": dtype}
    table = torch.randint(256, (VOCABULARY, WIDTH // 8), dtype=torch.uint8)
    ids = torch.randint(VOCABULARY, (rows,))
    return (ids, table, torch.rand(VOCABULARY)), {"k": WIDTH, "dtype": dtype}


def least_bytes(name: str, rows: int, dtype: torch.dtype) -> float:
    """Floats and bits once; the two planes of `pack_sign` and `unpack_bits`."""
    planes = 2 if name in ("pack_sign", "unpack_bits") else 1
    passes = 2 if name == "pack_weight" else 1  # the mean comes before the bits
    return rows * WIDTH * (passes * dtype.itemsize + planes / 8)


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_speed(benchmark: Any, name: str, rows: int, dtype: torch.dtype, candidate: str) -> None:
    tensors, settings = arguments(name, rows, dtype)
    function: Callable[..., Any] = getattr(ops, name)

    def run(impl: str) -> Any:
        return function(*tensors, **settings, impl=impl)

    torch.compiler.reset()
    call = torch.compile(run) if candidate == "torch.compile" else run
    impl = IMPLEMENTATIONS[candidate]
    with torch.inference_mode():
        results = call(impl), run("reference")
        torch.testing.assert_close(*results, rtol=1e-6, atol=0.0)
        benchmark.group = f"{name}, {rows} rows, {dtype}"
        benchmark(call, impl)
    if benchmark.disabled:
        return
    rate = least_bytes(name, rows, dtype) / benchmark.stats.stats.median
    benchmark.extra_info["share of copy bandwidth"] = rate / measure_roofline().copy_bytes


def test_memory() -> None:
    """Bits are 1/32 of float32, two planes 1/16."""
    x = torch.randn(128, WIDTH)
    assert ops.pack_sign(x, zero_policy="plus").nbytes * 32 == x.nbytes
    assert ops.pack_sign(x).nbytes * 16 == x.nbytes
