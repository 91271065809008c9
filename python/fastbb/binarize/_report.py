# SPDX-License-Identifier: Apache-2.0
"""What `binarize_` did to a model, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Row = tuple[str, str, str]


@dataclass
class BinarizeReport:
    """Result of `fastbb.binarize_`. Paths are those of `model.named_modules()`."""

    model: str
    """Class name of the model."""
    converted: list[Row] = field(default_factory=list)
    """(module path, class name, what it became)"""
    skipped: list[Row] = field(default_factory=list)
    """(module path, class name, reason), of linear layers, embeddings and attention left alone"""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, ready for `json.dumps`."""
        return plain(self)

    def __str__(self) -> str:
        head = f"{self.model}: {len(self.converted)} modules binary, {len(self.skipped)} skipped"
        return table(head, [("binary", self.converted), ("skipped", self.skipped)])


def plain(report: Any) -> dict[str, Any]:
    """A report's fields, rows as lists."""
    return {
        key: [list(row) for row in value] if isinstance(value, list) else value
        for key, value in asdict(report).items()
    }


def table(head: str, groups: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """A line, and below it the rows of each group in columns."""
    rows = [(state, row[0] or "(model)", *row[1:]) for state, group in groups for row in group]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [head]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join(["", *cells, row[3]]).rstrip())
    return "\n".join(lines)
