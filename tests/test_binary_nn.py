# SPDX-License-Identifier: Apache-2.0
"""Binary modules: against the definitions, packed against latent, states, scales, dropout."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb import nn as fnn
from fastbb import reference
from fastbb.nn import BinaryBertLayer, BinaryEmbedding, BinaryLinear, BinarySelfAttention
from tiny_binary import PRESETS, calibrated, unused, vivid

SETTINGS = ("kind", "ste", "center", "scale", "zero_policy", "weight_ste")


def linear(preset: str, down: bool = False, k: int = 40, n: int = 24, **more: Any) -> BinaryLinear:
    rules = fnn.PRESETS[preset]
    settings = dict(rules.ffn_down if down else rules.linear)
    return vivid(BinaryLinear(k, n, **{**settings, **more}))


def expected_linear(layer: BinaryLinear, x: Tensor) -> Tensor:
    settings = {name: getattr(layer, name) for name in SETTINGS}
    return reference.binary_linear_train(
        x, layer.weight, layer.bias, alpha=layer.alpha, shift=layer.shift, **settings
    )


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_linear_is_its_definition(preset: str, down: bool) -> None:
    layer = linear(preset, down)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 5, 40, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = layer(x), expected_linear(twin, y)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), out)


def test_linear_takes_over_a_float_one() -> None:
    source = nn.Linear(40, 24).eval()
    layer = BinaryLinear.from_float(source, kind="plus", shift=False)
    assert layer.weight is source.weight and layer.bias is source.bias
    assert not layer.training and layer.shift is None
    assert set(layer.state_dict()) == {"weight", "bias", "alpha"}
    assert isinstance(layer, nn.Linear)
    with pytest.raises(TypeError, match="linear must be a Linear"):
        BinaryLinear.from_float(nn.Conv2d(1, 1, 1))
    bare = BinaryLinear.from_float(nn.Linear(8, 8, bias=False), elastic=False)
    assert bare.bias is None and bare.alpha is None and bare(torch.randn(3, 8)).shape == (3, 8)


@pytest.mark.parametrize("k", [1, 40, 129])
@pytest.mark.parametrize("kind", ["ternary", "plus", "minus", "unsigned"])
@pytest.mark.parametrize("preset", ["bit", "bibert"])
def test_packed_linear_equals_the_latent_one(preset: str, kind: str, k: int) -> None:
    elastic = preset == "bit" or kind == "unsigned"
    layer = linear(preset, k=k, kind=kind, elastic=elastic)
    packed = layer.to_packed()
    x = torch.randn(3, 7, k)
    x[0, 0] = 0.0 if layer.shift is None else -layer.shift.detach()
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
        half = packed(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert packed.weight_bits.dtype == torch.uint8
    assert packed.weight_bits.shape == (24, reference.bit_row_bytes(k))
    assert not list(packed.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_feed_forward_from_bits_to_bits(preset: str) -> None:
    rules = fnn.PRESETS[preset]
    up, down = linear(preset, n=136), linear(preset, True, k=136, n=40)
    x = torch.randn(4, 40)
    act = F.relu if rules.activation == "relu" else F.gelu
    with torch.no_grad():
        expected = down(act(up(x)))
        first, second = up.to_packed(), down.to_packed()
        bits = first(x, activation=rules.activation, then=second)
        assert bits.dtype == torch.uint8
        torch.testing.assert_close(second(bits, dtype=x.dtype), expected, rtol=1e-5, atol=1e-5)


def test_packed_states_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for layer in (linear("bipft"), linear("bibert"), BinaryEmbedding(20, 40)):
        packed = layer.to_packed()
        if isinstance(layer, BinaryEmbedding):
            fresh: nn.Module = fnn.PackedBinaryEmbedding(20, 40)
            x = torch.arange(20)
        else:
            elastic = layer.alpha is not None
            fresh = fnn.PackedBinaryLinear(
                40, 24, scale=layer.scale, elastic=elastic, shift=elastic
            )
            x = torch.randn(3, 40)
        file = tmp_path / "layer.safetensors"
        safetensors.save_file(packed.state_dict(), file)
        fresh.load_state_dict(safetensors.load_file(file))
        assert torch.equal(fresh(x), packed(x))
        assert str(fresh) == str(packed)


def test_packed_states_are_checked() -> None:
    state = linear("bibert", k=100).to_packed().state_dict()

    def load(k: int, n: int = 24, **changed: Tensor) -> None:
        layer = fnn.PackedBinaryLinear(k, n, scale="row", elastic=False, shift=False)
        layer.load_state_dict({**state, **changed})

    load(100)
    with pytest.raises(RuntimeError, match=r"must hold .* = \[24, 128\], got \[24, 100\]"):
        load(128)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_bits"):
        load(100, 25)
    with pytest.raises(RuntimeError, match=r"must be uint8, got torch.float32"):
        load(100, weight_bits=state["weight_bits"].float())
    with pytest.raises(RuntimeError, match=r"must be 0 from element 100 on"):
        load(100, weight_bits=torch.full_like(state["weight_bits"], 255))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        layer = fnn.PackedBinaryLinear(100, 24, scale="row", elastic=False, shift=False)
        layer.load_state_dict({k: v for k, v in state.items() if k != "weight_scale"})


def test_packed_layers_have_no_backward() -> None:
    packed = linear("bipft").to_packed().train()
    x = torch.randn(2, 40, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"must not require a gradient.*no backward"):
        packed(x)
    with torch.no_grad():
        packed(x)
    packed(x.detach())


def test_scales_stay_in_float32() -> None:
    packed = linear("bipft").to_packed()
    scale = packed.weight_scale.clone()
    packed.to(torch.bfloat16)
    assert packed.bias is not None and packed.bias.dtype == torch.bfloat16
    assert torch.equal(packed.weight_scale, scale) and packed.weight_scale.dtype == torch.float32
    table = BinaryEmbedding(20, 40).to_packed().half()
    assert table(torch.tensor([3])).dtype == torch.float16
    assert table.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_embedding_is_its_definition(preset: str, padding: int | None) -> None:
    settings = fnn.PRESETS[preset].embedding
    table = vivid(BinaryEmbedding(20, 40, padding, **settings))
    ids = torch.tensor([[1, 3, 3], [19, 1, 1]])
    weight = table.weight.detach().clone().requires_grad_()
    binary = reference.binarize_weight(
        weight, settings.get("center", "tensor"), "row", ste=settings.get("weight_ste", "identity")
    )
    expected = F.embedding(ids, binary, padding)
    out = table(ids)
    assert torch.equal(out, expected)
    factor = torch.randn_like(out)
    (out * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(table.weight.grad, weight.grad)
    assert torch.equal(table.to_packed()(ids), out)
    assert table(ids[:0]).shape == (0, 3, 40)


def test_embedding_takes_over_a_float_one() -> None:
    source = nn.Embedding(20, 8, padding_idx=2)
    table = BinaryEmbedding.from_float(source)
    assert table.weight is source.weight and table.padding_idx == 2
    with pytest.raises(ValueError, match="must have no max_norm"):
        BinaryEmbedding.from_float(nn.Embedding(4, 4, max_norm=1.0))


def attention(preset: str, rank: int = 0, **more: Any) -> BinarySelfAttention:
    module = vivid(BinarySelfAttention(32, 4, preset=preset, estimator_rank=rank, **more))
    if module.alphas is not None:
        with torch.no_grad():
            module.alphas[3] = 0.15
    return module


def expected_attention(module: BinarySelfAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    """BiPFT's formulas, term by term."""

    def heads(layer: nn.Module) -> Tensor:
        return expected_linear(layer, x).unflatten(-1, (4, 8)).transpose(1, 2)  # type: ignore[arg-type]

    binary = reference.elastic_binarize
    softmax = module.preset.probs == "softmax"
    alphas = [None] * 4 if module.alphas is None else list(module.alphas.split(1))
    ste = module.preset.attention_ste
    q, k, v = (
        binary(heads(layer), alpha, ste=ste)
        for layer, alpha in zip((module.query, module.key, module.value), alphas, strict=False)
    )
    scores = q @ k.mT
    if hasattr(module, "q_p"):
        q_p, k_p, q_m, k_m = (getattr(module, name)(x) for name in ("q_p", "k_p", "q_m", "k_m"))
        scores = scores + (q_m @ k_p.mT + q_p @ k_m.mT + q_p @ k_p.mT).unsqueeze(1)
    scores = scores / 8**0.5
    if mask is not None:
        scores = scores + (mask[:, None, None] if mask.dim() == 2 else mask[:, None])
    if softmax:
        probs = binary(scores.softmax(-1), alphas[3], kind="unsigned")
    else:
        probs = (scores > 0).to(scores.dtype)
    out = probs @ v
    if hasattr(module, "q_p"):
        out = out + probs @ module.v_p(x).unsqueeze(1)  # type: ignore[operator]
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [0, 2, 3])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_attention_is_its_definition(preset: str, rank: int, masked: int) -> None:
    module = attention(preset, rank)
    x = torch.randn(2, 6, 32)
    mask = None
    if masked:
        mask = torch.zeros((2, 6) if masked == 2 else (2, 6, 6))
        mask[1, ..., 4:] = torch.finfo(torch.float32).min
    out = module(x, mask)
    assert out.detach().std() > 0.1
    torch.testing.assert_close(out, expected_attention(module, x, mask), rtol=1e-4, atol=1e-4)


def test_dropout_follows_torchs_seed() -> None:
    module = attention("bipft", dropout=0.4).train()
    x = torch.randn(2, 6, 32)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first) and not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(x), module(x))


def layer(preset: str, **settings: Any) -> tuple[BinaryBertLayer, Tensor]:
    module = vivid(BinaryBertLayer(32, 4, 48, preset=preset, **settings))
    x = torch.randn(3, 6, 32)
    return calibrated(module, x), x


def pack(module: Any) -> Any:
    """Every linear layer of a copy, packed."""
    packed = copy.deepcopy(module)
    for parent in list(packed.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BinaryLinear):
                setattr(parent, name, child.to_packed())
    return packed


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_layer_equals_the_latent_one(preset: str) -> None:
    module, x = layer(preset)
    with torch.no_grad():
        torch.testing.assert_close(pack(module)(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_reach_all_parameters(preset: str) -> None:
    module, x = layer(preset, hidden_dropout=0.1, attention_dropout=0.1)
    x.requires_grad_()
    (module(x) * torch.randn(3, 6, 32)).sum().backward()
    assert unused(module) == [] and x.grad is not None and x.grad.any()


def test_layer_compiles_without_graph_break() -> None:
    module, x = layer("bipft", attention_dropout=0.3)
    module.train()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = module(x)
    torch.manual_seed(2)
    out = compiled(x)
    torch.testing.assert_close(out, expected)
    assert not torch.equal(compiled(x), out)
    out.sum().backward()
    packed = pack(module.eval())
    with torch.no_grad():
        out = torch.compile(packed, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(out, packed(x))


@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_runs_and_stays_close(preset: str) -> None:
    module, x = layer(preset)
    with torch.no_grad():
        expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        out.float().square().sum().backward()
        with torch.no_grad():
            packed = pack(module)(x)
    assert unused(module) == []
    for result in (out, packed):
        assert torch.cosine_similarity(result.float().flatten(), expected.flatten(), 0) > 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module, x = layer("bipft")
    module, x = module.to(dtype), x.to(dtype)
    with torch.no_grad():
        out = module(x)
        assert out.dtype == dtype and out.isfinite().all()
        assert pack(module)(x).dtype == dtype


def test_calibration_sets_scales_in_order() -> None:
    first, second = linear("bipft", n=24), linear("bit", True, k=24)
    model = nn.Sequential(first, nn.ReLU(), second)
    x = torch.randn(8, 40)
    assert first.alpha is not None and second.alpha is not None
    with fnn.calibrate(model) as waiting, torch.no_grad():
        model(x)
        model(100 * x)
    assert waiting == []
    with torch.no_grad():
        hidden = F.relu(first(x))
        torch.testing.assert_close(first.alpha, 2 * (x + first.shift).abs().mean().reshape(1))
        torch.testing.assert_close(second.alpha, 4 * (hidden + second.shift).abs().mean().view(1))
    quantizer = fnn.ElasticBinarize(40)
    with fnn.calibrate(quantizer):
        quantizer(x)
    torch.testing.assert_close(quantizer.alpha.detach(), 2 * x.abs().mean().reshape(1))


def test_calibration_of_attention() -> None:
    module = attention("bipft")
    x = torch.randn(2, 6, 32)
    calibrated(module, x)
    assert module.alphas is not None
    with torch.no_grad():
        expected = 2 * module.value(x).abs().mean()
    torch.testing.assert_close(module.alphas[2].detach(), expected)
    assert module.alphas[3].item() == pytest.approx(4 / 6)


def test_calibration_tells_what_saw_nothing() -> None:
    model = nn.ModuleList([linear("bipft"), linear("bipft")])
    assert model[1].alpha is not None
    before = model[1].alpha.item()
    with fnn.calibrate(model) as waiting:
        assert waiting == ["0", "1"]
        model[0](torch.randn(2, 40))
    assert waiting == ["1"] and model[1].alpha.item() == before
    with pytest.raises(ValueError, match="must be finite"), fnn.calibrate(model):
        model[0](torch.full((2, 40), torch.nan))
    assert not model[0].calibrating
    with (
        pytest.raises(ValueError, match="must have elastic quantizers"),
        fnn.calibrate(linear("bibert")),
    ):
        pass


def test_modules_are_copied_and_pickled() -> None:
    module, x = layer("bipft")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
    assert "kind='ternary'" in str(module) and "kind='unsigned'" in str(layer("bit")[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sign"}, "kind must be one of"),
        ({"ste": "tanh"}, "ste must be one of"),
        ({"center": "column"}, "center must be one of"),
        ({"scale": "none"}, "scale must be one of"),
        ({"zero_policy": "ternary"}, "zero_policy must be one of"),
        ({"weight_ste": "bireal"}, "weight_ste must be one of"),
        ({"kind": "unsigned", "elastic": False}, "elastic must be True for unsigned inputs"),
    ],
)
def test_bad_settings_of_linear(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryLinear(8, 8, **settings)


def test_bad_settings_of_attention() -> None:
    for settings, message in (
        ({"heads": 3}, "heads must divide dim 32"),
        ({"preset": "w1a8"}, "preset must be one of"),
        ({"estimator_rank": -1}, "estimator_rank must be an int"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            BinarySelfAttention(**{"dim": 32, "heads": 4, **settings})  # type: ignore[arg-type]
