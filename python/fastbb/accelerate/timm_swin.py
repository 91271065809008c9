# SPDX-License-Identifier: Apache-2.0
"""timm's Swin Transformer v1 and S3 (`timm.models.swin_transformer`)."""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor

from fastbb.accelerate._rule import Part, Rule, attention_reasons, check_no_dropout
from fastbb.accelerate._timm import version_reasons
from fastbb.ops import window_attention

torch.fx.wrap("window_attention")


class FastWindowAttention(WindowAttention):
    """Takes the un-rolled, un-padded map `[B, H, W, C]` and the shift; returns a map."""

    def forward(self, x: Tensor, shift: tuple[int, int]) -> Tensor:
        check_no_dropout(self, self.attn_drop.p)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        # timm pads after the norm with zeros, so the linear layer's bias is all a padded token has.
        k_pad = v_pad = None
        if self.qkv.bias is not None:
            _, k_pad, v_pad = self.qkv.bias.unflatten(0, (3, -1)).unbind(0)
        x = window_attention(
            qkv,
            window=self.window_size,
            shift=shift,
            pad_mode="roll_then_pad",
            k_pad=k_pad,
            v_pad=v_pad,
            bias_table=self.relative_position_bias_table,
            mask="swin" if any(shift) else None,
            scale=self.scale,
        )
        return self.proj_drop(self.proj(x.flatten(3)))


class FastSwinTransformerBlock(SwinTransformerBlock):
    """The block without roll, padding, window partition, mask tensor and reverse."""

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x, self.shift_size)


def _can_run(block: SwinTransformerBlock) -> list[str]:
    return version_reasons("1.0.31", "masks are wrong where a stage has an odd size") + (
        attention_reasons(block.attn.qkv, block.attn.attn_drop.p)
    )


RULES = [
    Rule(
        source=SwinTransformerBlock,
        fast=FastSwinTransformerBlock,
        fused="roll, padding, window partition, relative position bias, mask, attention, reverse",
        can_run=_can_run,
        head_dim=lambda block: block.attn.qkv.out_features // (3 * block.attn.num_heads),
        parts=(Part("attn", WindowAttention, FastWindowAttention),),
    )
]
