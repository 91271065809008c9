# SPDX-License-Identifier: Apache-2.0
"""Weights in and out of every supported layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastbb import models
from fastbb.models import GCViT, PVTv2, Swin
from tiny_models import CLASSES, EVEN, images

SETTINGS = {"depths": (2, 2, 2, 2), "num_classes": CLASSES}
NETS = {
    "gcvit": lambda: GCViT(
        **SETTINGS, embed_dim=16, num_heads=(1, 2, 4, 8), img_size=64, layer_scale=0.1
    ),
    "swin": lambda: Swin(**SETTINGS, embed_dim=16, num_heads=(1, 2, 4, 8), window_size=2),
    "swinv2": lambda: Swin(
        **SETTINGS, embed_dim=16, num_heads=(1, 2, 4, 8), window_size=2, v2=True
    ),
    "pvt_v2": lambda: PVTv2(
        **SETTINGS, embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), mlp_ratios=(2.0,) * 4
    ),
}
LAYOUTS = [
    ("gcvit", "timm"),
    ("gcvit", "nvlabs"),
    ("swin", "timm"),
    ("swin", "torchvision"),
    ("swin", "microsoft"),
    ("swinv2", "torchvision"),
    ("swinv2", "microsoft"),
    ("pvt_v2", "timm"),
    ("pvt_v2", "original"),
]

# Keys as the libraries themselves write them, with their shapes for the nets above.
WRITTEN = {
    ("gcvit", "nvlabs"): {
        "patch_embed.proj.weight": [16, 3, 3, 3],
        "patch_embed.proj.bias": [16],
        "patch_embed.conv_down.norm1.weight": [16],
        "patch_embed.conv_down.conv.0.weight": [16, 1, 3, 3],
        "patch_embed.conv_down.conv.2.fc.0.weight": [8, 16],
        "patch_embed.conv_down.conv.2.fc.2.weight": [16, 8],
        "patch_embed.conv_down.conv.3.weight": [16, 16, 1, 1],
        "patch_embed.conv_down.reduction.weight": [16, 16, 3, 3],
        "levels.0.downsample.conv.3.weight": [16, 16, 1, 1],
        "levels.0.downsample.reduction.weight": [32, 16, 3, 3],
        "levels.2.downsample.norm2.bias": [128],
        "levels.0.q_global_gen.to_q_global.2.conv.2.fc.0.weight": [8, 16],
        "levels.3.q_global_gen.to_q_global.0.conv.0.weight": [128, 1, 3, 3],
        "levels.1.blocks.1.attn.relative_position_bias_table": [9, 2],
        "levels.1.blocks.1.attn.qkv.weight": [64, 32],
        "levels.1.blocks.0.attn.qkv.weight": [96, 32],
        "levels.1.blocks.0.gamma1": [32],
        "levels.1.blocks.0.mlp.fc2.bias": [32],
        "norm.weight": [128],
        "head.weight": [CLASSES, 128],
    },
    ("swin", "torchvision"): {
        "features.0.0.weight": [16, 3, 4, 4],
        "features.0.2.bias": [16],
        "features.1.0.attn.relative_position_bias_table": [9, 1],
        "features.1.1.mlp.0.weight": [64, 16],
        "features.1.1.mlp.3.weight": [16, 64],
        "features.2.reduction.weight": [32, 64],
        "features.7.1.norm2.weight": [128],
        "norm.weight": [128],
        "head.weight": [CLASSES, 128],
    },
    ("swinv2", "torchvision"): {
        "features.3.0.attn.qkv.bias": [96],
        "features.3.0.attn.cpb_mlp.2.weight": [2, 512],
        "features.3.0.attn.logit_scale": [2, 1, 1],
    },
    ("swin", "microsoft"): {
        "patch_embed.norm.weight": [16],
        "layers.0.downsample.reduction.weight": [32, 64],
        "layers.0.blocks.1.attn.qkv.bias": [48],
        "head.bias": [CLASSES],
    },
    ("pvt_v2", "original"): {
        "patch_embed1.proj.weight": [16, 3, 7, 7],
        "patch_embed4.norm.weight": [64],
        "block1.0.attn.sr.weight": [16, 16, 8, 8],
        "block2.1.mlp.dwconv.dwconv.weight": [64, 1, 3, 3],
        "norm4.bias": [64],
        "head.weight": [CLASSES, 64],
    },
}


def filled(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return net


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@pytest.mark.parametrize("named", [True, False])
def test_round_trip(name: str, layout: str, named: bool) -> None:
    net = filled(name)
    state = models.export_state_dict(net, layout)
    other = NETS[name]().eval()
    models.load_state_dict(other, state, source=layout if named else "auto")
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize(("name", "layout"), WRITTEN)
def test_keys_as_the_library_writes_them(name: str, layout: str) -> None:
    state = models.export_state_dict(filled(name), layout)
    for key, shape in WRITTEN[name, layout].items():
        assert list(state[key].shape) == shape, key
    leftovers = [k for k in state if k.startswith(("stages.", "stem.")) or ".se." in k]
    assert leftovers == []


@pytest.mark.parametrize("version", ["swin", "swinv2"])
def test_torchvision_loads_the_export(version: str) -> None:
    tv = pytest.importorskip("torchvision.models.swin_transformer")
    net = Swin(
        depths=(2, 2, 2, 2),
        embed_dim=16,
        num_heads=(1, 2, 4, 8),
        window_size=4,
        v2=version == "swinv2",
        pad_mode="pad_then_roll",
        num_classes=CLASSES,
    ).eval()
    options = {}
    if version == "swinv2":
        options = {
            "block": tv.SwinTransformerBlockV2,
            "downsample_layer": tv.PatchMergingV2,
        }
    theirs = tv.SwinTransformer(
        [4, 4], 16, [2, 2, 2, 2], [1, 2, 4, 8], [4, 4], num_classes=CLASSES, **options
    ).eval()
    result = theirs.load_state_dict(models.export_state_dict(net, "torchvision"), strict=False)
    assert result.unexpected_keys == []
    assert all("relative_" in k for k in result.missing_keys)
    with torch.no_grad():
        assert (theirs(images(EVEN)) - net(images(EVEN))).abs().max() <= 1e-4


def test_timm_loads_ours_strictly() -> None:
    timm = pytest.importorskip("timm")
    net = models.create_model("pvt_v2_b0", num_classes=CLASSES)
    timm.create_model("pvt_v2_b0", num_classes=CLASSES).load_state_dict(net.state_dict())


def test_trainer_checkpoints_are_unwrapped() -> None:
    net = filled("gcvit")
    state = {f"module.{k}": v for k, v in models.export_state_dict(net, "nvlabs").items()}
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    other = NETS["gcvit"]()
    checkpoint = {"epoch": 3, "state_dict": zeros, "state_dict_ema": state}
    models.load_state_dict(other, checkpoint)
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_computed_buffers_of_other_releases_are_dropped() -> None:
    net = filled("swin")
    state = dict(net.state_dict())
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    models.load_state_dict(NETS["swin"](), state)


def test_tables_are_resized_only_on_request() -> None:
    small = filled("swin")
    big = Swin(**SETTINGS, embed_dim=16, num_heads=(1, 2, 4, 8), window_size=4)
    with pytest.raises(ValueError, match="relative_position_bias_table has shape"):
        models.load_state_dict(big, small.state_dict())
    models.load_state_dict(big, small.state_dict(), resize_tables=True)
    table = big.state_dict()["layers.0.blocks.0.attn.relative_position_bias_table"]
    source = small.state_dict()["layers.0.blocks.0.attn.relative_position_bias_table"]
    assert table.shape == (49, 1)
    # The centre of the grid (offset 0) stays where it is.
    assert table[24, 0] == pytest.approx(source[4, 0].item(), abs=1e-5)


def test_misfits_are_named_and_change_nothing() -> None:
    net = filled("swin")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {k: v + 1 for k, v in net.state_dict().items()}
    state["extra"] = torch.zeros(1)
    del state["norm.weight"]
    state["head.fc.weight"] = torch.zeros(3, 128)
    with pytest.raises(ValueError) as caught:
        models.load_state_dict(net, state, source="timm")
    for text in ("missing norm.weight", "unexpected extra", "head.fc.weight has shape [3, 128]"):
        assert text in str(caught.value)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


def test_bad_requests() -> None:
    net = filled("pvt_v2")
    with pytest.raises(ValueError, match=r"source must be one of \['original', 'timm'\]"):
        models.load_state_dict(net, {}, source="nvlabs")
    with pytest.raises(ValueError, match="target must be one of"):
        models.export_state_dict(net, "torchvision")
    with pytest.raises(TypeError, match="model must be a fastbb backbone, got Linear"):
        models.export_state_dict(nn.Linear(1, 1), "timm")
    with pytest.raises(ValueError, match="must map names to tensors, got epoch: int"):
        models.load_state_dict(net, {"epoch": 1})
