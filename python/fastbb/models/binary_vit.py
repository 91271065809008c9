# SPDX-License-Identifier: Apache-2.0
"""Vision transformers (Dosovitskiy et al., ICLR 2021) with binary weights and activations in all
blocks; patch embedding and classifier keep full precision. State dict keys are timm's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb.models._registry import image_size, register
from fastbb.nn.binary_presets import Preset
from fastbb.nn.binary_vit import BinaryVitBlock
from fastbb.nn.layers import drop_path_rates, init_weights

BLOCK_NORM_EPS = 1e-6
STAGES = 4


class _PatchEmbed(nn.Module):
    """Patches as tokens: `[B, 3, H, W]` -> map `[B, C, H / patch, W / patch]`."""

    def __init__(self, in_chans: int, dim: int, patch: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, patch, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class BinaryVit(nn.Module):
    """Image `[B, 3, H, W]` -> logits `[B, num_classes]`, or a list of maps `[B, C, h, w]`.

    Args:
        img_size: whose patches have a learned position each; positions of other sizes, which
            `patch_size` must divide, are interpolated.
        preset, estimator_rank: as of `fastbb.nn.BinarySelfAttention`; None: the preset's rank.
        num_classes: 0 returns the class token's features.
        features_only: forward returns the tokens' map after each quarter of the blocks.
    """

    def __init__(
        self,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        preset: str | Preset = "bipft",
        estimator_rank: int | None = None,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        height, width = image_size(img_size, patch_size)
        if features_only and depth % STAGES != 0:
            raise ValueError(f"BinaryVit: depth must be a multiple of {STAGES}, got {depth}")
        self.grid = (height // patch_size, width // patch_size)
        self.patch_size = patch_size
        self.features_only = features_only
        self.num_features = embed_dim
        self.patch_embed = _PatchEmbed(in_chans, embed_dim, patch_size, **factory)
        tokens = self.grid[0] * self.grid[1] + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **factory))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        (rates,) = drop_path_rates(drop_path_rate, (depth,))
        self.blocks = nn.ModuleList(
            BinaryVitBlock(
                embed_dim,
                num_heads,
                int(embed_dim * mlp_ratio),
                preset=preset,
                estimator_rank=estimator_rank,
                drop_path=rate,
                eps=BLOCK_NORM_EPS,
                **factory,
            )
            for rate in rates
        )
        if not features_only:
            self.norm = nn.LayerNorm(embed_dim, eps=BLOCK_NORM_EPS, **factory)
            self.head: nn.Module = nn.Identity()
            if num_classes > 0:
                self.head = nn.Linear(embed_dim, num_classes, **factory)
        self.apply(init_weights)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        maps = rest.unflatten(1, self.grid).permute(0, 3, 1, 2).float()
        resized = F.interpolate(maps, grid, mode="bicubic", antialias=True)
        return torch.cat([first, resized.flatten(2).mT.to(first.dtype)], 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise ValueError(
                f"BinaryVit: image sides must be multiples of {self.patch_size}, "
                f"got {list(x.shape[-2:])}"
            )
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).mT], 1)
        x = x + self._positions(grid)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.features_only and (i + 1) % (len(self.blocks) // STAGES) == 0:
                features.append(x[:, 1:].mT.unflatten(-1, grid))
        return features if self.features_only else self.head(self.norm(x)[:, 0])


VARIANTS: dict[str, dict[str, Any]] = {
    "binary_vit_tiny": {"embed_dim": 192, "num_heads": 3},
    "binary_vit_small": {"embed_dim": 384, "num_heads": 6},
    "binary_vit_base": {"embed_dim": 768, "num_heads": 12},
}

register(BinaryVit, VARIANTS)
