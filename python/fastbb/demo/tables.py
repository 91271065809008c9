# SPDX-License-Identifier: Apache-2.0
"""Tables of `run.measure_model`'s results, for terminals and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastbb._console import text_table
from fastbb.layer_time import KINDS

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

HEADER = (
    "candidate",
    "batch",
    "ms",
    "p20-p80",
    "images/s",
    "speed-up",
    "fastbb is x",
    "peak MB",
    "max diff",
    "mean diff",
    "top-1 %",
    "top-5 %",
)

EXPLANATION = """\
speed-up: over eager fp32; fastbb is x: how many times faster uncompiled fastbb of the same dtype
is (both: median of ratios in rounds that run all candidates in turns); peak MB: what torch's
allocator holds at most during one forward, without weights and input; differences: of logits to
eager fp32; top-1, top-5: agreement with eager fp32."""


def candidate_table(result: dict[str, Any], table: Table = text_table) -> str:
    """One line per candidate and batch size, and why candidates are missing."""
    rows = [
        [
            row["candidate"],
            str(row["batch"]),
            f"{row['seconds']['p50'] * 1e3:.1f}",
            f"{row['seconds']['p20'] * 1e3:.1f}-{row['seconds']['p80'] * 1e3:.1f}",
            f"{row['images_per_second']:.1f}",
            f"{row['speed_up_over_eager']['p50']:.2f}",
            f"{row['fastbb_speed_up']['p50']:.2f}",
            f"{row['peak_allocated_bytes'] / 2**20:.1f}",
            f"{row['difference']['max_abs']:.1e}",
            f"{row['difference']['mean_abs']:.1e}",
            f"{row['difference']['top1'] * 100:.0f}",
            f"{row['difference']['top5'] * 100:.0f}",
        ]
        for row in result["rows"]
    ]
    missing = [f"{name} is missing: {reason}" for name, reason in result["failures"].items()]
    return "\n\n".join([table(HEADER, rows), *missing])


def kind_table(result: dict[str, Any], table: Table = text_table) -> str:
    """Milliseconds by kind of layer, one table for all batch sizes."""
    rows = []
    names = list(result["layer_times"][0]["candidates"])
    for entry in result["layer_times"]:
        for kind in (*KINDS, "sum"):
            cells = [_milliseconds(entry["candidates"][name], kind) for name in names]
            rows.append([kind, str(entry["batch"]), *(f"{ms:.1f}" for ms in cells)])
    return table(("ms by kind of layer", "batch", *names), rows)


def _milliseconds(layers: list[dict[str, Any]], kind: str) -> float:
    return 1e3 * sum(row["seconds"] for row in layers if kind in (row["kind"], "sum"))
