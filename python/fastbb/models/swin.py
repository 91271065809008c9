# SPDX-License-Identifier: Apache-2.0
"""Swin Transformer v1 (Liu et al., ICCV 2021) and v2 (Liu et al., CVPR 2022).

State dict keys are timm's. With timm's padding order the window shrinks to a map that is smaller
than it, and axes with one window are not shifted, both decided from `img_size` when the model is
built. With torchvision's the window stays, and the shift follows the map of each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastbb.models._registry import image_size, register
from fastbb.nn.conv import PatchEmbed, PatchMerging
from fastbb.nn.layers import ClassifierHead, DropPath, Mlp, drop_path_rates, init_weights
from fastbb.nn.window_attention import PadMode, WindowAttention, WindowAttentionV2


class SwinBlock(nn.Module):
    """v1: pre-norm; v2: each branch is normalised before it is added."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        v2: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.v2 = v2
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.v2:
            x = x + self.drop_path(self.norm1(self.attn(x)))
            return x + self.drop_path(self.norm2(self.mlp(x)))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinStage(nn.Module):
    """Optional patch merging, then blocks that alternate between plain and shifted windows."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class Swin(nn.Module):
    """Image `[B, 3, H, W]` -> logits `[B, num_classes]`, or the maps of the four stages.

    Args:
        window_size: one int, or one per stage (S3).
        v2: Swin v2's cosine attention, continuous position bias and residual post-norm.
        pretrained_window_size: v2: windows the bias networks were trained on, per stage; 0: same.
        pad_mode: `"roll_then_pad"` (timm) or `"pad_then_roll"` (torchvision, mmdetection); matters
            for maps that the window does not divide.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | tuple[int, ...] = 7,
        mlp_ratio: float = 4.0,
        v2: bool = False,
        pretrained_window_size: int | tuple[int, ...] = 0,
        pad_mode: PadMode = "roll_then_pad",
        drop_path_rate: float = 0.1,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        height, width = image_size(img_size, 32)
        windows = _per_stage(window_size, len(depths))
        trained = _per_stage(pretrained_window_size, len(depths))
        self.features_only = features_only
        # torchvision drops pixels that fill no patch; padding keeps them.
        pad = pad_mode == "roll_then_pad"
        self.patch_embed = PatchEmbed(in_chans, embed_dim, 4, 4, pad, **factory)
        rates = drop_path_rates(drop_path_rate, depths)
        self.layers = nn.ModuleList()
        for i in range(len(depths)):
            dim = embed_dim * 2**i
            merging = PatchMerging(dim // 2, norm_last=v2, **factory) if i else nn.Identity()
            map_size = (-(-height // (4 << i)), -(-width // (4 << i)))
            blocks = []
            for j, rate in enumerate(rates[i]):
                window = (windows[i], windows[i])
                shift = (windows[i] // 2 * (j % 2),) * 2
                if pad_mode == "roll_then_pad":
                    window, shift = _fit_to_map(map_size, window, shift)
                attn: nn.Module
                if v2:
                    attn = WindowAttentionV2(
                        dim, num_heads[i], window, shift, pad_mode, trained[i], **factory
                    )
                else:
                    attn = WindowAttention(dim, num_heads[i], window, shift, pad_mode, **factory)
                blocks.append(SwinBlock(dim, attn, mlp_ratio, rate, v2, **factory))
            self.layers.append(SwinStage(merging, blocks))
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        if not features_only:
            self.norm = nn.LayerNorm(self.num_features, **factory)
            self.head = ClassifierHead(self.num_features, num_classes, **factory)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.patch_embed(x)
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x.permute(0, 3, 1, 2))
        return features if self.features_only else self.head(self.norm(x))


def _per_stage(value: int | tuple[int, ...], stages: int) -> tuple[int, ...]:
    return (value,) * stages if isinstance(value, int) else tuple(value)


def _fit_to_map(
    map_size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Per axis: a window no larger than the map, and no shift if there is only one."""
    (height, width), (wh, ww) = map_size, window
    shift = (shift[0] if height > wh else 0, shift[1] if width > ww else 0)
    return (min(wh, height), min(ww, width)), shift


_T: dict[str, Any] = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_S: dict[str, Any] = {**_T, "depths": (2, 2, 18, 2)}
_B: dict[str, Any] = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_L: dict[str, Any] = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_W12: dict[str, Any] = {"window_size": 12, "img_size": 384}


def _v2(window: int, size: int, trained: int = 0) -> dict[str, Any]:
    # The last stage of the 192-pixel models they are tuned from has 6 x 6 tokens.
    pretrained = (trained, trained, trained, trained // 2) if trained else 0
    return {
        "v2": True,
        "window_size": window,
        "img_size": size,
        "pretrained_window_size": pretrained,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": _T,
    "swin_small_patch4_window7_224": _S,
    "swin_base_patch4_window7_224": _B,
    "swin_base_patch4_window12_384": {**_B, **_W12},
    "swin_large_patch4_window7_224": _L,
    "swin_large_patch4_window12_384": {**_L, **_W12},
    "swin_s3_tiny_224": {**_T, "window_size": (7, 7, 14, 7)},
    "swin_s3_small_224": {**_S, "window_size": (14, 14, 14, 7)},
    "swin_s3_base_224": {**_T, "depths": (2, 2, 30, 2), "window_size": (7, 7, 14, 7)},
    "swinv2_tiny_window8_256": {**_T, **_v2(8, 256)},
    "swinv2_tiny_window16_256": {**_T, **_v2(16, 256)},
    "swinv2_small_window8_256": {**_S, **_v2(8, 256)},
    "swinv2_small_window16_256": {**_S, **_v2(16, 256)},
    "swinv2_base_window8_256": {**_B, **_v2(8, 256)},
    "swinv2_base_window16_256": {**_B, **_v2(16, 256)},
    "swinv2_base_window12_192": {**_B, **_v2(12, 192)},
    "swinv2_base_window12to16_192to256": {**_B, **_v2(16, 256, 12)},
    "swinv2_base_window12to24_192to384": {**_B, **_v2(24, 384, 12)},
    "swinv2_large_window12_192": {**_L, **_v2(12, 192)},
    "swinv2_large_window12to16_192to256": {**_L, **_v2(16, 256, 12)},
    "swinv2_large_window12to24_192to384": {**_L, **_v2(24, 384, 12)},
}

register(Swin, VARIANTS)
