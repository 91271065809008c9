# SPDX-License-Identifier: Apache-2.0
"""Convolutional pieces of the backbones on channels-last maps `[B, H, W, C]`.

A channels-last map seen as `[B, C, H, W]` has torch's channels_last memory format, so the
convolutions read and write it without a copy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies an NCHW layer to a channels-last map."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SqueezeExcite(nn.Module):
    """x * sigmoid(fc2(gelu(fc1(mean(x))))), no biases (Hu et al. 2018).

    The hidden width is a quarter of `dim`, in multiples of 8 as in timm.
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        hidden = max(8, (dim // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=False, **factory)
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((1, 2))
        s = F.linear(F.gelu(F.linear(s, self.fc1.weight.flatten(1))), self.fc2.weight.flatten(1))
        return x * s.sigmoid()[:, None, None]


class MBConv(nn.Module):
    """x + PW1x1(SE(GELU(DW3x3(x)))): GC ViT's Fused-MBConv (no norm, no expansion, no biases)."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **factory)
        self.se = SqueezeExcite(dim, **factory)
        self.conv_pw = nn.Conv2d(dim, dim, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + conv(self.conv_pw, self.se(F.gelu(conv(self.conv_dw, x))))


class Downsample(nn.Module):
    """LN, MBConv, Conv3x3 stride 2, LN: GC ViT's reduction `[B, H, W, C]` -> `[B, H/2, W/2, C']`.

    The residual inside MBConv adds onto the normalised map.
    """

    def __init__(self, dim: int, dim_out: int, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.conv_block = MBConv(dim, **factory)
        self.reduction = nn.Conv2d(dim, dim_out, 3, 2, 1, bias=False, **factory)
        self.norm2 = nn.LayerNorm(dim_out, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(conv(self.reduction, self.conv_block(self.norm1(x))))


class GlobalQueryGenerator(nn.Module):
    """GC ViT's global query: MBConv and 3x3 stride-2 max pooling, `levels` times.

    With no level one MBConv remains. Returns `[B, H / 2^levels, W / 2^levels, C]`; `size` resizes
    it (bicubic) to the window where that differs, as in detection at free resolutions.
    """

    def __init__(self, dim: int, levels: int, **factory: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        self.levels = levels
        for i in range(max(1, levels)):
            self.blocks.add_module(f"conv{i + 1}", MBConv(dim, **factory))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < self.levels:
                x = F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
        if tuple(x.shape[1:3]) != tuple(size):
            x = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bicubic", align_corners=False)
            x = x.permute(0, 2, 3, 1)
        return x


class GlobalContextStem(nn.Module):
    """Conv3x3 stride 2 with bias, then a `Downsample` without change of channels: /4."""

    def __init__(self, in_chans: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, 2, 1, **factory)
        self.down = Downsample(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` image -> `[B, H/4, W/4, dim]`."""
        return self.down(self.conv1(x).permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    """Convolution of an image (`[B, C, H, W]`) to tokens, then LN: `[B, H/stride, W/stride, dim]`.

    Non-overlapping (`kernel == stride`, Swin) or overlapping (PVT v2). `pad` completes the image
    with zeros on the right and bottom to whole patches; without it a rest is dropped.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel: int,
        stride: int,
        pad: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.pad = pad
        padding = kernel // 2 if kernel > stride else 0
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding, **factory)
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            x = F.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2x2 neighbours to one token: `[B, H, W, C]` -> `[B, H/2, W/2, 2C]` (Swin, section 3.1).

    Neighbours are ordered (0,0), (1,0), (0,1), (1,1); odd sides are zero-padded. v1 normalises
    the 4C gathered channels, v2 (`norm_last`) the 2C reduced ones.
    """

    def __init__(self, dim: int, norm_last: bool = False, **factory: Any) -> None:
        super().__init__()
        self.norm_last = norm_last
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **factory)
        self.norm = nn.LayerNorm(2 * dim if norm_last else 4 * dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        B, H, W, C = x.shape
        x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.norm(self.reduction(x)) if self.norm_last else self.reduction(self.norm(x))


class ConvMlp(nn.Module):
    """PVT v2's MLP: fc1, (ReLU in linear variants), DW3x3 with bias, GELU, fc2."""

    def __init__(self, dim: int, hidden: int, linear: bool = False, **factory: Any) -> None:
        super().__init__()
        self.linear = linear
        self.fc1 = nn.Linear(dim, hidden, **factory)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **factory)
        self.fc2 = nn.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.linear:
            x = F.relu(x)
        return self.fc2(F.gelu(conv(self.dwconv, x)))
