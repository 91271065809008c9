# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of binary layers and encoders, on tiny shapes: what they compare and report."""

from __future__ import annotations

import pytest
import torch

from fastbb._console import Progress, WrongResult, text_table
from fastbb.bench import binary_linear, binary_models
from fastbb.measure import saved_bytes

SHAPE = binary_linear.LinearShape("tiny", 96, 40)


def test_linear_end_to_end() -> None:
    results = binary_linear.run((1, 20), Progress(), rounds=2, shapes=(SHAPE,))
    assert [row["m"] for row in results["rows"]] == [1, 20]
    for row in results["rows"]:
        assert set(row["speed_up"]) == set(binary_linear.PEERS)
        assert 0 < row["share_of_peak"][binary_linear.OURS] < 1.5
        assert row["max_difference"] < 1e-4
    header, lines = binary_linear.table(results)
    assert all(len(line) == len(header) for line in lines)
    assert "96 x 40" in text_table(header, lines)


def test_wrong_linear_results_are_noticed() -> None:
    calls = binary_linear.candidates(SHAPE, 4)
    binary_linear.verify(SHAPE, calls)
    ours = calls[binary_linear.OURS]
    calls[binary_linear.OURS] = lambda: ours() + 0.1
    with pytest.raises(WrongResult, match=r"tiny: fastbb differs by 0\.1"):
        binary_linear.verify(SHAPE, calls)


def test_encoders_end_to_end() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    shape = binary_models.EncoderShape("tiny", 128, 1, 4, 256)
    results = binary_models.run(Progress(), 2, (shape,), (1,), tokens=16)
    assert {row["preset"] for row in results["rows"]} == set(binary_models.PRESETS)
    for row in results["rows"]:
        sizes = row["bytes"]
        # A scale and a shape per layer of 128 x 128 take their share of a tiny model.
        assert sizes["linear_float32"] / sizes["linear"] > 28
        assert sizes["packed, file"] < sizes["float32, file"] / 10
    (training,) = results["training"]
    assert training["bytes"]["fastbb"] < training["bytes"]["fp32"]
    for header, lines in (binary_models.table(results), binary_models.training_table(results)):
        assert all(len(line) == len(header) for line in lines)


def test_saved_bytes_counts_activations_once() -> None:
    layer = torch.nn.Linear(64, 32)
    x = torch.randn(10, 64)

    def step() -> torch.Tensor:
        y = layer(x.requires_grad_())
        return (y * y).sum()

    # x, and y once although both factors are kept.
    assert saved_bytes(step, layer) == (10 * 64 + 10 * 32) * 4


def test_peak_is_of_the_level_in_force(isa) -> None:
    assert binary_linear.bit_peak(seconds=0.02) > 1e9
