# SPDX-License-Identifier: Apache-2.0
"""binarize_ and pack_ on models of Hugging Face and timm: calls, keys, reports, all or nothing."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("transformers")

import safetensors.torch as safetensors
import timm
import transformers

import fastbb
from fastbb.accelerate import _changes
from fastbb.binarize import SUPPORTED, model_sizes
from fastbb.binarize._plan import HF_SOURCES
from fastbb.models import BinaryBert, BinaryVit
from fastbb.nn import BinaryEmbedding, BinaryLinear, PackedBinaryLinear
from tiny_binary import PRESETS, SIZES, VOCAB, batch, calibrated, unused, vivid

CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
FAMILIES = ("Bert", "Camembert", "Data2VecText", "Electra", "Ernie", "Roberta", "XLMRoberta")


def peer(kind: str = "BertModel", attention: str = "sdpa", **changed: Any) -> Any:
    cls = getattr(transformers, kind)
    config = cls.config_class(**{**CONFIG, **changed})
    config._attn_implementation = attention
    # Far below 0, where float32 makes GELU 0, signs depend on how it is computed.
    return vivid(cls(config), std=0.2).eval()


def vit(name: str = "vit_tiny_patch16_224", **settings: Any) -> nn.Module:
    model = timm.create_model(name, img_size=32, depth=2, num_classes=3, **settings)
    return vivid(model, std=0.1).eval()


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def source_of(family: str, part: str) -> str | None:
    """A class of Hugging Face's, with the family's name put aside."""
    module = next(name for name, prefix in HF_SOURCES.items() if prefix == family)
    cls = getattr(importlib.import_module(module), f"{family}{part}", None)
    if cls is None:
        return None
    code = re.sub(r"#[^\n]*", "", inspect.getsource(cls)).replace(family, "Bert")
    return re.sub(r"\s+", " ", code)


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_have_berts_layers(family: str) -> None:
    """Where another release changes one of them, this fails before results do."""
    for part in ("SelfAttention", "SelfOutput", "Attention", "Intermediate", "Output", "Layer"):
        assert source_of(family, part) == source_of("Bert", part), part
    assert source_of(family, "Pooler") in (None, source_of("Bert", "Pooler"))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_convert_train_and_pack(family: str) -> None:
    model = peer(f"{family}Model")
    float_keys = set(model.state_dict())
    parameters = {name: p for name, p in model.named_parameters()}
    report = fastbb.binarize_(model)
    pooler = getattr(model, "pooler", None) is not None
    assert len(report.converted) == 1 + 2 * 7 + 2 * pooler
    assert float_keys <= set(model.state_dict())
    for name, p in parameters.items():
        assert model.get_parameter(name) is p, name
    inputs = {k: v for k, v in batch().items() if k != "token_type_ids"}
    calibrated(model, **inputs)
    out = model(**inputs)
    (out.last_hidden_state * torch.randn_like(out.last_hidden_state)).sum().backward()
    assert [n for n in unused(model) if "pooler" not in n and "token_type" not in n] == []
    fastbb.pack_(model)
    close(model(**inputs).last_hidden_state, out.last_hidden_state.detach())


@pytest.mark.parametrize("preset", PRESETS)
def test_converted_bert_is_fastbbs(preset: str) -> None:
    model = peer()
    fastbb.binarize_(model, preset)
    vivid(model)
    ours = BinaryBert(**SIZES, preset=preset).eval()
    ours.load_state_dict(model.state_dict())
    inputs = batch()
    with torch.no_grad():
        theirs = model(**inputs, output_hidden_states=True)
        out = ours(**inputs, output_hidden_states=True)
    close(out.pooler_output, theirs.pooler_output)
    for a, b in zip(out.hidden_states or (), theirs.hidden_states, strict=True):
        close(a, b)


def test_converted_model_is_called_as_before() -> None:
    model = peer("BertForSequenceClassification", num_labels=3)
    inputs = batch()
    model(**inputs, output_hidden_states=True)
    fastbb.binarize_(model)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, labels=torch.tensor([0, 1]))
        assert len(out.hidden_states) == 3 and out.loss.isfinite()
        as_tuple = model(**inputs, return_dict=False)
        assert torch.equal(as_tuple[0], out.logits)
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        again = model(
            inputs_embeds=embedded,
            attention_mask=inputs["attention_mask"],
            token_type_ids=inputs["token_type_ids"],
        )
        close(again.logits, out.logits)
    assert isinstance(model.bert.encoder.layer[0], transformers.models.bert.modeling_bert.BertLayer)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_implementations_agree(packed: bool) -> None:
    model = peer()
    fastbb.binarize_(model)
    if packed:
        fastbb.pack_(model)
    inputs = batch()
    results = []
    for name in ("sdpa", "eager"):
        model.config._attn_implementation = name
        with torch.no_grad():
            results.append(model(**inputs).last_hidden_state)
    close(*results)
    # Flash attention's mask: one row of 0 and 1 for each sequence.
    attention = model.encoder.layer[0].attention.self
    x = torch.randn(2, 9, 32)
    flat = inputs["attention_mask"]
    additive = (1.0 - flat.float())[:, None, None] * torch.finfo(torch.float32).min
    with torch.no_grad():
        close(attention(x, flat)[0], attention(x, additive)[0])


def test_attention_refuses_what_it_cannot_do() -> None:
    model = peer()
    fastbb.binarize_(model)
    attention = model.encoder.layer[0].attention.self
    x = torch.randn(2, 9, 32)
    for named in ({"cache": object()}, {"head_mask": torch.ones(4)}, {"output_attentions": True}):
        with pytest.raises(NotImplementedError, match="must be left out of binary attention"):
            attention(x, **named)
    with pytest.raises(NotImplementedError, match="must be the same for all heads"):
        attention(x, torch.zeros(2, 4, 9, 9))
    with pytest.raises(NotImplementedError, match="attention_mask must be a tensor"):
        attention(x, object())


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_and_autocast(packed: bool) -> None:
    model = peer(num_hidden_layers=1)
    fastbb.binarize_(model)
    inputs = batch()
    calibrated(model, **inputs)
    if packed:
        fastbb.pack_(model)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(**inputs).last_hidden_state, expected)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(**inputs).last_hidden_state
    assert torch.cosine_similarity(half.float().flatten(), expected.flatten(), 0) > 0.7


def test_gradient_checkpointing_repeats_dropout() -> None:
    model = peer(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3).train()
    fastbb.binarize_(model)
    inputs = batch()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(5)
        model(**inputs).last_hidden_state.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_tied_output_layer_stays_tied() -> None:
    model = peer("BertForMaskedLM")
    model.tie_weights()
    report = fastbb.binarize_(model)
    words = model.bert.embeddings.word_embeddings
    assert isinstance(words, BinaryEmbedding)
    assert words.weight is model.cls.predictions.decoder.weight
    skipped = {path: reason for path, _, reason in report.skipped}
    assert "no rule" in skipped["cls.predictions.decoder"]
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).logits
    packed = fastbb.pack_(model)
    assert packed.skipped[0][0] == "bert.embeddings.word_embeddings"
    assert "cls.predictions.decoder shares its weight" in packed.skipped[0][2]
    close(model(**inputs).logits, expected)


def test_skip_patterns() -> None:
    model = peer()
    report = fastbb.binarize_(model, skip=("encoder.layer.0", "*.query", "pooler", "embeddings"))
    assert type(model.encoder.layer[0]) is transformers.models.bert.modeling_bert.BertLayer
    layer = model.encoder.layer[1]
    assert type(layer.attention.self.query) is nn.Linear
    assert isinstance(layer.attention.self.key, BinaryLinear)
    assert type(model.embeddings.word_embeddings) is nn.Embedding
    reasons = {path: reason for path, _, reason in report.skipped}
    assert reasons["encoder.layer.0.attention.self"] == "pattern 'encoder.layer.0'"
    assert reasons["encoder.layer.1.attention.self.query"] == "pattern '*.query'"
    assert reasons["pooler.dense"] == "pattern 'pooler'"
    calibrated(model, **batch())
    with pytest.raises(ValueError, match=r"skip must match modules of BertModel, got 'layers.\*'"):
        fastbb.binarize_(peer(), skip="layers.*")


def test_presets_choose_the_activation() -> None:
    model = peer(hidden_act="relu")
    report = fastbb.binarize_(model, "bipft")
    act = model.encoder.layer[0].intermediate.intermediate_act_fn
    assert type(act) is nn.GELU
    assert ("encoder.layer.1.intermediate.intermediate_act_fn", "ReLU", "GELU") in report.converted
    model = peer()
    fastbb.binarize_(model, "bit")
    assert type(model.encoder.layer[0].intermediate.intermediate_act_fn) is nn.ReLU
    assert model.encoder.layer[0].output.dense.kind == "unsigned"


def test_decoders_and_strangers_are_refused_with_reasons() -> None:
    decoder = peer(is_decoder=True)
    report = fastbb.binarize_(decoder)
    reasons = {path: reason for path, _, reason in report.skipped}
    assert "decoder" in reasons["encoder.layer.0.attention.self"]
    assert "BertSelfAttention, which is skipped" in reasons["encoder.layer.0.attention.self.query"]
    distil = transformers.DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=1, n_heads=2, hidden_dim=48
    )
    with pytest.raises(ValueError, match="no rule makes DistilBertSelfAttention binary"):
        fastbb.binarize_(transformers.DistilBertModel(distil))
    with pytest.raises(ValueError, match="no rule makes"):
        fastbb.binarize_(timm.create_model("resnet18", device="meta"))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        fastbb.binarize_("bert")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preset must be one of"):
        fastbb.binarize_(peer(), "binarybert")
    with pytest.raises(ValueError, match="estimator_rank must be an int"):
        fastbb.binarize_(peer(), estimator_rank=-1)


def test_layers_that_are_not_plain_are_left_alone() -> None:
    model = peer()
    model.encoder.layer[0].output.dense.register_forward_hook(lambda *args: None)
    model.encoder.layer[1].output.dense = nn.Sequential(nn.Linear(48, 32))
    report = fastbb.binarize_(model)
    reasons = {path: reason for path, _, reason in report.skipped}
    assert "has hooks" in reasons["encoder.layer.0.output.dense"]
    assert "class is Sequential" in reasons["encoder.layer.1.output.dense"]
    model(**batch())
    with pytest.raises(ValueError, match="binary already"):
        fastbb.binarize_(model)


def snapshot(model: nn.Module) -> dict[str, Any]:
    shape: dict[str, Any] = {
        path: (type(m), sorted(m.__dict__), list(m._parameters), list(m._modules))
        for path, m in model.named_modules()
    }
    shape |= {f"p {n}": (id(p), p.requires_grad) for n, p in model.named_parameters()}
    return shape


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_failure_leaves_the_model_unchanged(
    kind: str, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peer() if kind == "bert" else vit()
    if packing:
        fastbb.binarize_(model)
    convert = fastbb.pack_ if packing else fastbb.binarize_
    before = snapshot(model)
    assign = _changes._assign
    for at in (0, 7, 20):
        calls = iter(range(10_000))

        def failing(target: Any, name: str, value: Any, at: int = at, calls: Any = calls) -> None:
            if next(calls) == at:
                raise MemoryError
            assign(target, name, value)

        monkeypatch.setattr(_changes, "_assign", failing)
        with pytest.raises(MemoryError):
            convert(model)
        assert snapshot(model) == before
    monkeypatch.setattr(_changes, "_assign", assign)
    convert(model)
    assert snapshot(model) != before


@pytest.mark.parametrize("preset", PRESETS)
def test_timm_vit_converts_trains_and_packs(preset: str) -> None:
    model = vit(init_values=0.3)
    keys = set(model.state_dict())
    report = fastbb.binarize_(model, preset, estimator_rank=2)
    assert keys <= set(model.state_dict())
    assert len(report.converted) == 2 * (5 + (preset == "bit"))
    x = torch.randn(2, 3, 32, 32)
    calibrated(model, x)
    out = model(x)
    out.square().sum().backward()
    assert unused(model) == []
    assert len(fastbb.pack_(model).packed) == 8
    if preset == "bipft":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(x), out.detach())
    close(model(x), out.detach())


def test_converted_vit_is_fastbbs() -> None:
    model = vit()
    fastbb.binarize_(model, "bipft")
    ours = BinaryVit(
        embed_dim=192, depth=2, num_heads=3, img_size=32, num_classes=3, preset="bipft"
    ).eval()
    ours.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(ours(x), model(x))


def test_timm_deit_masks_and_refusals() -> None:
    model = vit("deit_tiny_distilled_patch16_224")
    fastbb.binarize_(model)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 3)
    attn = model.blocks[0].attn
    tokens = torch.randn(2, 6, 192)
    seen = torch.ones(6, 6, dtype=torch.bool)
    seen[:, 4:] = False
    with torch.no_grad():
        out = attn(tokens, attn_mask=seen)
        tokens[:, 4:] = 0
        close(attn(tokens, attn_mask=seen)[:, :4], out[:, :4])
    with pytest.raises(NotImplementedError, match="is_causal must be False"):
        attn(tokens, is_causal=True)
    normed = vit(qk_norm=True)
    report = fastbb.binarize_(normed)
    reasons = {path: reason for path, _, reason in report.skipped}
    assert "normalises (q_norm)" in reasons["blocks.0.attn"]
    assert "Attention, which is skipped" in reasons["blocks.0.attn.qkv"]
    assert isinstance(normed.blocks[0].mlp.fc1, BinaryLinear)


def test_reports() -> None:
    model = peer()
    report = fastbb.binarize_(model)
    assert json.loads(json.dumps(report.to_dict()))["model"] == "BertModel"
    assert "17 modules binary, 2 skipped" in str(report)
    before = model_sizes(model)
    packing = fastbb.pack_(model)
    after = model_sizes(model)
    assert packing.bytes_before == before.total and packing.bytes_after == after.total
    assert before.linear == before.linear_float32 == after.linear_float32
    assert json.loads(json.dumps(packing.to_dict()))["frozen"] == packing.frozen > 0
    assert "14 modules packed" in str(packing)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="packed already"):
        fastbb.pack_(model)
    with pytest.raises(ValueError, match="without any"):
        fastbb.pack_(peer())
    with pytest.raises(TypeError, match="use its to_packed"):
        fastbb.pack_(BinaryLinear(8, 8))
    for name in SUPPORTED:
        module, _, cls = name.rpartition(".")
        assert hasattr(importlib.import_module(module), cls)


def test_packed_models_are_saved_and_loaded(tmp_path: Path) -> None:
    model = peer("BertForSequenceClassification")
    fastbb.binarize_(model)
    calibrated(model, **batch())
    fastbb.pack_(model)
    model.save_pretrained(tmp_path)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert sum(x.dtype == torch.uint8 for x in saved.values()) == 14
    fresh = peer("BertForSequenceClassification")
    fastbb.binarize_(fresh)
    fastbb.pack_(fresh)
    fresh.load_state_dict(saved)
    inputs = batch()
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)


def test_converted_models_are_copied_and_pickled() -> None:
    for model, inputs in ((peer(), batch()), (vit(), {"x": torch.randn(1, 3, 32, 32)})):
        fastbb.binarize_(model)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            assert type(twin.get_submodule(first_attention(twin))).__name__.startswith("Binarized")
            with torch.no_grad():
                a, b = twin(**inputs), model(**inputs)
            assert torch.equal(a[0], b[0])
    fastbb.pack_(model)
    assert any(isinstance(m, PackedBinaryLinear) for m in copy.deepcopy(model).modules())


def first_attention(model: nn.Module) -> str:
    return next(path for path, m in model.named_modules() if path.endswith(("self", "attn")))
