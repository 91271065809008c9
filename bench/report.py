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
from fastbb.bench import binary_linear, binary_models
from fastbb.bench.tables import format_results
from fastbb.demo.tables import EXPLANATION, candidate_table, kind_table
from results_file import FOLDER

INTRODUCTION = """\
# Measured results

Made by `python bench/report.py` from the JSON files of this folder, which
`python bench/bench_window_attention.py`, `bench_models.py`, `bench_binary_linear.py` and
`bench_binary_models.py` write. All candidates of one table row (layers) or one table (models) ran
in turns in one process; times are medians, and ratios are medians of the ratios of equal rounds.
Ratios carry over to similar machines, absolute times do not.
"""

LAYERS = """\
Attention without its linear layers, from map to map; peers do the roll, padding and partition of
the layer's input, as their libraries do before the projection, and start from windowed q, k, v.
`x NAME`: how many times faster fastbb is than NAME. `% FLOP`, `% BW`: fastbb's share of the peaks
measured in the same run; operations of the matrix products and compulsory memory traffic only.
`MB`: what torch's allocator held at most during one call.
"""

BINARY_LINEAR = """\
Linear layers from float activations to float results, one call; binarizing or quantizing the
activations is part of it, but for `int8 product`: the product of int8 matrices alone. `bf16` starts
from bfloat16. `simulated`: sign of the input in float32, times a float32 weight of signs. `x NAME`:
how many times faster fastbb is than NAME. `% limit`: of AND, count and add on registers alone,
measured with the same instructions in the same run; `packed`: from inputs that are bits already.
"""

BINARY_MODELS = """\
Encoders from token ids to the last hidden state. `latent weights`: the form that is trained.
`x NAME`: how many times faster the packed form is than NAME. `x linear weights`: how many times
smaller the weights of binary layers are than in float32; files hold everything.
"""

TRAINING = """\
Kept for the backward pass of one training step, without parameters: the float encoder, the binary
one by its definitions in plain PyTorch, and by fastbb's kernels.
"""


def report(path: Path) -> str:
    """Markdown of one machine's file."""
    results = json.loads(path.read_text())
    parts = []
    sections = {
        "models": _models,
        "window_attention": _layers,
        "binary_models": _binary_models,
        "binary_linear": _binary_linear,
    }
    for section, show in sections.items():
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


def _binary_linear(content: dict[str, Any]) -> str:
    table = markdown_table(*binary_linear.table(content))
    return f"### Binary linear layers\n\n{BINARY_LINEAR}\n{table}"


def _binary_models(content: dict[str, Any]) -> str:
    encoders = markdown_table(*binary_models.table(content))
    training = markdown_table(*binary_models.training_table(content))
    return f"### Binary encoders\n\n{BINARY_MODELS}\n{encoders}\n\n{TRAINING}\n{training}"


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
