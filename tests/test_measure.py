# SPDX-License-Identifier: Apache-2.0
"""`fastbb.measure`: the numbers that claims rest on, against planted times, sizes and errors."""

from __future__ import annotations

import math

import pytest
import torch

from fastbb import measure
from fastbb.measure import Spread, Timing


def test_interleaved_takes_turns_and_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    calls: list[str] = []

    def candidate(name: str, seconds: float):
        def call() -> None:
            nonlocal now
            calls.append(name)
            now += seconds

        return call

    told: list[str] = []
    times = measure.interleaved(
        {"a": candidate("a", 1.0), "b": candidate("b", 2.0), "c": candidate("c", 4.0)},
        rounds=6,
        warmup=2,
        progress=told.append,
    )
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]
    assert len(rounds) == 6 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "the order within a round must vary"
    assert times["b"].samples == (2.0,) * 6
    assert measure.speed_up(times["c"], times["a"]) == Spread(4.0, 4.0, 4.0)
    assert told[-1] == "round 6 of 6"


def test_interleaved_budget_and_short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)

    def call() -> None:
        nonlocal now
        now += 0.25

    times = measure.interleaved({"a": call}, rounds=100, max_seconds=1.0, min_rounds=2)
    assert len(times["a"].samples) == 5
    times = measure.interleaved({"a": call}, rounds=100, max_seconds=0.1, min_rounds=3)
    assert len(times["a"].samples) == 3
    before = now
    times = measure.interleaved({"a": call}, rounds=1, warmup=1, sample_seconds=1.0)
    assert now - before == 0.25 + 1.0 and times["a"].samples == (0.25,)


def test_interleaved_arguments() -> None:
    with pytest.raises(ValueError, match="candidates must not be empty"):
        measure.interleaved({})
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure.interleaved({"a": lambda: None}, rounds=0)


def test_percentiles() -> None:
    assert Spread.of([float(i) for i in range(11)]) == Spread(2.0, 5.0, 8.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="must not be empty"):
        Spread.of([])


def test_speed_up_is_paired_by_round() -> None:
    """A machine that halves its speed for some rounds changes times, not ratios."""
    baseline = Timing((2.0, 2.0, 4.0, 4.0, 4.0))
    candidate = Timing((1.0, 1.0, 2.0, 2.0, 2.0))
    assert measure.speed_up(baseline, candidate) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError):
        measure.speed_up(baseline, Timing((1.0,)))


def test_peak_allocated_bytes_of_known_tensors() -> None:
    size = 1 << 20
    before = torch.ones(4 * size, dtype=torch.uint8)
    held: list[torch.Tensor] = []

    def call() -> None:
        a = torch.empty(2 * size, dtype=torch.uint8)
        b = torch.empty(size, dtype=torch.uint8)
        del a
        c = torch.empty(size // 2, dtype=torch.uint8)
        del b, c

    assert measure.peak_allocated_bytes(call) == 3 * size
    # What existed before counts neither when it is read nor when it is released.
    held.append(before)
    del before

    def release_and_allocate() -> None:
        held.clear()
        torch.empty(size, dtype=torch.uint8)

    assert measure.peak_allocated_bytes(release_and_allocate, warmup=0) == size


def test_peak_of_events_ignores_foreign_releases() -> None:
    events = [(1, 100), (9, -500), (2, 50), (1, -100), (3, 120), (3, -120)]
    assert measure._peak_of_events(iter(events)) == 170


def test_peak_resident_bytes_sees_what_torch_does_not_allocate() -> None:
    size = 64 << 20
    grown = measure.peak_resident_bytes(lambda: bytearray(b"x") * size)
    if grown is None:
        pytest.skip("no resettable high-water mark on this system")
    assert 0.9 * size < grown < 1.5 * size
    assert measure.peak_allocated_bytes(lambda: bytearray(b"x") * size) == 0


def test_compare_outputs_with_planted_differences() -> None:
    expected = torch.arange(20.0).repeat(2, 1)
    same = measure.compare_outputs(expected, expected)
    assert same == measure.Difference(0.0, 0.0, 1.0, 1.0)

    actual = expected.clone()
    actual[0, 3] += 0.5
    found = measure.compare_outputs(actual, expected)
    assert found.max_abs == 0.5 and found.mean_abs == pytest.approx(0.5 / 40)
    assert found.top1 == found.top5 == 1.0

    actual[1, 0] = 100.0  # row 1: another winner, which pushes class 15 out of the best five
    found = measure.compare_outputs(actual, expected)
    assert found.top1 == 0.5 and found.top5 == pytest.approx(0.9)

    order = expected.clone()
    order[0, [18, 19]] = order[0, [19, 18]]
    found = measure.compare_outputs(order, expected)
    assert found.top1 == 0.5 and found.top5 == 1.0


def test_compare_outputs_special_values_and_shapes() -> None:
    x = torch.zeros(1, 3)
    for bad in (math.nan, math.inf):
        actual = x.clone()
        actual[0, 1] = bad
        assert measure.compare_outputs(actual, x).max_abs == math.inf
    assert measure.compare_outputs(x.bfloat16(), x).max_abs == 0.0
    for shape in ((3,), (1, 4), (2, 3)):
        with pytest.raises(ValueError, match=r"same shape \[B, classes\]"):
            measure.compare_outputs(torch.zeros(shape), x)


def test_pinned_threads() -> None:
    before = torch.get_num_threads()
    with measure.pinned_threads(1) as count:
        assert count == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with measure.pinned_threads(None) as count:
        assert count == before
    with (
        pytest.raises(ValueError, match="count must be at least 1, got 0"),
        measure.pinned_threads(0),
    ):
        pass


def test_machine_info() -> None:
    info = measure.machine_info()
    assert info["torch"] == torch.__version__ and info["threads"] == torch.get_num_threads()
    assert info["isa"] in info["isa_levels"] and info["cpu"]
