# SPDX-License-Identifier: Apache-2.0
"""What a source family states about each class it can swap, and checks that families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbb.ops.window_attention import can_run


@dataclass(frozen=True)
class Part:
    """A child module that changes class together with its parent, because they share a protocol."""

    name: str
    source: type[nn.Module]
    fast: type[nn.Module]


@dataclass(frozen=True)
class Rule:
    """Modules whose class is exactly `source` may become `fast`, a subclass that adds no state."""

    source: type[nn.Module]
    fast: type[nn.Module]
    fused: str
    """What the fast class does in one operator, for the report."""
    can_run: Callable[[Any], list[str]]
    """Reasons against swapping this module; called when the classes of all parts are right."""
    head_dim: Callable[[Any], int] = lambda module: 1
    """Head dim of its attention; the least for modules whose other work only is faster."""
    parts: tuple[Part, ...] = ()

    def reasons(self, module: nn.Module, dtype: torch.dtype | None) -> list[str]:
        """Reasons against swapping `module`, given the dtype it will have (None: the present)."""
        for part in self.parts:
            child = getattr(module, part.name)
            if type(child) is not part.source:
                return [f"{part.name} is {_name(child)}, not {part.source.__qualname__}"]
        if reasons := self.can_run(module):
            return reasons
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
        if weight is None:
            return ["it has no floating parameters"]
        probe = torch.empty(
            (0, 1, 1, 1, self.head_dim(module)), device=weight.device, dtype=dtype or weight.dtype
        )
        return can_run(probe, probe, probe)

    def classes(self) -> dict[type[nn.Module], type[nn.Module]]:
        """fast class -> source class, of the module and its parts."""
        return {self.fast: self.source} | {part.fast: part.source for part in self.parts}


def attention_reasons(qkv: object, dropout: float) -> list[str]:
    """Reasons that concern any fused attention: a foreign projection, dropout of the weights."""
    reasons = []
    if not isinstance(qkv, nn.Linear):
        reasons.append(f"its projection is {_name(qkv)}, not Linear")
    if dropout > 0.0:
        reasons.append(f"attention dropout {dropout} has no fused kernel")
    return reasons


def _name(value: object) -> str:
    return type(value).__qualname__


def check_no_dropout(module: nn.Module, dropout: float) -> None:
    """Refuses dropout of the attention weights that was switched on after acceleration."""
    if module.training and dropout > 0.0:
        raise NotImplementedError(
            f"{type(module).__qualname__}: attention dropout must be 0 to train an accelerated "
            f"module, got {dropout}; call fastbb.restore_(model) first"
        )
