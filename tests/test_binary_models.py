# SPDX-License-Identifier: Apache-2.0
"""Binary BERT and ViT: names, keys, results, packed sizes, checkpoints of the papers' code."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbb
from fastbb import models
from fastbb.binarize import model_sizes
from fastbb.models import BinaryBert, BinaryVit, load_bipft_state_dict
from tiny_binary import LENGTH, PRESETS, SIZES, VOCAB, batch, bert, calibrated, unused, vivid

VIT: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "patch_size": 8,
    "img_size": 32,
    "num_classes": 5,
}


def vit(preset: str, **settings: Any) -> BinaryVit:
    model = vivid(BinaryVit(**{**VIT, "preset": preset, **settings})).eval()
    return calibrated(model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("preset", PRESETS)
def test_bert_gives_what_it_documents(preset: str) -> None:
    model = bert(preset, num_classes=3)
    inputs = batch()
    out = model(**inputs, output_hidden_states=True)
    assert out.last_hidden_state.shape == (2, LENGTH, 32) and out.logits.shape == (2, 3)
    assert out.pooler_output.shape == (2, 32) and len(out.hidden_states) == 3
    assert out.hidden_states[-1] is out.last_hidden_state
    assert model(**inputs).hidden_states is None
    (out.logits.square().sum() + out.last_hidden_state.square().sum()).backward()
    assert unused(model) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_has_no_influence(preset: str) -> None:
    model = bert(preset)
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[1, :6]
        inputs["input_ids"][1, 6:] = 7
        torch.testing.assert_close(model(**inputs).last_hidden_state[1, :6], expected)
        alone = {name: value[1:, :6] for name, value in inputs.items()}
        torch.testing.assert_close(model(**alone).last_hidden_state[0], expected)


def test_positions_and_lengths() -> None:
    model = bert("bipft")
    ids = batch()["input_ids"]
    positions = torch.arange(LENGTH).expand(2, -1)
    assert torch.equal(model(ids, position_ids=positions)[0], model(ids)[0])
    with pytest.raises(ValueError, match=r"input_ids must be \[B, N\] with N at most 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="pooler must be True with a classifier"):
        BinaryBert(**SIZES, pooler=False, num_classes=2)
    bare = bert("bit", pooler=False)
    assert bare(ids).pooler_output is None and bare(ids).logits is None


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_bert_equals_the_latent_one(preset: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = bert(preset, num_classes=3)
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).logits
    report = fastbb.pack_(model)
    assert len(report.packed) == 2 * 6 + 2 and not report.skipped
    out = model(**inputs).logits
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    assert not out.requires_grad
    file = tmp_path / "model.safetensors"
    safetensors.save_file(model.state_dict(), file)
    fresh = BinaryBert(**SIZES, preset=preset, num_classes=3).eval()
    fastbb.pack_(fresh)
    fresh.load_state_dict(safetensors.load_file(file))
    assert torch.equal(fresh(**inputs).logits, out)


def test_names() -> None:
    names = models.list_models()
    assert {"bipft_base", "bit_base", "bibert_base", "bipft_minilm_l6"} <= set(names)
    assert {"binary_vit_tiny", "binary_vit_small", "binary_vit_base"} <= set(names)
    model = models.create_model("bipft_minilm_l6", num_classes=2, device="meta")
    assert isinstance(model, BinaryBert) and model.num_features == 384
    assert model.classifier is not None and len(model.encoder.layer) == 6
    assert models.create_model("bit_base", device="meta").classifier is None
    base = models.create_model("bipft_base", device="meta")
    estimators = [p for n, p in base.named_parameters() if re.search(r"\.[qkv]_[pm]\.", n)]
    assert sum(p.numel() for p in estimators) == 12 * 5 * (768 + 1)
    small = models.create_model("binary_vit_small", device="meta")
    assert sum(p.numel() for p in small.parameters()) == pytest.approx(22.05e6, rel=0.01)


def test_text_models_take_no_image_settings() -> None:
    for settings in ({"img_size": 224}, {"features_only": True}):
        with pytest.raises(ValueError, match="must be left out for the text model 'bit_base'"):
            models.create_model("bit_base", **settings)
    with pytest.raises(TypeError):
        models.create_model("bit_base", in_chans=3, device="meta")
    assert models.create_model("binary_vit_tiny", device="meta").head.out_features == 1000


@pytest.mark.parametrize("preset", PRESETS)
def test_vit(preset: str) -> None:
    model = vit(preset)
    x = torch.randn(2, 3, 32, 32)
    out = model(x)
    out.square().sum().backward()
    assert out.shape == (2, 5) and unused(model) == []
    fastbb.pack_(model)
    torch.testing.assert_close(model(x), out.detach(), rtol=1e-3, atol=1e-3)


def test_vit_sizes_and_features() -> None:
    model = vit("bipft", features_only=True)
    maps = model(torch.randn(1, 3, 48, 32))
    assert [tuple(x.shape) for x in maps] == [(1, 32, 6, 4)] * 4
    assert vit("bipft", num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    with pytest.raises(ValueError, match="image sides must be multiples of 8, got"):
        model(torch.randn(1, 3, 33, 32))
    with pytest.raises(ValueError, match="depth must be a multiple of 4"):
        BinaryVit(**{**VIT, "depth": 3}, features_only=True)


def test_packed_weights_are_28_times_smaller(tmp_path: Path) -> None:
    """A layer of BERT-base; all twelve are alike."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = models.create_model("bipft_base", depth=1, vocab_size=512)
    report = fastbb.pack_(model)
    sizes = model_sizes(model)
    assert sizes.linear_float32 == 4 * (768 * 768 * 5 + 2 * 768 * 3072)
    assert sizes.linear_float32 / sizes.linear >= 28
    assert sizes.embedding_float32 / sizes.embedding >= 28
    assert sizes.total == report.bytes_after < report.bytes_before
    file = tmp_path / "model.safetensors"
    safetensors.save_file(model.state_dict(), file)
    header = file.stat().st_size - sizes.total
    assert 0 <= header < 20_000
    assert f"full precision: {sizes.rest:,} bytes" in str(sizes)


def foreign(model: nn.Module, preset: str) -> dict[str, Tensor]:
    """The model's weights under the names of BiPFT's, BiT's or BiBERT's code."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key.endswith(".alphas"):
            stem = key.removesuffix("alphas")
            for name, clip in zip(("query", "key", "value", "attn"), value, strict=True):
                state[f"bert.{stem}clip_{name}"] = clip.clone()
        elif key.endswith(".alpha"):
            state[f"bert.{key.removesuffix('alpha')}input_clip_val"] = value[0].clone()
        elif key.endswith(".shift"):
            state[f"bert.{key.removesuffix('shift')}move.bias"] = value
        else:
            state[key if key.startswith("classifier") else f"bert.{key}"] = value
    if preset == "bit":
        for i in range(2):
            for name in "qkv":
                key = f"bert.encoder.layer.{i}.attention.self.move_{name}.bias"
                state[key] = torch.randn(32)
    if preset == "bibert":
        for i in range(2):
            stem = f"bert.encoder.layer.{i}."
            for name in ("query", "key", "value", "attn"):
                state[f"{stem}attention.self.clip_{name}"] = torch.tensor([-2.5, 2.5])
            state[f"{stem}output.gate"] = torch.ones(())
            state[f"{stem}output.dense.scale"] = torch.zeros(())
            state[f"{stem}output.dense.act_clip_val"] = torch.ones(2)
        state["bert.embeddings.word_embeddings.weight_clip_val"] = torch.ones(2)
    return state


@pytest.mark.parametrize("preset", PRESETS)
def test_checkpoints_of_the_papers(preset: str) -> None:
    source = bert(preset, num_classes=3)
    state = foreign(source, preset)
    target = BinaryBert(**SIZES, preset=preset, num_classes=3).eval()
    report = load_bipft_state_dict(target, {"state_dict": state})
    assert not report.missing and not report.unexpected
    assert bool(report.ignored) == (preset != "bipft")
    assert sorted(report.loaded) == sorted(target.state_dict())
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_checkpoints_are_checked() -> None:
    source = bert("bipft")
    state = foreign(source, "bipft")
    target = BinaryBert(**SIZES)
    before = copy.deepcopy(target.state_dict())
    wrong = {**state, "bert.lora.weight": torch.zeros(1)}
    del wrong["bert.encoder.layer.0.attention.self.query.move.bias"]
    with pytest.raises(ValueError, match=r"2 differences: missing encoder.*shift; unexpected"):
        load_bipft_state_dict(target, wrong)
    with pytest.raises(ValueError, match=r"pooler.dense.weight has shape \[1\] instead of"):
        bad = {**state, "bert.pooler.dense.weight": torch.zeros(1)}
        load_bipft_state_dict(target, bad, strict=False)
    with pytest.raises(ValueError, match="must hold tensors, got str under 'a'"):
        load_bipft_state_dict(target, {"a": "b"})
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    report = load_bipft_state_dict(target, wrong, strict=False)
    assert report.missing == ["encoder.layer.0.attention.self.query.shift"]
    assert report.unexpected == ["bert.lora.weight"]


def test_checkpoints_into_a_binarized_peer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
    )
    peer = transformers.BertForSequenceClassification(config).eval()
    fastbb.binarize_(peer, "bipft")
    source = bert("bipft", num_classes=3)
    load_bipft_state_dict(peer, foreign(source, "bipft"))
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(peer(**inputs).logits, source(**inputs).logits)
