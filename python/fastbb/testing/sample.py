# SPDX-License-Identifier: Apache-2.0
"""One set of arguments of an operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Arguments for the raw operator and, where it has one, for its public function.

    Attributes:
        name: names the case, unique per operator.
        args: positional arguments of the raw operator, in schema order.
        kwargs: keyword arguments of the public function that mean the same (tensors are the same
            objects where the raw operator takes them as they are).
        difficulty: how much the case amplifies rounding errors of float32 arithmetic, as large
            logits and cancelling sums do; see `Tolerance`.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    difficulty: float = 1.0


def leaves(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Those of a sample's arguments whose gradients are wanted."""
    return {key: x for key, x in kwargs.items() if isinstance(x, Tensor) and x.requires_grad}


def in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64, for exact results. Leaves that require gradients stay such
    leaves.
    """
    return {
        key: x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for key, x in kwargs.items()
    }


def random_like(x: Tensor, seed: int) -> Tensor:
    """Normally distributed numbers, the same for every dtype and device but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x)
