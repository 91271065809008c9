# SPDX-License-Identifier: Apache-2.0
"""timm's `VisionTransformer` and models made of its `Block`, such as DeiT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastbb.binarize._masks import additive_mask
from fastbb.binarize._plan import Plan
from fastbb.nn.binary_attention import attend
from fastbb.nn.binary_linear import PackedBinaryLinear, feed_forward


class BinarizedAttention(Attention):
    """Binary products of queries, keys, values and probabilities."""

    calibrating = False

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if is_causal:
            raise NotImplementedError(
                "BinarizedAttention: is_causal must be False for binary attention, got True"
            )
        if attn_mask is not None and attn_mask.dim() == 2:
            attn_mask = attn_mask[None, None]
        mask = additive_mask("BinarizedAttention", attn_mask, x.shape[0])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        return self.proj_drop(self.proj(attend(self, x, q, k, v, mask, self.attn_drop.p)))


class BinarizedMlp(Mlp):
    """A feed-forward network that goes from bits to bits once it is packed."""

    def forward(self, x: Tensor) -> Tensor:
        packed = all(isinstance(layer, PackedBinaryLinear) for layer in (self.fc1, self.fc2))
        drops = self.training and self.drop1.p > 0.0
        if packed and not drops and isinstance(self.norm, nn.Identity):
            return self.drop2(feed_forward(x, self.fc1, self.fc2, self.preset.activation))
        return super().forward(x)


def _attention_reason(attn: Any) -> str:
    if type(attn) is not Attention:
        return f"its class is {type(attn).__qualname__}, not Attention"
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(attn, name), nn.Identity):
            return f"it normalises ({name}), which binary attention does not"
    if attn.gate is not None:
        return "it has a gate, which binary attention has not"
    return ""


def _block(plan: Plan, block: Any) -> None:
    attn, mlp = block.attn, block.mlp
    if not plan.skips(attn):
        reason = _attention_reason(attn)
        if reason:
            plan.skip(attn, reason)
        else:
            plan.replace(attn, "qkv", plan.preset.linear)
            plan.replace(attn, "proj", plan.preset.linear)
            what = plan.add_attention(attn, attn.qkv.in_features, attn.qkv.weight)
            plan.swap(attn, BinarizedAttention, what)
    if not plan.skips(mlp):
        if type(mlp) is not Mlp:
            plan.skip(mlp, f"its class is {type(mlp).__qualname__}, not Mlp")
            return
        up = plan.replace(mlp, "fc1", plan.preset.linear)
        down = plan.replace(mlp, "fc2", plan.preset.ffn_down)
        if up or down:
            plan.activation(mlp, "act")
            plan.swap(mlp, BinarizedMlp)


RULES: dict[type, Callable[[Plan, Any], None]] = {Block: _block}
"""Class of timm -> what to plan for it."""
