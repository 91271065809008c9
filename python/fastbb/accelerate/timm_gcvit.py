# SPDX-License-Identifier: Apache-2.0
"""timm's GC ViT (`timm.models.gcvit`): local and global-query window attention."""

from __future__ import annotations

import torch
from timm.models.gcvit import GlobalContextVitBlock, RelPosBias, WindowAttentionGlobal
from torch import Tensor

from fastbb.accelerate._rule import Part, Rule, attention_reasons, check_no_dropout
from fastbb.accelerate._timm import version_reasons
from fastbb.ops import window_attention

torch.fx.wrap("window_attention")


class FastWindowAttentionGlobal(WindowAttentionGlobal):
    """Takes the map `[B, H, W, C]` and the images' queries `[B, wh, ww, C]`; returns a map."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        check_no_dropout(self, self.attn_drop.p)
        heads = (self.num_heads, self.head_dim)
        q, kv = self.qkv(x).unflatten(-1, (-1, *heads)), None
        if self.use_global and q_global is not None:
            q, kv = q_global.flatten(1, 2).unflatten(-1, heads), q
        x = window_attention(
            q,
            kv,
            window=self.window_size,
            bias_table=self.rel_pos.relative_position_bias_table,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(x.flatten(3)))


class FastGlobalContextVitBlock(GlobalContextVitBlock):
    """The block without window partition and reverse."""

    def _window_attn(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        return self.attn(x, q_global)


def _can_run(block: GlobalContextVitBlock) -> list[str]:
    reasons = version_reasons("1.0.31", "images of a batch get each other's global queries")
    if reasons:
        return reasons
    attn = block.attn
    reasons = attention_reasons(attn.qkv, attn.attn_drop.p)
    if type(attn.rel_pos) is not RelPosBias or attn.rel_pos.prefix_tokens:
        reasons.append("rel_pos is not a plain table of relative positions")
    return reasons


RULES = [
    Rule(
        source=GlobalContextVitBlock,
        fast=FastGlobalContextVitBlock,
        fused="window partition, relative position bias, (global-query) attention, reverse",
        can_run=_can_run,
        head_dim=lambda block: block.attn.head_dim,
        parts=(Part("attn", WindowAttentionGlobal, FastWindowAttentionGlobal),),
    )
]
