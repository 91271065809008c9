# SPDX-License-Identifier: Apache-2.0
"""torchvision's Swin Transformer v1 and v2 (`torchvision.models.swin_transformer`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from fastbb.accelerate._rule import Rule, attention_reasons, check_no_dropout
from fastbb.accelerate._swin_v2 import continuous_bias_table, logit_factor
from fastbb.ops import window_attention


def _attend(
    qkv: Tensor,
    bias: Tensor | None,
    window: list[int],
    shift: list[int],
    num_heads: int,
    **options: Any,
) -> Tensor:
    """`[B, H, W, 3*C]` -> `[B, H, W, C]`; `bias` is what the projection added, as in padding."""
    size = qkv.shape[1:3]
    # torchvision does not shift along an axis that one window covers, padding included.
    shift = [0 if w >= n else s for w, n, s in zip(window, size, shift, strict=True)]
    k_pad = v_pad = None
    if bias is not None:
        _, k_pad, v_pad = bias.unflatten(0, (3, -1)).unbind(0)
    out = window_attention(
        qkv.unflatten(-1, (3, num_heads, -1)),
        window=window,
        shift=shift,
        pad_mode="pad_then_roll",
        k_pad=k_pad,
        v_pad=v_pad,
        mask="swin" if any(shift) else None,
        **options,
    )
    return out.flatten(3)


torch.fx.wrap("_attend")


class FastShiftedWindowAttention(ShiftedWindowAttention):
    """Shifted window attention without window, mask and bias tensors."""

    def forward(self, x: Tensor) -> Tensor:
        check_no_dropout(self, self.attention_dropout)
        x = _attend(
            self.qkv(x),
            self.qkv.bias,
            self.window_size,
            self.shift_size,
            self.num_heads,
            bias_table=self.relative_position_bias_table,
        )
        return F.dropout(self.proj(x), p=self.dropout, training=self.training)


class FastShiftedWindowAttentionV2(ShiftedWindowAttentionV2):
    """Shifted window cosine attention without window, mask and bias tensors."""

    def forward(self, x: Tensor) -> Tensor:
        check_no_dropout(self, self.attention_dropout)
        bias = self.qkv.bias
        if bias is not None:
            # Keys have no bias here, whatever the parameter's middle third holds.
            q_bias, k_bias, v_bias = bias.chunk(3)
            bias = torch.cat((q_bias, torch.zeros_like(k_bias), v_bias))
        x = _attend(
            F.linear(x, self.qkv.weight, bias),
            bias,
            self.window_size,
            self.shift_size,
            self.num_heads,
            bias_table=continuous_bias_table(
                self.cpb_mlp, self.relative_coords_table, self.num_heads
            ),
            scale=logit_factor(self.logit_scale),
            qk_l2norm=True,
        )
        return F.dropout(self.proj(x), p=self.dropout, training=self.training)


def _can_run(attn: ShiftedWindowAttention) -> list[str]:
    return attention_reasons(attn.qkv, attn.attention_dropout)


def _head_dim(attn: ShiftedWindowAttention) -> int:
    return attn.qkv.out_features // (3 * attn.num_heads)


RULES = [
    Rule(
        source=ShiftedWindowAttention,
        fast=FastShiftedWindowAttention,
        fused="padding, roll, window partition, relative position bias, mask, attention, reverse",
        can_run=_can_run,
        head_dim=_head_dim,
    ),
    Rule(
        source=ShiftedWindowAttentionV2,
        fast=FastShiftedWindowAttentionV2,
        fused="padding, roll, window partition, bias, mask, cosine attention, reverse",
        can_run=_can_run,
        head_dim=_head_dim,
    ),
]
