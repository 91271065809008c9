# SPDX-License-Identifier: Apache-2.0
"""Tables made from the results of `bench.window_attention.run`, for terminals and Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from fastbb._console import text_table
from fastbb.bench.shapes import AttentionShape
from fastbb.bench.window_attention import OURS

HEADER = (
    "layer (count)",
    "Nq x Nk",
    "eager ms",
    "compile ms",
    "SDPA ms",
    "fastbb ms",
    "x eager",
    "x compile",
    "x SDPA",
    "GFLOP/s",
    "% FLOP",
    "% BW",
    "MB eager",
    "MB fastbb",
)


def table_cells(row: dict[str, Any]) -> list[str]:
    """Cells of `HEADER` for one row of `run`."""
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
        *(ms(name) for name in ("eager", "torch.compile", "sdpa", OURS)),
        *(ratio(name) for name in ("eager", "torch.compile", "sdpa")),
        f"{ours['flops_per_second'] / 1e9:.1f}",
        f"{ours['share_of_peak_flops'] * 100:.0f}",
        f"{ours['share_of_peak_bandwidth'] * 100:.0f}",
        f"{eager['peak_bytes'] / 2**20:.2f}",
        f"{ours['peak_bytes'] / 2**20:.2f}",
    ]


def _queries_keys(shape: dict[str, Any]) -> tuple[int, int]:
    fields = {f.name: shape[f.name] for f in dataclasses.fields(AttentionShape)}
    return AttentionShape(**fields).queries_keys


def model_totals(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
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
        others = [total(name) for name in ("eager", "torch.compile", "sdpa")]
        lines.append(
            [
                f"{model}, batch {batch}, {dtype}, {mode}",
                *("-" if t is None else f"{t * 1e3:.2f}" for t in (*others, ours)),
                *("-" if t is None else f"{t / ours:.2f}" for t in others),
            ]
        )
    return lines


TOTALS_HEADER = (
    "sum of the layers times their counts",
    "eager ms",
    "compile ms",
    "SDPA ms",
    "fastbb ms",
    "x eager",
    "x compile",
    "x SDPA",
)


def format_results(
    results: dict[str, Any],
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str] = text_table,
) -> str:
    """The text that `fastbb bench` prints; with `table=markdown_table`, Markdown."""
    peak = results["roofline"]
    parts = [
        f"Peaks on {peak['threads']} threads: fp32 {peak['fp32_flops'] / 1e9:.0f} GFLOP/s, "
        f"bf16 {peak['bf16_flops'] / 1e9:.0f} GFLOP/s, copy {peak['copy_bytes'] / 1e9:.1f} GB/s."
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["mode"], row["batch"], row["dtype"]), []).append(row)
    for (mode, batch, dtype), rows in groups.items():
        parts.append(f"{mode}, batch {batch}, {dtype}:")
        parts.append(table(HEADER, [table_cells(row) for row in rows]))
    parts.append(table(TOTALS_HEADER, model_totals(results["rows"])))
    return "\n\n".join(parts)
