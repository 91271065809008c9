# SPDX-License-Identifier: Apache-2.0
"""Whole models on photographs: eager, torch.compile and fastbb in float32 and bfloat16.

    python bench/bench_models.py            # gcvit_tiny and swin_tiny, batch 1 and 8: half an hour
    python bench/bench_models.py --models pvt_v2_b2 --batch 1 --no-compile

Outputs are compared first; all candidates of a model are timed in turns. The results, with the
time by kind of layer, replace the section `models` of this machine's file in `bench/results/`;
`python bench/report.py` makes tables of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from fastbb._console import Progress
from fastbb.cli import add_common_arguments, positive, run_command, words
from fastbb.demo.photos import load_photos
from fastbb.demo.run import Options, measure_model
from fastbb.demo.source import load_source
from fastbb.demo.tables import candidate_table, kind_table
from results_file import FOLDER, save_section

MODELS = ("gcvit_tiny", "swin_tiny_patch4_window7_224")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", type=words, default=MODELS, help="comma-separated names")
    parser.add_argument("--rounds", type=positive, default=20, help="samples per candidate")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON file")
    add_common_arguments(parser)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, progress: Progress) -> None:
    options = Options(
        batches=args.batch, rounds=args.rounds, compile=not args.no_compile, compile_bf16=True
    )
    results: dict[str, Any] = {}
    for name in args.models:
        progress.step(f"model {name}")
        # torch stops compiling after a number of models and shapes unless it is told to start over.
        torch.compiler.reset()
        source = load_source(name)
        photos = load_photos(max(args.batch))
        images = torch.stack([source.transform(image) for _, image in photos])
        results[name] = measure_model(source.module, images, options, progress)
        progress.close()
        print(f"\n{name}\n\n{candidate_table(results[name])}\n\n{kind_table(results[name])}\n")
    print(f"saved in {save_section('models', {'models': results}, args.results)}")


def main(argv: list[str] | None = None) -> int:
    return run_command("bench_models", measure, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
