# SPDX-License-Identifier: Apache-2.0
"""Shrunken models of every supported source family, with weights at which nothing hides.

Libraries initialise biases and tables close to zero, where a lost bias or a wrong mask changes
the logits less than rounding does. `build` gives every tensor a size that matters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from timm.models.gcvit import GlobalContextVit
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from fastbb import accelerate_

CLASSES = 10

Size = tuple[int, int]
EVEN: Size = (64, 64)
ODD: Size = (68, 100)
"""Maps of 17 x 25 and 9 x 13: no stage is divisible by the window of 4."""
SMALL: Size = (36, 36)
"""Maps of 9 x 9, 5 x 5 and 3 x 3: the last is smaller than the window."""
THIN: Size = (64, 16)
"""Maps of 16 x 4, 8 x 2 and 4 x 1: windows are shifted along one axis only."""


def _gcvit(size: Size, **options: object) -> nn.Module:
    return GlobalContextVit(
        img_size=size,
        depths=(2, 2, 2, 2),
        embed_dim=16,
        num_heads=(1, 2, 4, 8),
        num_classes=CLASSES,
        **options,
    )


def _swin(cls: type[nn.Module], size: Size = EVEN, **options: object) -> nn.Module:
    sizes = {"depths": (2, 2, 2), "embed_dim": 16, "num_heads": (1, 2, 4), "window_size": 4}
    return cls(img_size=size, num_classes=CLASSES, **sizes, **options)


def _pvt(**options: object) -> nn.Module:
    return PyramidVisionTransformerV2(
        embed_dims=(16, 32),
        depths=(2, 1),
        num_heads=(1, 2),
        sr_ratios=(4, 1),
        mlp_ratios=(2, 2),
        num_classes=CLASSES,
        **options,
    )


def _torchvision(**options: object) -> nn.Module:
    return TorchvisionSwin([4, 4], 16, [2, 2, 2], [1, 2, 4], [4, 4], num_classes=CLASSES, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Size, ...]]] = {
    "gcvit": (lambda: _gcvit(EVEN), (EVEN,)),
    "gcvit_rectangular": (lambda: _gcvit((96, 64), layer_scale=0.5), ((96, 64),)),
    "swin": (lambda: _swin(SwinTransformer), (EVEN,)),
    "swin_odd": (lambda: _swin(SwinTransformer, ODD), (ODD,)),
    "swin_thin": (lambda: _swin(SwinTransformer, THIN), (THIN,)),
    "swin_any_size": (
        lambda: _swin(SwinTransformer, strict_img_size=False, head_dim=8),
        (EVEN, ODD, SMALL),
    ),
    "swin_always_partition": (
        lambda: _swin(SwinTransformer, strict_img_size=False, always_partition=True),
        (EVEN, ODD, SMALL),
    ),
    "swinv2": (lambda: _swin(SwinTransformerV2), (EVEN,)),
    "swinv2_odd": (
        lambda: _swin(SwinTransformerV2, ODD, pretrained_window_sizes=(6, 6, 6)),
        (ODD,),
    ),
    "swinv2_thin": (lambda: _swin(SwinTransformerV2, THIN), (THIN,)),
    "swinv2_any_size": (
        lambda: _swin(SwinTransformerV2, strict_img_size=False, qkv_bias=False),
        (EVEN, ODD, SMALL),
    ),
    "swinv2_always_partition": (
        lambda: _swin(SwinTransformerV2, strict_img_size=False, always_partition=True),
        (EVEN, ODD, SMALL),
    ),
    "pvt_v2": (lambda: _pvt(), (EVEN, ODD)),
    "pvt_v2_linear": (lambda: _pvt(linear=True), (EVEN, ODD)),
    "torchvision_swin": (lambda: _torchvision(), (EVEN, THIN, SMALL, ODD)),
    "torchvision_swin_v2": (
        lambda: _torchvision(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        (EVEN, THIN, SMALL, ODD),
    ),
}
"""name -> (constructor, image sizes that it accepts)"""

FAMILIES = ("gcvit", "swin_odd", "swinv2_odd", "pvt_v2", "torchvision_swin", "torchvision_swin_v2")
"""One model of each source class, with padding where the library has any."""


def build(name: str, seed: int = 0) -> nn.Module:
    """Model `name` in evaluation mode with seeded weights."""
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("logit_scale"):
                p.uniform_(1.5, 5.5)  # the clamp is at ln 100 = 4.6
            elif key.endswith("relative_position_bias_table"):
                p.normal_(std=2.0)
            elif "cpb_mlp" in key:
                p.normal_(std=0.3)
            elif p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.5)
            else:
                sharpness = 2.0 if any(n in key for n in ("qkv", ".q.", ".kv.")) else 1.0
                p.normal_(std=sharpness / p[0].numel() ** 0.5)
    return model


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The original and its accelerated copy."""
    original = build(name)
    fast = copy.deepcopy(original)
    accelerate_(fast, strict=True)
    return original, fast


def images(size: Size, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def first_size(name: str) -> Size:
    return MODELS[name][1][0]


def largest_difference(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> float:
    return max(
        (x.detach().float() - y.detach().float()).abs().max().item()
        for x, y in zip(a, b, strict=True)
    )


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything that all-or-nothing is about."""
    state = tensors(model)
    return (
        classes(model),
        [sorted(m.__dict__) for m in model.modules()],
        {n: (id(t), t.dtype, t.data_ptr()) for n, t in state.items()},
        {n: t.detach().clone() for n, t in state.items()},
    )


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = snapshot(model)
    assert after[:3] == before[:3]
    assert all(torch.equal(after[3][n], t) for n, t in before[3].items())
