# SPDX-License-Identifier: Apache-2.0
"""PVT v2, Pyramid Vision Transformer (Wang et al., CVMJ 2022). State dict keys are timm's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastbb.models._registry import image_size, register
from fastbb.nn.conv import ConvMlp, PatchEmbed
from fastbb.nn.layers import DropPath, drop_path_rates, init_weights
from fastbb.nn.window_attention import SpatialReductionAttention

BLOCK_NORM_EPS = 1e-6


class PyramidBlock(nn.Module):
    """Pre-norm block: spatial-reduction attention, then the convolutional MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: float,
        linear: bool,
        drop_path: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS, **factory)
        self.attn = SpatialReductionAttention(dim, num_heads, sr_ratio, linear, **factory)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS, **factory)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), linear, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PyramidStage(nn.Module):
    """Optional overlapping downsampling, blocks, norm."""

    def __init__(
        self, downsample: nn.Module, blocks: list[PyramidBlock], dim: int, **factory: Any
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.downsample, nn.Identity):
            x = self.downsample(x.permute(0, 3, 1, 2))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PVTv2(nn.Module):
    """Image `[B, 3, H, W]` -> logits `[B, num_classes]`, or the maps of the four stages.

    Any H, W of at least 32; `img_size` is accepted for symmetry and lays nothing out.
    """

    def __init__(
        self,
        embed_dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        linear: bool = False,
        drop_path_rate: float = 0.1,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        image_size(img_size, 32)
        self.features_only = features_only
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], 7, 4, **factory)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            down = PatchEmbed(embed_dims[i - 1], dim, 3, 2, **factory) if i else nn.Identity()
            blocks = [
                PyramidBlock(
                    dim, num_heads[i], sr_ratios[i], mlp_ratios[i], linear, rate, **factory
                )
                for rate in rates[i]
            ]
            self.stages.append(PyramidStage(down, blocks, dim, **factory))
        self.num_features = embed_dims[-1]
        if not features_only:
            self.head: nn.Module = nn.Identity()
            if num_classes > 0:
                self.head = nn.Linear(self.num_features, num_classes, **factory)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.patch_embed(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x.permute(0, 3, 1, 2))
        return features if self.features_only else self.head(x.mean((1, 2)))


VARIANTS: dict[str, dict[str, Any]] = {
    "pvt_v2_b0": {"embed_dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "pvt_v2_b1": {"depths": (2, 2, 2, 2)},
    "pvt_v2_b2": {"depths": (3, 4, 6, 3)},
    "pvt_v2_b2_li": {"depths": (3, 4, 6, 3), "linear": True},
    "pvt_v2_b3": {"depths": (3, 4, 18, 3)},
    "pvt_v2_b4": {"depths": (3, 8, 27, 3)},
    "pvt_v2_b5": {"depths": (3, 6, 40, 3), "mlp_ratios": (4.0, 4.0, 4.0, 4.0)},
}

register(PVTv2, VARIANTS)
