# SPDX-License-Identifier: Apache-2.0
"""What `accelerate_` did to a model, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """Result of `fastbb.accelerate_`. Paths are those of `model.named_modules()`."""

    model: str
    """Class name of the model."""
    swapped: list[tuple[str, str, str]] = field(default_factory=list)
    """(module path, original class name, what was fused)"""
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    """(module path, class name, reason), of modules that look like a supported one"""
    already: list[tuple[str, str]] = field(default_factory=list)
    """(module path, original class name), of modules that an earlier call swapped"""
    dtype: str | None = None
    """Name of the requested dtype, e.g. `"torch.bfloat16"`; None when dtypes were kept."""
    converted: int = 0
    """Number of parameters and buffers that were converted to `dtype`."""

    @property
    def complete(self) -> bool:
        """True when there is attention to accelerate and all of it is accelerated now."""
        return bool(self.swapped or self.already) and not self.skipped

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for `json.dumps`."""
        return {k: _plain(v) for k, v in asdict(self).items()}

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.swapped)} modules swapped, {len(self.skipped)} skipped"
            + (f", {len(self.already)} swapped before" if self.already else "")
        ]
        if not (self.swapped or self.skipped or self.already):
            lines.append("  nothing to accelerate: no module of a supported class")
        if self.dtype is not None:
            lines.append(f"  {self.converted} parameters and buffers converted to {self.dtype}")
        rows = [("swapped", *row) for row in self.swapped]
        rows += [("skipped", *row) for row in self.skipped]
        rows += [("before", *row, "") for row in self.already]
        rows = [(state, path or "(model)", name, text) for state, path, name, text in rows]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join(["", *cells, row[3]]).rstrip())
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    return [list(row) for row in value] if isinstance(value, list) else value
