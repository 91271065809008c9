# SPDX-License-Identifier: Apache-2.0
"""The attention core of GC ViT, Swin and PVT v2 layers: fastbb and its peers.

    python bench/bench_window_attention.py                 # interleaved ratios, saved: half an hour
    python -m pytest bench/bench_window_attention.py -k "gcvit_tiny and not compile"

The first form times the candidates of a layer in turns, which makes ratios that a busy machine
cannot bend, and replaces the section `window_attention` of this machine's file in
`bench/results/`; `python bench/report.py` makes tables of it. It takes the arguments of `fastbb
bench`. The second form is for pytest-benchmark's comparisons over time: one candidate after the
other. Both compare outputs and gradients before they time anything.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbb._console import Progress
from fastbb.bench import peers
from fastbb.bench.roofline import measure_roofline
from fastbb.bench.shapes import AttentionShape, attention_shapes
from fastbb.bench.tables import format_results
from fastbb.bench.window_attention import (
    MODES,
    OURS,
    forward_candidates,
    training_candidates,
    verify,
)
from fastbb.cli import add_bench_arguments, run_bench, run_command
from fastbb.measure import peak_allocated_bytes
from results_file import FOLDER, save_section

CANDIDATES = ("eager", "sdpa", "torch.compile", OURS)
BATCH = 1


@functools.cache
def shapes_by_name() -> dict[str, AttentionShape]:
    return {shape.name: shape for shape in attention_shapes()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        shapes = shapes_by_name()
        metafunc.parametrize("shape", list(shapes.values()), ids=list(shapes))


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("mode", MODES)
def test_speed(benchmark: Any, shape: AttentionShape, mode: str, candidate: str) -> None:
    backward = mode == "forward+backward"
    inputs = peers.make_inputs(shape, BATCH)
    make = training_candidates if backward else forward_candidates
    torch.compiler.reset()
    with torch.inference_mode(not backward):
        calls = make(shape, inputs, compile=candidate == "torch.compile")
        compared = {name: calls[name]() for name in {"eager", OURS, candidate}}
        differences = verify(shape, torch.float32, inputs, compared)
        peak = peak_allocated_bytes(calls[candidate])
        benchmark.group = f"{shape.name}, {mode}"
        benchmark(calls[candidate])
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median
    flops, traffic = shape.flops(BATCH, backward), shape.bytes_moved(BATCH, 4, backward)
    roofline = measure_roofline()
    benchmark.extra_info.update(
        {
            "GFLOP/s": flops / seconds / 1e9,
            "share of peak FLOP/s": flops / seconds / roofline.fp32_flops,
            "share of peak bandwidth": traffic / seconds / roofline.copy_bytes,
            "peak bytes": peak,
            "bytes of all scores": shape.score_elements(BATCH) * 4,
            "max difference": differences[candidate],
        }
    )


def test_memory(shape: AttentionShape) -> None:
    """Beyond its result and one float per query and head (kept for backward), the op allocates at
    most one bias matrix per head, with rows of whole vectors. Eager has one of scores per window.
    """
    batch = 4
    inputs = peers.make_inputs(shape, batch)
    with torch.inference_mode():
        calls = forward_candidates(shape, inputs, compile=False)
        result = calls[OURS]()
        peaks = {name: peak_allocated_bytes(call) for name, call in calls.items()}
    nq, nk = shape.queries_keys
    scores = shape.score_elements(batch) * 4
    table = 0 if inputs.table is None else inputs.table.nbytes
    bias = 0 if inputs.table is None else shape.heads * nq * (nk + 32) * 4
    slack = 4096
    assert peaks[OURS] <= result.nbytes + scores // nk + bias + table + slack
    assert peaks["eager"] >= result.nbytes + scores


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_bench_arguments(parser)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON file")
    parser.set_defaults(modes=MODES, dtypes=("fp32", "bf16"))
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, progress: Progress) -> None:
    results = run_bench(args, progress)
    print(format_results(results))
    print(f"\nsaved in {save_section('window_attention', results, args.results)}")


def main(argv: list[str] | None = None) -> int:
    return run_command("bench_window_attention", measure, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
