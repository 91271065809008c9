# SPDX-License-Identifier: Apache-2.0
"""Writes `bench/results/README.md`: tables of every JSON file in that folder.

python bench/report.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastbb._console import markdown_table
from fastbb.bench.tables import format_results
from fastbb.demo.tables import EXPLANATION, candidate_table, kind_table
from results_file import FOLDER

INTRODUCTION = """\
# Measured results

Made by `python bench/report.py` from the JSON files of this folder, which
`python bench/bench_window_attention.py` and `python bench/bench_models.py` write. All candidates of
one table row (layers) or one table (models) ran in turns in one process; times are medians, and
ratios are medians of the ratios of equal rounds. Ratios carry over to similar machines, absolute
times do not.
"""

LAYERS = """\
Attention without its linear layers, from map to map; peers do the roll, padding and partition of
the layer's input, as their libraries do before the projection, and start from windowed q, k, v.
`x NAME`: how many times faster fastbb is than NAME. `% FLOP`, `% BW`: fastbb's share of the peaks
measured in the same run; operations of the matrix products and compulsory memory traffic only.
`MB`: what torch's allocator held at most during one call.
"""


def report(path: Path) -> str:
    """Markdown of one machine's file."""
    results = json.loads(path.read_text())
    parts = []
    for section, show in (("models", _models), ("window_attention", _layers)):
        if section in results:
            content = results[section]
            parts.append(f"{_machine(content)}\n\n{show(content)}")
    return f"## {path.stem}\n\n" + "\n\n".join(parts)


def _machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    where = (
        f"{machine['threads']} threads of {machine['cpus']} CPUs ({machine['cpu']}), "
        f"level {machine['isa']}"
    )
    if "cuda" in content:
        where = f"{content['roofline']['device']}, driver {content['cuda']['driver']}"
    return (
        f"Measured {machine['date'][:10]} with fastbb {machine['fastbb']['version']}, "
        f"torch {machine['torch']}, {where}."
    )


def _models(content: dict[str, Any]) -> str:
    parts = ["### Whole models", EXPLANATION.replace("\n", " ")]
    for name, result in content["models"].items():
        parts += [f"#### {name}", candidate_table(result, markdown_table)]
        parts.append(kind_table(result, markdown_table))
    return "\n\n".join(parts)


def _layers(content: dict[str, Any]) -> str:
    return f"### Attention layers\n\n{LAYERS}\n{format_results(content, markdown_table)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON files")
    folder = parser.parse_args(argv).results
    files = sorted(folder.glob("*.json"))
    if not files:
        print(f"report: no JSON files in {folder}; run the benchmarks first", file=sys.stderr)
        return 2
    target = folder / "README.md"
    target.write_text("\n".join([INTRODUCTION, *(report(path) + "\n" for path in files)]))
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
