# SPDX-License-Identifier: Apache-2.0
"""Small layers that every backbone uses. Maps are channels-last, `[B, H, W, C]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al. 2016): drops a residual branch in training."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"DropPath: rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class LayerScale(nn.Module):
    """Per-channel factor `gamma` of a residual branch (Touvron et al. 2021)."""

    def __init__(self, dim: int, init: float = 1e-5, **factory: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Linear, exact GELU, Linear on `[..., C]`."""

    def __init__(self, dim: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ClassifierHead(nn.Module):
    """Mean over the map, then a Linear `fc`; `num_classes=0` returns the mean itself."""

    def __init__(self, dim: int, num_classes: int, **factory: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes, **factory) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((1, 2)))


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """A linear ramp from 0 to `rate` over all blocks, cut into stages."""
    total = sum(depths)
    ramp = [rate * i / max(total - 1, 1) for i in range(total)]
    stages = []
    for depth in depths:
        stages.append(ramp[:depth])
        ramp = ramp[depth:]
    return stages


def init_weights(module: nn.Module) -> None:
    """Truncated normal (std 0.02) for Linear weights, zero for their biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
