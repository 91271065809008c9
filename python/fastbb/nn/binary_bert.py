# SPDX-License-Identifier: Apache-2.0
"""Binary layers of BERT. Names of modules and parameters are Hugging Face's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbb.nn.binary_attention import BinarySelfAttention
from fastbb.nn.binary_linear import BinaryLinear, feed_forward
from fastbb.nn.binary_presets import Preset, preset_of


class _Residual(nn.Module):
    """`dense`, dropout, and `LayerNorm` of the sum with the input."""

    def __init__(
        self, dense: nn.Module, dim: int, dropout: float, eps: float, **factory: Any
    ) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = nn.LayerNorm(dim, eps=eps, **factory)
        self.dropout = nn.Dropout(dropout)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: what `dense` made."""
        return self.LayerNorm(self.dropout(x) + residual)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.add(self.dense(x), residual)


class _Attention(nn.Module):
    def __init__(self, attention: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.self = attention
        self.output = output

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, mask), x)


class _Intermediate(nn.Module):
    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense


class BinaryBertLayer(nn.Module):
    """A layer of BERT `[B, N, C]` -> `[B, N, C]`: post-norm, all matrix products binary.

    Args:
        dim, heads, intermediate: channels, heads, channels of the feed-forward network.
        preset, estimator_rank: as of `BinarySelfAttention`; None: the preset's rank.
        hidden_dropout, attention_dropout: rates in training.
        eps: of the layer norms.

    With packed linear layers the feed-forward network goes from bits to bits.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        intermediate: int,
        *,
        preset: str | Preset = "bipft",
        estimator_rank: int | None = None,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        eps: float = 1e-12,
        **factory: Any,
    ) -> None:
        super().__init__()
        rules = preset_of("BinaryBertLayer", preset)
        self.activation = rules.activation

        def residual(dense: BinaryLinear) -> _Residual:
            return _Residual(dense, dim, hidden_dropout, eps, **factory)

        self.attention = _Attention(
            BinarySelfAttention(
                dim,
                heads,
                preset=rules,
                estimator_rank=estimator_rank,
                dropout=attention_dropout,
                **factory,
            ),
            residual(BinaryLinear(dim, dim, **rules.linear, **factory)),
        )
        self.intermediate = _Intermediate(
            BinaryLinear(dim, intermediate, **rules.linear, **factory)
        )
        self.output = residual(BinaryLinear(intermediate, dim, **rules.ffn_down, **factory))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x `[B, N, C]`; mask, added to the scores, `[B, N]` or `[B, N, N]`."""
        x = self.attention(x, mask)
        hidden = feed_forward(x, self.intermediate.dense, self.output.dense, self.activation)
        return self.output.add(hidden, x)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class BinaryBertPooler(nn.Module):
    """The first token through a binary layer: `[B, N, C]` -> `[B, C]`.

    tanh(dense(x)), or with `residual` (BiPFT) tanh(LayerNorm(dense(x)) + x).
    """

    def __init__(
        self, dim: int, *, preset: str | Preset = "bipft", eps: float = 1e-12, **factory: Any
    ) -> None:
        super().__init__()
        rules = preset_of("BinaryBertPooler", preset)
        self.dense: nn.Module = BinaryLinear(dim, dim, **rules.linear, **factory)
        if rules.residual_pooler:
            self.LayerNorm = nn.LayerNorm(dim, eps=eps, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return pool(self, x[:, 0])


def pool(pooler: Any, first: Tensor) -> Tensor:
    """The pooler's result for the first token `[B, C]`."""
    pooled = pooler.dense(first)
    if hasattr(pooler, "LayerNorm"):
        pooled = pooler.LayerNorm(pooled) + first
    return torch.tanh(pooled)
