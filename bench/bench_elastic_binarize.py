# SPDX-License-Identifier: Apache-2.0
"""Elastic binarization: fastbb and the float arithmetic of the papers' code.

    python -m pytest bench/bench_elastic_binarize.py -k "ternary_clip and not compile"

pytest-benchmark times one candidate after the other, at the sizes of BERT-base's layers. Results
and gradients are compared before they are timed. The kernel moves bytes and does little else: its
share of the bandwidth of a copy is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastbb.bench.roofline import measure_roofline
from fastbb.ops import elastic_binarize
from fastbb.ops.elastic_binarize import needs_x, plane_count
from fastbb.testing import TOLERANCES, assert_grads_close

# Rows (batch 32, 128 tokens) and features of BERT-base's layers.
SHAPES = {"hidden": (4096, 768), "ffn": (4096, 3072)}
SETTINGS = {
    "ternary_clip": ("ternary", "clip"),
    "plus_clip": ("plus", "clip"),
    "unsigned": ("unsigned", "clip"),
    "bireal": ("ternary", "bireal"),
}
CANDIDATES = ("eager", "torch.compile", "fastbb")
MODES = ("forward", "forward+backward")
BOUNDS = TOLERANCES["fastbb::elastic_binarize"][torch.float32].grad.times(8)


def simulated(x: Tensor, alpha: Tensor, shift: Tensor, kind: str, ste: str) -> Tensor:
    """What eager code without an operator of its own does."""
    return elastic_binarize(x, alpha, shift, kind=kind, ste=ste, impl="reference")


def calls(kind: str, ste: str, backward: bool, shape: tuple[int, int]) -> dict[str, Callable]:
    """Candidates on the same inputs; each returns the result, or the gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_(backward)
    alpha = torch.tensor([1.25]).requires_grad_(backward)
    shift = (torch.randn(shape[1], generator=generator) / 8).requires_grad_(backward)
    grad = torch.randn(shape, generator=generator)

    def fused(x: Tensor, alpha: Tensor, shift: Tensor, kind: str, ste: str) -> Tensor:
        return elastic_binarize(x, alpha, shift, kind=kind, ste=ste, impl="fused")

    def call(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            out = function(x, alpha, shift, kind, ste)
            return torch.autograd.grad(out, (x, alpha, shift), grad) if backward else (out,)

        return run

    functions = (simulated, torch.compile(simulated), fused)
    return {name: call(function) for name, function in zip(CANDIDATES, functions, strict=True)}


def bytes_moved(kind: str, ste: str, backward: bool, elements: int) -> float:
    """Least traffic: x, result and planes once; then grad, dx, and planes or x."""
    planes = plane_count(kind, ste) / 8
    if not backward:
        return elements * 8.0
    kept = 4.0 if needs_x(kind, ste) else planes
    return elements * (8.0 + (0.0 if needs_x(kind, ste) else planes) + 8.0 + kept)


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_speed(benchmark: Any, shape: str, setting: str, mode: str, candidate: str) -> None:
    backward = mode == "forward+backward"
    kind, ste = SETTINGS[setting]
    torch.compiler.reset()
    with torch.inference_mode(not backward):
        candidates = calls(kind, ste, backward, SHAPES[shape])
        expected, ours = (
            {str(i): x for i, x in enumerate(candidates[name]())} for name in ("eager", candidate)
        )
        # Both are float32, with sums in different orders.
        assert_grads_close(ours, expected, BOUNDS)
        benchmark.group = f"{shape}, {setting}, {mode}"
        benchmark(candidates[candidate])
    if benchmark.disabled:
        return
    rows, k = SHAPES[shape]
    rate = bytes_moved(kind, ste, backward, rows * k) / benchmark.stats.stats.median
    benchmark.extra_info["share of copy bandwidth"] = rate / measure_roofline().copy_bytes


@pytest.mark.parametrize("setting", SETTINGS)
def test_saved_bytes(setting: str) -> None:
    """What autograd keeps between the passes, which plain PyTorch code keeps as float32."""
    kind, ste = SETTINGS[setting]
    x = torch.randn(SHAPES["hidden"], requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t):
        elastic_binarize(x, kind=kind, ste=ste, impl="fused")
    share = sum(kept) / x.nbytes
    assert share == (1.0 if needs_x(kind, ste) else plane_count(kind, ste) / 32)
