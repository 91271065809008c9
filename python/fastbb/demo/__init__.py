# SPDX-License-Identifier: Apache-2.0
"""`fastbb demo`: real photographs through a library model, before and after `accelerate_`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbb._console import Progress, UsageError, require
from fastbb.demo.photos import load_photos
from fastbb.demo.plot import plot_layer_times
from fastbb.demo.run import Options, measure_model
from fastbb.demo.source import SourceModel, load_source
from fastbb.demo.tables import EXPLANATION, candidate_table, kind_table
from fastbb.measure import machine_info


@dataclass(frozen=True)
class DemoOptions:
    """What `fastbb demo` was asked for."""

    model: str = "gcvit_tiny"
    checkpoint: Path | None = None
    seed: int = 0
    out: Path = Path("fastbb-demo")
    measure: Options = field(default_factory=Options)


def run_demo(options: DemoOptions, progress: Progress) -> dict[str, Any]:
    """Runs the demo, prints its table and writes `demo.json` and `layer_times.png`.

    Returns what `demo.json` holds.

    Raises: UsageError for a request that cannot be served; `run.WrongOutput` when the
    accelerated model's float32 logits are wrong.
    """
    require("matplotlib", "plotting")
    _make_folder(options.out)
    machine = machine_info()
    print(
        f"fastbb {machine['fastbb']['version']}, torch {machine['torch']} on {machine['cpu']}: "
        f"{machine['threads']} threads, {machine['isa']}"
    )
    photos = load_photos(max(options.measure.batches))
    progress.step(f"building {options.model}")
    source = load_source(options.model, options.checkpoint, options.seed)
    print(f"model: {source.name} of {source.library}\nweights: {source.weights}")
    images = torch.stack([source.transform(image) for _, image in photos])
    names = [name for name, _ in photos]
    print(f"photographs (scikit-image): {', '.join(dict.fromkeys(names))}; {list(images.shape)}")

    result = measure_model(source.module, images, options.measure, progress)
    result = {
        "model": source.name,
        "library": source.library,
        "weights": source.weights,
        "photographs": names,
        "machine": machine,
        **result,
    }
    picture = options.out / "layer_times.png"
    progress.step(f"writing {options.out}")
    title = f"{source.name} on {machine['cpu']}, {machine['threads']} threads"
    plot_layer_times(result, title, picture)
    (options.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    progress.close()

    print(f"\n{candidate_table(result)}\n\n{EXPLANATION}\n\n{kind_table(result)}\n")
    _print_predictions(source, result, names)
    print(f"layer times: {picture}\nall numbers: {options.out / 'demo.json'}")
    return result


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out must be a folder to write to, got {str(path)!r}") from error


def _print_predictions(source: SourceModel, result: dict[str, Any], names: list[str]) -> None:
    if result["logit_spread"] is not None:
        print(f"one class's logit varies by {result['logit_spread']:.3f} (std) between photographs")
    if not source.trained:
        return
    labels = require("timm.data", "naming the classes").ImageNetInfo()
    if result["classes"] == labels.num_classes():
        found = dict(zip(names, result["top1"], strict=True))
        for name, index in found.items():
            print(f"{name}: {labels.index_to_description(index)}")
