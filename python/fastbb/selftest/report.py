# SPDX-License-Identifier: Apache-2.0
"""The self-test's report: what a reader must know about the machine, and all results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastbb._console import text_table
from fastbb.selftest.run import Row

HEADER = ("operator", "type", "on", "cases", "worst", "failed", "note")
LISTED_FAILURES = 5


def format_report(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """Facts of the machine, one line per row, then the first failures of every row."""
    parts = ["fastbb selftest", "\n".join(f"  {name}: {_fact(x)}" for name, x in machine.items())]
    parts.append(text_table(HEADER, [_cells(row) for row in rows]))
    parts += [_failures(row) for row in rows if row.failures]
    parts.append(summary(rows))
    parts.append(
        "worst: largest error of a case as a share of its bound. Every case ran more than once and "
        "must give the same bits."
    )
    return "\n\n".join(parts)


def summary(rows: Sequence[Row]) -> str:
    """One line: how many cases ran and failed."""
    cases, failed = sum(row.cases for row in rows), failures(rows)
    notes = sum(1 for row in rows if row.note)
    text = f"{cases} cases, {failed} failed" if failed else f"{cases} cases, all passed"
    return f"{text}; {notes} of {len(rows)} lines ran in part or not at all" if notes else text


def failures(rows: Sequence[Row]) -> int:
    """Number of failed cases."""
    return sum(len(row.failures) for row in rows)


def to_dict(rows: Sequence[Row], machine: Mapping[str, Any]) -> dict[str, Any]:
    """The same for `json.dumps`; an infinite error, which JSON does not have, is null."""
    plain = [dataclasses.asdict(row) for row in rows]
    for row in plain:
        row["worst"] = row["worst"] if math.isfinite(row["worst"]) else None
    return {"machine": dict(machine), "rows": plain}


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(x)}" for name, x in value.items())
    return ", ".join(map(_fact, value)) if isinstance(value, (list, tuple)) else str(value)


def _cells(row: Row) -> list[str]:
    worst = f"{row.worst:.2f} ({row.worst_case})" if row.worst_case else "-"
    counts = [str(row.cases), worst, str(len(row.failures))] if row.cases else ["-"] * 3
    return [row.op, row.kind, row.target, *counts, row.note]


def _failures(row: Row) -> str:
    lines = [f"FAILED {row.op}, {row.kind}, {row.target}:"]
    lines += [f"  {case}: {message}" for case, message in row.failures[:LISTED_FAILURES]]
    rest = [case for case, _ in row.failures[LISTED_FAILURES:]]
    return "\n".join([*lines, f"  and {', '.join(rest)}"] if rest else lines)
