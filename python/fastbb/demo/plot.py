# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: seconds by kind and stage of layer, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastbb._console import require
from fastbb.layer_time import KINDS


def plot_layer_times(result: dict[str, Any], title: str, path: Path) -> None:
    """Writes a PNG of `result["layer_times"]` (see `run.measure_model`): one row per batch size.

    Left: time by kind of layer. Right: time by stage, stacked by kind, one bar per candidate.

    Raises: UsageError when matplotlib is missing.
    """
    require("matplotlib", "plotting").use("Agg")
    pyplot = require("matplotlib.pyplot", "plotting")
    batches = result["layer_times"]
    figure, axes = pyplot.subplots(
        len(batches), 2, figsize=(13, 4.2 * len(batches)), squeeze=False, layout="constrained"
    )
    colours = dict(zip(KINDS, pyplot.get_cmap("tab10").colors, strict=False))
    for (left, right), entry in zip(axes, batches, strict=True):
        _plot_kinds(left, entry)
        _plot_stages(right, entry, colours)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_kinds(axis: Any, entry: dict[str, Any]) -> None:
    names = list(entry["candidates"])
    shades = ("#c7c7c7", "#8c8c8c", "#7fb8e6", "#1f5f99")
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        totals = [_milliseconds(entry, name, kind=kind) for kind in KINDS]
        rows = [k + (index - (len(names) - 1) / 2) * height for k in range(len(KINDS))]
        label = f"{name} ({sum(totals):.0f} ms)"
        axis.barh(rows, totals, height, color=shades[index % len(shades)], label=label)
    axis.set_yticks(range(len(KINDS)), KINDS)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    axis.set_title(f"by kind of layer, batch {entry['batch']}")
    axis.legend()


def _plot_stages(axis: Any, entry: dict[str, Any], colours: dict[str, Any]) -> None:
    names = list(entry["candidates"])
    stages = sorted({row["stage"] for row in entry["candidates"][names[0]]}, key=_stage_order)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [s + (index - (len(names) - 1) / 2) * width for s in range(len(stages))]
        bottoms = [0.0] * len(stages)
        for kind in KINDS:
            heights = [_milliseconds(entry, name, kind=kind, stage=stage) for stage in stages]
            label = kind if index == 0 else None
            axis.bar(places, heights, width * 0.9, bottoms, color=colours[kind], label=label)
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axis.set_xticks(range(len(stages)), stages)
    axis.set_ylabel("milliseconds")
    axis.set_title(f"by stage, batch {entry['batch']}; bars: {', '.join(names)}", fontsize=9)
    axis.legend(fontsize=8)


def _stage_order(stage: str) -> tuple[int, str]:
    return ({"stem": 0, "head": 2}.get(stage, 1), stage)


def _milliseconds(entry: dict[str, Any], name: str, kind: str, stage: str | None = None) -> float:
    rows = entry["candidates"][name]
    return 1e3 * sum(
        row["seconds"]
        for row in rows
        if row["kind"] == kind and (stage is None or row["stage"] == stage)
    )
