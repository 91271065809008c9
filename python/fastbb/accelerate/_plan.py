# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model change class, decided before anything is changed."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from fastbb.accelerate._changes import Change
from fastbb.accelerate._report import Report
from fastbb.accelerate._rule import Rule

FAMILIES = {
    "timm.models.gcvit": "fastbb.accelerate.timm_gcvit",
    "timm.models.swin_transformer": "fastbb.accelerate.timm_swin",
    "timm.models.swin_transformer_v2": "fastbb.accelerate.timm_swin_v2",
    "timm.models.pvt_v2": "fastbb.accelerate.timm_pvt_v2",
    "torchvision.models.swin_transformer": "fastbb.accelerate.torchvision_swin",
}
"""Module that defines the source classes -> module with their `RULES`."""


def rules_for(model: nn.Module) -> list[Rule]:
    """Rules of the families that some module's class, or a base of it, belongs to.

    Libraries that the model does not use are never imported.
    """
    classes = {type(module) for module in model.modules()}
    sources = {base.__module__ for cls in classes for base in cls.__mro__}
    return [
        rule
        for source, family in FAMILIES.items()
        if source in sources
        for rule in importlib.import_module(family).RULES
    ]


def plan_swaps(model: nn.Module, dtype: torch.dtype | None) -> tuple[list[Change], Report]:
    """Class changes for `model`, whose floating tensors will have `dtype` (None: as they are)."""
    rules = rules_for(model)
    by_source = {rule.source: rule for rule in rules}
    by_fast = {rule.fast: rule for rule in rules}
    changes: list[Change] = []
    report = Report(type(model).__qualname__)
    for path, module in model.named_modules():
        cls = type(module)
        if cls in by_fast:
            report.already.append((path, by_fast[cls].source.__qualname__))
        elif cls in by_source:
            rule = by_source[cls]
            reasons = rule.reasons(module, dtype)
            if reasons:
                report.skipped.append((path, cls.__qualname__, "; ".join(reasons)))
                continue
            report.swapped.append((path, cls.__qualname__, rule.fused))
            changes.append(Change(module, "__class__", cls, rule.fast))
            changes += [
                Change(getattr(module, part.name), "__class__", part.source, part.fast)
                for part in rule.parts
            ]
        else:
            base = next((b for b in cls.__mro__ if b in by_source or b in by_fast), None)
            if base is not None:
                reason = f"subclass of {base.__qualname__}, whose forward may differ"
                report.skipped.append((path, cls.__qualname__, reason))
    return changes, report


def plan_restore(model: nn.Module) -> list[Change]:
    """Class changes that undo every swap inside `model`."""
    source = {fast: src for rule in rules_for(model) for fast, src in rule.classes().items()}
    changes = []
    for path, module in model.named_modules():
        cls = type(module)
        if cls in source:
            changes.append(Change(module, "__class__", cls, source[cls]))
        elif any(base in source for base in cls.__mro__):
            raise ValueError(
                f"restore_: module {path!r} must have the class that accelerate_ gave it, "
                f"got its subclass {cls.__qualname__}; undo what derived it first"
            )
    return changes
