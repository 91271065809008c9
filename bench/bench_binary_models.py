# SPDX-License-Identifier: Apache-2.0
"""Binary BERT encoders end to end: latency, bytes on disk, bytes kept in training.

    python bench/bench_binary_models.py         # BERT-base and MiniLM, batch 1 and 8: ten minutes

Packed outputs are compared with those of latent weights before anything is timed; all candidates of
a row run in turns. The results replace the section `binary_models` of this machine's file in
`bench/results/`; `python bench/report.py` makes tables of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastbb._console import Progress, text_table
from fastbb.bench.binary_models import SHAPES, run, table, training_table
from fastbb.cli import positive, positive_numbers, run_command, words
from results_file import FOLDER, save_section


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = tuple(shape.name for shape in SHAPES)
    parser.add_argument("--models", type=words, default=names, help="comma-separated names")
    parser.add_argument("--batch", type=positive_numbers, default=(1, 8), help="comma-separated")
    parser.add_argument("--tokens", type=positive, default=128, help="of a sequence")
    parser.add_argument("--rounds", type=positive, default=15, help="samples per candidate")
    parser.add_argument("--threads", type=positive, help="of torch; default: torch's own choice")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON file")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, progress: Progress) -> None:
    shapes = [shape for shape in SHAPES if shape.name in args.models]
    results = run(progress, args.rounds, shapes, args.batch, args.tokens)
    progress.close()
    print(text_table(*table(results)))
    print(text_table(*training_table(results)))
    print(f"\nsaved in {save_section('binary_models', results, args.results)}")


def main(argv: list[str] | None = None) -> int:
    return run_command("bench_binary_models", measure, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
