# SPDX-License-Identifier: Apache-2.0
"""Tables made from the results of `bench.window_attention.run`, for terminals and Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fastbb._console import text_table
from fastbb.bench.shapes import AttentionShape
from fastbb.bench.window_attention import OURS

PEERS = {"eager": "eager", "torch.compile": "compile", "sdpa": "SDPA"}
"""Candidate -> its name in the heading; these have columns in every table."""

FURTHER_PEERS = {
    "sdpa flash": "flash",
    "sdpa efficient": "efficient",
    "sdpa cudnn": "cuDNN",
    "sdpa math": "math",
    "flex": "Flex",
    "xformers": "xFormers",
}
"""Those that have columns where they were timed."""


def shown_peers(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Candidate -> name in the heading, of the peers that a table of these rows shows."""
    timed = {name for row in rows for name in row["candidates"]}
    return PEERS | {name: title for name, title in FURTHER_PEERS.items() if name in timed}


def table_header(shown: dict[str, str]) -> list[str]:
    """Headings of a table of layers."""
    return [
        "layer (count)",
        "Nq x Nk",
        *_time_headings(shown),
        "GFLOP/s",
        "% FLOP",
        "% BW",
        "MB eager",
        "MB fastbb",
    ]


def _time_headings(shown: dict[str, str]) -> list[str]:
    return [*(f"{x} ms" for x in (*shown.values(), OURS)), *(f"x {x}" for x in shown.values())]


def table_cells(row: dict[str, Any], shown: dict[str, str]) -> list[str]:
    """Cells of `table_header` for one row of `run`."""
    shape, by_name = row["shape"], row["candidates"]
    ours, eager = by_name[OURS], by_name["eager"]

    def ms(name: str) -> str:
        return f"{by_name[name]['seconds']['p50'] * 1e3:.3f}" if name in by_name else "-"

    def ratio(name: str) -> str:
        return f"{by_name[name]['fastbb_speed_up']['p50']:.2f}" if name in by_name else "-"

    nq, nk = _queries_keys(shape)
    return [
        f"{shape['name']} ({shape['count']})",
        f"{nq}x{nk}",
        *(ms(name) for name in (*shown, OURS)),
        *(ratio(name) for name in shown),
        f"{ours['flops_per_second'] / 1e9:.1f}",
        f"{ours['share_of_peak_flops'] * 100:.0f}",
        f"{ours['share_of_peak_bandwidth'] * 100:.0f}",
        f"{eager['peak_bytes'] / 2**20:.2f}",
        f"{ours['peak_bytes'] / 2**20:.2f}",
    ]


def _queries_keys(shape: dict[str, Any]) -> tuple[int, int]:
    fields = {f.name: shape[f.name] for f in dataclasses.fields(AttentionShape)}
    return AttentionShape(**fields).queries_keys


def model_totals(rows: Sequence[dict[str, Any]], shown: dict[str, str]) -> list[list[str]]:
    """All attention cores of a model in one forward: layer times multiplied by their counts."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["shape"]["model"], row["batch"], row["dtype"], row["mode"])
        groups.setdefault(key, []).append(row)
    lines = []
    for (model, batch, dtype, mode), members in groups.items():

        def total(name: str, members: list[dict[str, Any]] = members) -> float | None:
            if any(name not in row["candidates"] for row in members):
                return None
            return sum(
                row["shape"]["count"] * row["candidates"][name]["seconds"]["p50"] for row in members
            )

        ours = total(OURS)
        assert ours is not None
        others = [total(name) for name in shown]
        lines.append(
            [
                f"{model}, batch {batch}, {dtype}, {mode}",
                *("-" if t is None else f"{t * 1e3:.2f}" for t in (*others, ours)),
                *("-" if t is None else f"{t / ours:.2f}" for t in others),
            ]
        )
    return lines


TOTALS_TITLE = "sum of the layers times their counts"


def peaks_line(peak: dict[str, Any]) -> str:
    """The peaks that shares refer to."""
    if "device" in peak:
        who = f"{peak['device']} ({peak['source']})"
        half, unit = ("16-bit", peak["half_flops"]), "memory"
    else:
        who = f"{peak['threads']} threads"
        half, unit = ("bf16", peak["bf16_flops"]), "copy"
    return (
        f"Peaks on {who}: fp32 {peak['fp32_flops'] / 1e9:.0f} GFLOP/s, "
        f"{half[0]} {half[1] / 1e9:.0f} GFLOP/s, {unit} {peak['copy_bytes'] / 1e9:.1f} GB/s."
    )


def left_out_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which further peers were not timed, on which layers and why; equal reasons in one line."""
    layers: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.get("left_out", {}).items():
            layers.setdefault((name, reason), []).append(row["shape"]["name"])
    return [f"Not timed: {who} ({why}): {', '.join(x)}" for (who, why), x in layers.items()]


def format_results(
    results: dict[str, Any],
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str] = text_table,
) -> str:
    """The text that `fastbb bench` prints; with `table=markdown_table`, Markdown."""
    parts = [peaks_line(results["roofline"])]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["mode"], row["batch"], row["dtype"]), []).append(row)
    for (mode, batch, dtype), rows in groups.items():
        parts.append(f"{mode}, batch {batch}, {dtype}:")
        shown = shown_peers(rows)
        parts.append(table(table_header(shown), [table_cells(row, shown) for row in rows]))
        parts += left_out_lines(rows)
    shown = shown_peers(results["rows"])
    header = [TOTALS_TITLE, *_time_headings(shown)]
    parts.append(table(header, model_totals(results["rows"], shown)))
    return "\n\n".join(parts)
