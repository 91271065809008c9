# SPDX-License-Identifier: Apache-2.0
"""Linear layers of BERT-base and MiniLM: binary against float32, bfloat16 and int8.

    python bench/bench_binary_linear.py                 # interleaved ratios, saved: ten minutes
    python -m pytest bench/bench_binary_linear.py -k "attention and 128"

The first form times all candidates of a layer in turns and replaces the section `binary_linear` of
this machine's file in `bench/results/`; `python bench/report.py` makes tables of it. The second is
for pytest-benchmark's comparisons over time. Both compare outputs before they time anything.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbb._console import Progress, text_table
from fastbb.bench.binary_linear import (
    CORE,
    OURS,
    PEERS,
    ROWS,
    SHAPES,
    LinearShape,
    bit_peak,
    candidates,
    run,
    table,
    verify,
)
from fastbb.cli import positive, positive_numbers, run_command
from results_file import FOLDER, save_section


@pytest.mark.parametrize("name", (*PEERS, CORE, OURS))
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_speed(benchmark: Any, shape: LinearShape, rows: int, name: str) -> None:
    with torch.inference_mode():
        calls = candidates(shape, rows)
        difference = verify(shape, calls)
        benchmark.group = f"{shape.name}, {rows} rows"
        benchmark(calls[name])
    if benchmark.disabled:
        return
    products = rows * shape.k * shape.n / benchmark.stats.stats.median
    benchmark.extra_info["multiplications per second"] = products
    benchmark.extra_info["max difference"] = difference
    if name in (OURS, CORE):
        benchmark.extra_info["share of the instruction limit"] = products / bit_peak()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=positive_numbers, default=ROWS, help="comma-separated M")
    parser.add_argument("--rounds", type=positive, default=25, help="samples per candidate")
    parser.add_argument("--threads", type=positive, help="of torch; default: torch's own choice")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON file")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, progress: Progress) -> None:
    results = run(args.rows, progress, args.rounds)
    progress.close()
    print(text_table(*table(results)))
    print(f"\nsaved in {save_section('binary_linear', results, args.results)}")


def main(argv: list[str] | None = None) -> int:
    return run_command("bench_binary_linear", measure, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
