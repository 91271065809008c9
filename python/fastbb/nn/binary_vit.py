# SPDX-License-Identifier: Apache-2.0
"""Binary layers of vision transformers. Names of modules and parameters are timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbb.nn.binary_attention import add_attention_state, attend
from fastbb.nn.binary_linear import BinaryLinear, feed_forward
from fastbb.nn.binary_presets import Preset, preset_of
from fastbb.nn.layers import DropPath
from fastbb.ops._checks import fail


class BinaryVitAttention(nn.Module):
    """Self-attention `[B, N, C]` -> `[B, N, C]`: one binary projection `qkv`, and `proj`.

    Args: as of `fastbb.nn.BinarySelfAttention`.
    """

    calibrating = False
    alphas: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        preset: str | Preset = "bipft",
        estimator_rank: int | None = 0,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        op = "BinaryVitAttention"
        self.preset = preset_of(op, preset)
        if heads < 1 or dim % heads != 0:
            fail(op, "heads", f"must divide dim {dim}", heads)
        self.heads = heads
        self.dropout = dropout
        self.qkv: nn.Module = BinaryLinear(dim, 3 * dim, qkv_bias, **self.preset.linear, **factory)
        self.proj: nn.Module = BinaryLinear(dim, dim, **self.preset.linear, **factory)
        state = add_attention_state(self, dim, self.preset, estimator_rank, **factory)
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.proj(attend(self, x, q, k, v, None, self.dropout))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, rules: Preset, **factory: Any) -> None:
        super().__init__()
        self.activation = rules.activation
        self.fc1 = BinaryLinear(dim, hidden, **rules.linear, **factory)
        self.fc2 = BinaryLinear(hidden, dim, **rules.ffn_down, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.fc1, self.fc2, self.activation)


class BinaryVitBlock(nn.Module):
    """A pre-norm block `[B, N, C]` -> `[B, N, C]`, all of whose matrix products are binary.

    Args:
        dim, heads, hidden: channels, heads, channels of the feed-forward network.
        preset, estimator_rank: as of `fastbb.nn.BinarySelfAttention`; None: the preset's rank.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        preset: str | Preset = "bipft",
        estimator_rank: int | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        **factory: Any,
    ) -> None:
        super().__init__()
        rules = preset_of("BinaryVitBlock", preset)
        self.norm1 = nn.LayerNorm(dim, eps=eps, **factory)
        self.attn = BinaryVitAttention(
            dim, heads, preset=rules, estimator_rank=estimator_rank, **factory
        )
        self.norm2 = nn.LayerNorm(dim, eps=eps, **factory)
        self.mlp = _Mlp(dim, hidden, rules, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
