# SPDX-License-Identifier: Apache-2.0
"""Attention modules and convolutional pieces, one by one, against timm's modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import nn as torch_nn

from fastbb import nn

gcvit = pytest.importorskip("timm.models.gcvit")
pvt_v2 = pytest.importorskip("timm.models.pvt_v2")
swin = pytest.importorskip("timm.models.swin_transformer")
swin_v2 = pytest.importorskip("timm.models.swin_transformer_v2")

B, H, W, DIM, HEADS, WINDOW = 2, 8, 12, 24, 3, 4


def windows(x: Tensor) -> Tensor:
    return swin.window_partition(x, (WINDOW, WINDOW)).flatten(1, 2)


def from_windows(x: Tensor) -> Tensor:
    return swin.window_reverse(x.unflatten(1, (WINDOW, WINDOW)), (WINDOW, WINDOW), H, W)


def stirred(peer: torch_nn.Module, ours: torch_nn.Module) -> torch_nn.Module:
    """Weights at which every parameter matters, in both, under the same names."""
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    state = {k: v for k, v in peer.state_dict().items() if not k.endswith("_index")}
    ours.load_state_dict(state)
    return ours.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def local(x: Tensor) -> tuple[torch_nn.Module, Tensor]:
    peer = swin.WindowAttention(DIM, HEADS, window_size=WINDOW)
    ours = stirred(peer, nn.WindowAttention(DIM, HEADS, WINDOW))
    return ours, from_windows(peer(windows(x)))


def cosine(x: Tensor) -> tuple[torch_nn.Module, Tensor]:
    peer = swin_v2.WindowAttention(DIM, (WINDOW, WINDOW), HEADS, pretrained_window_size=(6, 6))
    ours = stirred(peer, nn.WindowAttentionV2(DIM, HEADS, WINDOW, pretrained_window_size=6))
    return ours, from_windows(peer(windows(x)))


def local_of_gcvit(x: Tensor) -> tuple[torch_nn.Module, Tensor]:
    peer = gcvit.WindowAttentionGlobal(DIM, HEADS, (WINDOW, WINDOW), use_global=False)
    ours = stirred(peer, nn.GlobalWindowAttention(DIM, HEADS, WINDOW, use_global=False))
    return ours, from_windows(peer(windows(x)))


def reduction(x: Tensor) -> tuple[torch_nn.Module, Tensor]:
    peer = pvt_v2.Attention(DIM, HEADS, sr_ratio=2).eval()
    ours = stirred(peer, nn.SpatialReductionAttention(DIM, HEADS, sr_ratio=2))
    return ours, peer(x.flatten(1, 2), (H, W)).view_as(x)


def no_reduction(x: Tensor) -> tuple[torch_nn.Module, Tensor]:
    peer = pvt_v2.Attention(DIM, HEADS, sr_ratio=1).eval()
    ours = stirred(peer, nn.SpatialReductionAttention(DIM, HEADS))
    return ours, peer(x.flatten(1, 2), (H, W)).view_as(x)


def linear_reduction(x: Tensor) -> tuple[torch_nn.Module, Tensor]:
    peer = pvt_v2.Attention(DIM, HEADS, linear_attn=True).eval()
    ours = stirred(peer, nn.SpatialReductionAttention(DIM, HEADS, linear=True))
    return ours, peer(x.flatten(1, 2), (H, W)).view_as(x)


ATTENTION = (local, cosine, local_of_gcvit, reduction, no_reduction, linear_reduction)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_equals_timms(case: Callable[[Tensor], tuple[torch_nn.Module, Tensor]]) -> None:
    x = torch.randn(B, H, W, DIM)
    with torch.no_grad():
        ours, expected = case(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_on_transposed_maps(
    case: Callable[[Tensor], tuple[torch_nn.Module, Tensor]],
) -> None:
    x = torch.randn(B, DIM, H, W)
    with torch.no_grad():
        ours, expected = case(x.permute(0, 2, 3, 1).contiguous())
        torch.testing.assert_close(ours(x.permute(0, 2, 3, 1)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_under_autocast_and_compile(
    case: Callable[[Tensor], tuple[torch_nn.Module, Tensor]],
) -> None:
    x = torch.randn(B, H, W, DIM)
    with torch.no_grad():
        ours, expected = case(x)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = ours(x)
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


def test_global_query_belongs_to_its_image() -> None:
    x, q = torch.randn(B, H, W, DIM), torch.randn(B, WINDOW, WINDOW, DIM)
    peer = gcvit.WindowAttentionGlobal(DIM, HEADS, (WINDOW, WINDOW), use_global=True)
    ours = stirred(peer, nn.GlobalWindowAttention(DIM, HEADS, WINDOW))
    with torch.no_grad():
        expected = from_windows(peer(windows(x), 5 * q))
        torch.testing.assert_close(ours(x, 5 * q), expected, rtol=1e-4, atol=1e-5)
        swapped = ours(x, 5 * q.flip(0))
    assert (swapped - expected).abs().max() > 0.1


def test_global_query_of_another_dtype_is_cast_to_the_keys() -> None:
    ours = nn.GlobalWindowAttention(DIM, HEADS, WINDOW)
    x, q = torch.randn(B, H, W, DIM), torch.randn(B, WINDOW, WINDOW, DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x, q), ours(x, q.bfloat16()))


@pytest.mark.parametrize("pad_mode", ["roll_then_pad", "pad_then_roll"])
def test_zero_padding_becomes_the_bias_of_the_projection(pad_mode: str) -> None:
    """A map that the window does not divide, against the same map padded by hand."""
    ours = nn.WindowAttention(DIM, HEADS, WINDOW, pad_mode=pad_mode).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        x = torch.randn(B, H - 1, W - 3, DIM)
        expected = ours(torch_nn.functional.pad(x, (0, 0, 0, 3, 0, 1)))[:, : H - 1, : W - 3]
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_all_parameters_get_gradients() -> None:
    x = torch.randn(B, H - 1, W, DIM)
    q = torch.randn(B, WINDOW, WINDOW, DIM, requires_grad=True)
    modules: list[tuple[torch_nn.Module, tuple[Tensor, ...]]] = [
        (nn.WindowAttention(DIM, HEADS, WINDOW, shift=2), (x,)),
        (nn.WindowAttentionV2(DIM, HEADS, WINDOW, shift=2), (x,)),
        (nn.GlobalWindowAttention(DIM, HEADS, WINDOW), (x, q)),
        (nn.SpatialReductionAttention(DIM, HEADS, sr_ratio=2), (x,)),
    ]
    for module, args in modules:
        module(*args).square().sum().backward()
        for name, p in module.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, (type(module).__name__, name)
    assert q.grad is not None and q.grad.abs().max() > 0


def nchw(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("dim", [16, 24, 96])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_global_query_generator_equals_timms(dim: int, levels: int) -> None:
    side = WINDOW * 2**levels
    peer = gcvit.FeatureBlock(dim, levels=levels)
    ours = stirred(peer, nn.GlobalQueryGenerator(dim, levels))
    x = torch.randn(B, side, side, dim)
    with torch.no_grad():
        expected = nchw(peer)(x)
        torch.testing.assert_close(ours(x, (WINDOW, WINDOW)), expected, rtol=1e-4, atol=1e-5)
        assert ours(x, (5, 3)).shape == (B, 5, 3, dim)


def test_stem_and_downsample_equal_timms() -> None:
    norm = gcvit.get_norm_layer("layernorm2d")
    act = gcvit.get_act_layer("gelu")
    stem = gcvit.Stem(3, DIM, act_layer=act, norm_layer=norm)
    down = gcvit.Downsample2d(DIM, 2 * DIM, act_layer=act, norm_layer=norm)
    images, x = torch.randn(B, 3, 30, 44), torch.randn(B, 7, 10, DIM)
    with torch.no_grad():
        ours = stirred(stem, nn.GlobalContextStem(3, DIM))
        expected = stem(images).permute(0, 2, 3, 1)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
        ours = stirred(down, nn.Downsample(DIM, 2 * DIM))
        torch.testing.assert_close(ours(x), nchw(down)(x), rtol=1e-4, atol=1e-4)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = nn.DropPath(0.25)
    x = torch.ones(4000, 2, 2, 3)
    out = drop(x)
    kept = out.flatten(1)
    assert ((kept == 0).all(1) | (kept == 1 / 0.75).all(1)).all()
    assert out.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.WindowAttention(24, 5, 4), "num_heads must divide dim 24, got 5"),
        (lambda: nn.WindowAttentionV2(24, 0, 4), "num_heads must divide dim 24, got 0"),
        (lambda: nn.GlobalWindowAttention(24, 7, 4), "num_heads must divide dim 24, got 7"),
        (lambda: nn.SpatialReductionAttention(24, 5), "num_heads must divide dim 24, got 5"),
        (lambda: nn.WindowAttention(24, 3, 0), "window_size must be"),
        (lambda: nn.WindowAttention(24, 3, (4, 4, 4)), "window_size must be"),
        (lambda: nn.WindowAttention(24, 3, 4, shift=4), "shift must be in"),
        (lambda: nn.WindowAttentionV2(24, 3, 4, shift=(1, -1)), "shift must be in"),
        (lambda: nn.WindowAttention(24, 3, 4, pad_mode="pad"), "pad_mode must be"),
        (lambda: nn.SpatialReductionAttention(24, 3, sr_ratio=0), "sr_ratio must be"),
        (lambda: nn.DropPath(1.0), "rate must be in"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], torch_nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_inputs_are_named() -> None:
    x = torch.randn(B, H, W, DIM)
    with pytest.raises(ValueError, match="GlobalWindowAttention: q_global must be given, got None"):
        nn.GlobalWindowAttention(DIM, HEADS, WINDOW)(x)
    with pytest.raises(ValueError, match="q"):
        nn.GlobalWindowAttention(DIM, HEADS, WINDOW)(x, torch.randn(B, 3, 3, DIM))
    for make in (nn.WindowAttention, nn.WindowAttentionV2):
        with pytest.raises(ValueError, match=r"x must be \[B, H, W, 24\]"):
            make(DIM, HEADS, WINDOW)(torch.randn(B, H * W, DIM))
    with pytest.raises(ValueError, match=r"x must be \[B, H, W, 24\]"):
        nn.SpatialReductionAttention(DIM, HEADS)(torch.randn(B, H, W, DIM + 1))
