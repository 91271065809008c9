# SPDX-License-Identifier: Apache-2.0
"""timm's Swin Transformer v2 (`timm.models.swin_transformer_v2`): cosine attention, bias MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from torch import Tensor

from fastbb.accelerate._rule import Part, Rule, attention_reasons, check_no_dropout
from fastbb.accelerate._swin_v2 import continuous_bias_table, logit_factor
from fastbb.accelerate._timm import version_reasons
from fastbb.ops import window_attention

torch.fx.wrap("window_attention")


class FastWindowAttention(WindowAttention):
    """Takes the un-rolled, un-padded map `[B, H, W, C]` and the shift; returns a map."""

    def forward(self, x: Tensor, shift: tuple[int, int]) -> Tensor:
        check_no_dropout(self, self.attn_drop.p)
        x = window_attention(
            self._project(x).unflatten(-1, (3, self.num_heads, -1)),
            window=self.window_size,
            shift=shift,
            pad_mode="roll_then_pad",
            # timm pads the block's input with zeros: a padded token has the biases, and k's is 0.
            v_pad=self.v_bias,
            bias_table=continuous_bias_table(
                self.cpb_mlp, self.relative_coords_table, self.num_heads
            ),
            mask="swin" if any(shift) else None,
            scale=logit_factor(self.logit_scale),
            qk_l2norm=True,
        )
        return self.proj_drop(self.proj(x.flatten(3)))

    def _project(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if self.qkv_bias_separate:
            return self.qkv(x) + bias
        return F.linear(x, self.qkv.weight, bias)


class FastSwinTransformerV2Block(SwinTransformerV2Block):
    """The block without roll, padding, window partition, mask tensor and reverse."""

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x, self.shift_size)


def _can_run(block: SwinTransformerV2Block) -> list[str]:
    return version_reasons("1.0.31", "masks are wrong where a stage has an odd size") + (
        attention_reasons(block.attn.qkv, block.attn.attn_drop.p)
    )


RULES = [
    Rule(
        source=SwinTransformerV2Block,
        fast=FastSwinTransformerV2Block,
        fused="roll, padding, window partition, bias, mask, cosine attention, reverse",
        can_run=_can_run,
        head_dim=lambda block: block.dim // block.num_heads,
        parts=(Part("attn", WindowAttention, FastWindowAttention),),
    )
]
