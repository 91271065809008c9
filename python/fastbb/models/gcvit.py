# SPDX-License-Identifier: Apache-2.0
"""GC ViT, Global Context Vision Transformer (Hatamizadeh et al., ICML 2023).

State dict keys are timm's. Windows alternate between local attention and attention to queries
that are generated once per stage from the whole map.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fastbb.models._registry import image_size, register
from fastbb.nn.conv import Downsample, GlobalContextStem, GlobalQueryGenerator
from fastbb.nn.layers import (
    ClassifierHead,
    DropPath,
    LayerScale,
    Mlp,
    drop_path_rates,
    init_weights,
)
from fastbb.nn.window_attention import GlobalWindowAttention

# Image pixels per window side, by stage.
WINDOW_RATIO = (32, 32, 16, 32)


class GlobalContextBlock(nn.Module):
    """Pre-norm block: window attention (local or global), then MLP, both residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        mlp_ratio: float,
        use_global: bool,
        layer_scale: float | None,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = GlobalWindowAttention(dim, num_heads, window_size, use_global, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path)
        self.ls1: nn.Module = nn.Identity()
        self.ls2: nn.Module = nn.Identity()
        if layer_scale is not None:
            self.ls1 = LayerScale(dim, layer_scale, **factory)
            self.ls2 = LayerScale(dim, layer_scale, **factory)

    def forward(self, x: Tensor, q_global: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), q_global)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class GlobalContextStage(nn.Module):
    """Optional downsampling, the global query, blocks, and the final norm of the last stage."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feature_size: tuple[int, int],
        window_size: tuple[int, int],
        drop_path: list[float],
        downsample: bool,
        norm: bool,
        mlp_ratio: float,
        layer_scale: float | None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.downsample = Downsample(dim // 2, dim, **factory) if downsample else nn.Identity()
        levels = int(math.log2(min(feature_size) / min(window_size)))
        self.global_block = GlobalQueryGenerator(dim, levels, **factory)
        self.blocks = nn.ModuleList(
            GlobalContextBlock(
                dim,
                num_heads,
                window_size,
                mlp_ratio,
                use_global=i % 2 == 1,
                layer_scale=layer_scale,
                drop_path=rate,
                **factory,
            )
            for i, rate in enumerate(drop_path)
        )
        self.norm = nn.LayerNorm(dim, **factory) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        q_global = self.global_block(x, self.window_size)
        for block in self.blocks:
            x = block(x, q_global)
        return self.norm(x)


class GCViT(nn.Module):
    """Image `[B, 3, H, W]` -> logits `[B, num_classes]`, or the maps of the four stages.

    Windows have the size of `img_size` over the ratios 32, 32, 16, 32. Other images are padded
    to whole windows after each norm and the global query is resized to the window, as the
    authors' detection backbone does.
    """

    def __init__(
        self,
        embed_dim: int = 64,
        depths: tuple[int, ...] = (3, 4, 19, 5),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        height, width = image_size(img_size, 32)
        self.features_only = features_only
        self.stem = GlobalContextStem(in_chans, embed_dim, **factory)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i in range(len(depths)):
            self.stages.append(
                GlobalContextStage(
                    embed_dim * 2**i,
                    num_heads[i],
                    (height >> (i + 2), width >> (i + 2)),
                    (height // WINDOW_RATIO[i], width // WINDOW_RATIO[i]),
                    rates[i],
                    downsample=i > 0,
                    norm=i == len(depths) - 1,
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    **factory,
                )
            )
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        if not features_only:
            self.head = ClassifierHead(self.num_features, num_classes, **factory)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x.permute(0, 3, 1, 2))
        return features if self.features_only else self.head(x)


_TINY = {"depths": (3, 4, 19, 5), "drop_path_rate": 0.2}
_WIDE = {"mlp_ratio": 2.0, "layer_scale": 1e-5}
_LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), **_WIDE}

VARIANTS: dict[str, dict[str, Any]] = {
    "gcvit_xxtiny": {"depths": (2, 2, 6, 2), "drop_path_rate": 0.2},
    "gcvit_xtiny": {"depths": (3, 4, 6, 5), "drop_path_rate": 0.2},
    "gcvit_tiny": _TINY,
    "gcvit_tiny2": {"depths": (3, 4, 29, 5), "drop_path_rate": 0.25},
    "gcvit_small": {
        "embed_dim": 96,
        "num_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.3,
        **_WIDE,
    },
    "gcvit_small2": {
        "embed_dim": 96,
        "num_heads": (3, 6, 12, 24),
        "depths": (3, 4, 23, 5),
        "mlp_ratio": 3.0,
        "layer_scale": 1e-5,
        "drop_path_rate": 0.35,
    },
    "gcvit_base": {
        "embed_dim": 128,
        "num_heads": (4, 8, 16, 32),
        "drop_path_rate": 0.5,
        **_WIDE,
    },
    "gcvit_large": {**_LARGE, "drop_path_rate": 0.5},
    "gcvit_large_21k": {**_LARGE, "drop_path_rate": 0.5},
    "gcvit_large_384_21k": {**_LARGE, "drop_path_rate": 0.1, "img_size": 384},
    "gcvit_large_512_21k": {**_LARGE, "drop_path_rate": 0.1, "img_size": 512},
}

register(GCViT, VARIANTS)
