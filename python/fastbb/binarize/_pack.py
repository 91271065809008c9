# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are packed, decided before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastbb.accelerate._changes import Change
from fastbb.binarize._report import Row, plain, table
from fastbb.binarize._sizes import model_sizes
from fastbb.nn.binary_linear import BinaryLinear, PackedModule
from fastbb.nn.binary_pack import BinaryEmbedding


@dataclass
class PackReport:
    """Result of `fastbb.pack_`. Paths are those of `model.named_modules()`."""

    model: str
    """Class name of the model."""
    bytes_before: int
    """Bytes of parameters and buffers, as `state_dict` stores them."""
    bytes_after: int = 0
    packed: list[Row] = field(default_factory=list)
    """(module path, class name, bytes before and after)"""
    skipped: list[Row] = field(default_factory=list)
    """(module path, class name, reason)"""
    frozen: int = 0
    """Number of parameters that stopped requiring gradients."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for `json.dumps`."""
        return plain(self)

    def __str__(self) -> str:
        ratio = self.bytes_before / max(self.bytes_after, 1)
        head = (
            f"{self.model}: {len(self.packed)} modules packed, {len(self.skipped)} skipped; "
            f"{self.bytes_before:,} bytes became {self.bytes_after:,}, {ratio:.1f} times less"
        )
        return table(head, [("packed", self.packed), ("skipped", self.skipped)])


def plan_pack(model: nn.Module) -> tuple[list[Change], PackReport]:
    """Changes that pack all binary modules inside `model`."""
    if isinstance(model, (BinaryLinear, BinaryEmbedding)):
        raise TypeError(
            f"pack_: model must contain binary modules, got a single {type(model).__name__}; "
            f"use its to_packed()"
        )
    sizes = model_sizes(model)
    report = PackReport(type(model).__qualname__, sizes.total)
    binary = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (BinaryLinear, BinaryEmbedding))
    }
    if not binary:
        found = any(isinstance(module, PackedModule) for module in model.modules())
        raise ValueError(
            f"pack_: model must contain binary modules, got {report.model} "
            f"{'that is packed already' if found else 'without any; call fastbb.binarize_ first'}"
        )
    made: dict[int, nn.Module] = {}
    freed = 0
    for path, module in binary.items():
        sharing = _sharing(model, module)
        if sharing is not None:
            reason = f"{sharing} shares its weight, which would have to be kept"
            report.skipped.append((path, type(module).__qualname__, reason))
            continue
        packed = module.to_packed()
        before, after = _state_bytes(module), _state_bytes(packed)
        freed += before - after
        row = (path, type(module).__qualname__, f"{before:,} -> {after:,} bytes")
        report.packed.append(row)
        made[id(module)] = packed
    changes = [
        Change(parent, name, child, made[id(child)])
        for parent in model.modules()
        for name, child in parent.named_children()
        if id(child) in made
    ]
    replaced = {id(p) for path, m in binary.items() if id(m) in made for p in m.parameters()}
    left = [p for p in model.parameters() if p.requires_grad and id(p) not in replaced]
    changes += [Change(p, "requires_grad", True, False) for p in left]
    report.frozen = len(left)
    report.bytes_after = report.bytes_before - freed
    return changes, report


def _state_bytes(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in module.state_dict().values())


def _sharing(model: nn.Module, module: nn.Module) -> str | None:
    """Path of another module that has the weight of this one."""
    weight = module.weight
    for path, other in model.named_modules():
        if other is not module and any(p is weight for p in other._parameters.values()):
            return path or "(model)"
    return None
