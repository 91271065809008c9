# SPDX-License-Identifier: Apache-2.0
"""timm's PVT v2 (`timm.models.pvt_v2`): attention to spatially reduced keys, MLP on the map."""

from __future__ import annotations

import torch
from timm.models.pvt_v2 import Attention, MlpWithDepthwiseConv
from torch import Tensor

from fastbb.accelerate._rule import Rule, attention_reasons, check_no_dropout
from fastbb.accelerate._timm import version_reasons
from fastbb.ops import window_attention

torch.fx.wrap("window_attention")


def _to_channels_last(x: Tensor, feat_size: tuple[int, int]) -> Tensor:
    """Tokens `[B, H*W, C]` -> `[B, C, H, W]`, the same memory.

    A transpose of the tokens would do the same, but at B = 1 its strides are not recognised as
    channels_last, and convolutions copy the map to NCHW and leave their results there.
    """
    return x.unflatten(1, feat_size).permute(0, 3, 1, 2)


class FastAttention(Attention):
    """Attention on `[B, tokens, heads, head dim]` views of the projections, with no transposes."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        check_no_dropout(self, self.attn_drop.p)
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        kv = self.kv(self._reduce(x, feat_size))
        kv = kv.unflatten(-1, (2, self.num_heads, self.head_dim))
        x = window_attention(q, kv, scale=self.scale).flatten(2)
        return self.proj_drop(self.proj(x))

    def _reduce(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        """Tokens `[B, H*W, C]` -> fewer tokens for keys and values."""
        if self.sr is None:
            return x
        x = _to_channels_last(x, feat_size)
        x = self.sr(x if self.pool is None else self.pool(x))
        x = self.norm(x.flatten(2).transpose(1, 2))
        return x if self.act is None else self.act(x)


class FastMlpWithDepthwiseConv(MlpWithDepthwiseConv):
    """The MLP with its map in channels_last at every batch size."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        x = _to_channels_last(self.fc1(x), feat_size)
        x = self.dwconv(self.relu(x)).flatten(2).transpose(1, 2)
        return self.drop(self.fc2(self.drop(self.act(x))))


def _can_run(attn: Attention) -> list[str]:
    return _version_reasons() + attention_reasons(attn.kv, attn.attn_drop.p)


def _version_reasons() -> list[str]:
    return version_reasons("1.0.9", "not compared with the fast classes")


RULES = [
    Rule(
        source=Attention,
        fast=FastAttention,
        fused="attention to reduced keys, without head transposes",
        can_run=_can_run,
        head_dim=lambda attn: attn.head_dim,
    ),
    Rule(
        source=MlpWithDepthwiseConv,
        fast=FastMlpWithDepthwiseConv,
        fused="channels_last depthwise convolution at batch 1",
        can_run=lambda mlp: _version_reasons(),
    ),
]
