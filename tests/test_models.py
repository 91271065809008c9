# SPDX-License-Identifier: Apache-2.0
"""fastbb's backbones against timm's and torchvision's: logits, gradients, sizes, features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastbb
from fastbb import models
from fastbb.models import GCViT, PVTv2, Swin
from tiny_models import CLASSES, EVEN, ODD, SMALL, build, images, largest_difference

LOGITS = 1e-4

_GCVIT: dict[str, Any] = {"depths": (2, 2, 2, 2), "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
_SWIN: dict[str, Any] = {
    "depths": (2, 2, 2),
    "embed_dim": 16,
    "num_heads": (1, 2, 4),
    "window_size": 4,
}
_PVT: dict[str, Any] = {
    "embed_dims": (16, 32),
    "depths": (2, 1),
    "num_heads": (1, 2),
    "sr_ratios": (4, 1),
    "mlp_ratios": (2.0, 2.0),
}
_TORCHVISION: dict[str, Any] = {**_SWIN, "pad_mode": "pad_then_roll"}

# name in tiny_models -> (fastbb class, settings, image sizes)
PEERS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "gcvit": (GCViT, {**_GCVIT, "img_size": EVEN}, (EVEN,)),
    "gcvit_rectangular": (GCViT, {**_GCVIT, "img_size": (96, 64), "layer_scale": 0.5}, ((96, 64),)),
    "swin": (Swin, {**_SWIN, "img_size": EVEN}, (EVEN,)),
    "swin_odd": (Swin, {**_SWIN, "img_size": ODD}, (ODD,)),
    "swinv2": (Swin, {**_SWIN, "img_size": EVEN, "v2": True}, (EVEN,)),
    "swinv2_odd": (
        Swin,
        {**_SWIN, "img_size": ODD, "v2": True, "pretrained_window_size": 6},
        (ODD,),
    ),
    "pvt_v2": (PVTv2, _PVT, (EVEN, ODD)),
    "pvt_v2_linear": (PVTv2, {**_PVT, "linear": True}, (EVEN, ODD)),
    "torchvision_swin": (Swin, _TORCHVISION, (EVEN, ODD, SMALL, (42, 75))),
    "torchvision_swin_v2": (Swin, {**_TORCHVISION, "v2": True}, (EVEN, ODD, SMALL, (42, 75))),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The peer with weights at which nothing hides, and fastbb's model with the same weights."""
    peer = build(name)
    kind, settings, _ = PEERS[name]
    ours = kind(**settings, num_classes=CLASSES, drop_path_rate=0.0).eval()
    models.load_state_dict(ours, peer.state_dict())
    return peer, ours


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_equal_the_peers(name: str, batch: int) -> None:
    peer, ours = pair(name)
    for size in PEERS[name][2]:
        x = images(size, batch)
        with torch.no_grad():
            expected = peer(x)
            assert expected.std() > 0.1
            assert (ours(x) - expected).abs().max() <= LOGITS, size


@pytest.mark.parametrize("name", ["gcvit", "swin_odd", "swinv2_odd", "pvt_v2"])
def test_gradients_equal_the_peers(name: str) -> None:
    peer, ours = pair(name)
    x = images(PEERS[name][2][0])
    for model in (peer, ours):
        model(x).square().sum().backward()
    expected = {k: p.grad for k, p in peer.named_parameters()}
    for key, p in ours.named_parameters():
        scale = expected[key].abs().max().clamp(min=1e-3)
        assert (p.grad - expected[key]).abs().max() <= 1e-3 * scale, key


def test_global_query_belongs_to_its_image() -> None:
    _, ours = pair("gcvit")
    x = images(EVEN, batch=3)
    with torch.no_grad():
        together = ours(x)
        alone = torch.cat([ours(x[i : i + 1]) for i in range(3)])
        exchanged = ours(x[[1, 0, 2]])
    assert (together - alone).abs().max() <= LOGITS
    assert (together[0] - together[1]).abs().max() > 0.1
    assert (exchanged[[1, 0, 2]] - together).abs().max() <= LOGITS


# Millions of parameters: GC ViT's measured in timm or published, the others' published.
PARAMETERS = {
    "gcvit_xxtiny": 12.00,
    "gcvit_xtiny": 19.98,
    "gcvit_tiny": 28.22,
    "gcvit_tiny2": 34.5,
    "gcvit_small": 51.09,
    "gcvit_small2": 68.6,
    "gcvit_base": 90.32,
    "gcvit_large": 202.1,
    "gcvit_large_21k": 202.1,
    "gcvit_large_384_21k": 202.9,
    "gcvit_large_512_21k": 203.8,
    "swin_tiny_patch4_window7_224": 28.29,
    "swin_small_patch4_window7_224": 49.61,
    "swin_base_patch4_window7_224": 87.77,
    "swin_large_patch4_window7_224": 196.53,
    "swinv2_tiny_window8_256": 28.35,
    "pvt_v2_b0": 3.67,
    "pvt_v2_b1": 14.01,
    "pvt_v2_b2": 25.36,
    "pvt_v2_b2_li": 22.55,
    "pvt_v2_b3": 45.24,
    "pvt_v2_b4": 62.56,
    "pvt_v2_b5": 81.96,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    model = models.create_model(name, device="meta")
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(PARAMETERS[name], rel=2e-3)


@pytest.mark.parametrize("name", models.list_models())
def test_keys_and_shapes_are_timms(name: str) -> None:
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        assert name.startswith(("gcvit_", "binary_vit_", "bipft_", "bit_", "bibert_"))
        return
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=1000).state_dict()
    ours = models.create_model(name, device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (lambda: GCViT(**_GCVIT, img_size=64, features_only=True), (70, 90)),
        (lambda: Swin(**_SWIN, img_size=64, features_only=True), (70, 90)),
        (lambda: PVTv2(**_PVT, features_only=True), (70, 90)),
    ],
)
def test_features_at_sizes_windows_do_not_divide(model: Any, size: tuple[int, int]) -> None:
    net = model().eval()
    with torch.no_grad():
        features = net(images(size))
    strides = [4 * 2**i for i in range(len(features))]
    for feature, stride in zip(features, strides, strict=True):
        assert feature.isfinite().all()
        assert abs(feature.shape[2] - size[0] / stride) < 1.5
        assert abs(feature.shape[3] - size[1] / stride) < 1.5
    assert [f.shape[1] for f in features] == [
        features[0].shape[1] * 2**i for i in range(len(features))
    ]


def test_padding_does_not_leak_between_images() -> None:
    """A free-size GC ViT map: an image's features do not depend on its batch."""
    net = GCViT(**_GCVIT, img_size=64, num_classes=CLASSES).eval()
    x = images((70, 90))
    with torch.no_grad():
        assert (net(x)[:1] - net(x[:1])).abs().max() <= LOGITS


@pytest.mark.parametrize("name", ["gcvit", "swinv2_odd", "pvt_v2"])
def test_compile_without_graph_break(name: str) -> None:
    _, ours = pair(name)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = images(PEERS[name][2][0])
    with torch.no_grad():
        assert (compiled(x) - ours(x)).abs().max() <= LOGITS


@pytest.mark.parametrize("name", ["gcvit", "swin", "swinv2", "pvt_v2"])
def test_autocast_stays_close(name: str) -> None:
    _, ours = pair(name)
    x = images(PEERS[name][2][0])
    with torch.no_grad():
        expected = ours(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(x)
    assert torch.cosine_similarity(out.float(), expected, dim=1).min() > 0.98


def test_fused_and_reference_paths_agree() -> None:
    _, ours = pair("swin_odd")
    x = images(ODD)
    with torch.no_grad():
        fused = ours(x)
        with fastbb.use_fused(False):
            assert largest_difference([fused], [ours(x)]) <= LOGITS


def test_no_classes_gives_pooled_features() -> None:
    for net in (GCViT(**_GCVIT, img_size=64, num_classes=0), PVTv2(**_PVT, num_classes=0)):
        assert net(images(EVEN)).shape == (2, net.num_features)


def test_drop_path_acts_in_training_only() -> None:
    net = Swin(**_SWIN, img_size=64, num_classes=CLASSES, drop_path_rate=0.5)
    x = images(EVEN)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match=r"create_model: name .*gcvit_tiny.* got 'gcvit_tin'"):
        models.create_model("gcvit_tin")
    with pytest.raises(ValueError, match="create_model: img_size must be at least 32"):
        models.create_model("gcvit_xxtiny", img_size=16)
    with pytest.raises(TypeError):
        models.create_model("pvt_v2_b0", no_such_setting=1)
