# SPDX-License-Identifier: Apache-2.0
"""What `accelerate_` changes, what it leaves, what it skips, and what it reports."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastbb import accelerate_, restore_
from fastbb.accelerate import SUPPORTED, Report, _plan
from tiny_models import (
    EVEN,
    FAMILIES,
    assert_unchanged,
    build,
    classes,
    first_size,
    images,
    largest_difference,
    snapshot,
)

LOGITS = 1e-4


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread: the maps are tiny, and the operator's own tests cover its parallel paths."""
    torch.set_num_threads(1)


def test_supported_names_the_source_class_of_every_rule() -> None:
    rules = [r for f in _plan.FAMILIES.values() for r in importlib.import_module(f).RULES]
    names = {f"{r.source.__module__}.{r.source.__qualname__}" for r in rules}
    assert sorted(SUPPORTED) == sorted(names)
    for rule in rules:
        assert all(issubclass(fast, source) for fast, source in rule.classes().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_only_classes_change(name: str) -> None:
    model = build(name)
    module_classes = classes(model)
    before = snapshot(model)
    state = copy.deepcopy(model.state_dict())
    report = accelerate_(model)
    assert snapshot(model)[1:3] == before[1:3]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for module, cls in zip(model.modules(), module_classes, strict=True):
        assert isinstance(module, cls)
    changed = [
        n
        for (n, m), cls in zip(model.named_modules(), module_classes, strict=True)
        if type(m) is not cls
    ]
    assert {path for path, _, _ in report.swapped} <= set(changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_and_edited_weights_count_at_once(name: str) -> None:
    original, fast = build(name), build(name)
    accelerate_(fast)
    x = images(first_size(name))
    with torch.no_grad():
        fast(x)
        other = build(name, seed=1)
        original.load_state_dict(other.state_dict())
        fast.load_state_dict(other.state_dict())
        assert largest_difference([fast(x)], [original(x)]) <= LOGITS
        for model in (original, fast):
            for p in model.parameters():
                p.data.mul_(1.1)  # leaves no trace in the parameter's version counter
        assert largest_difference([fast(x)], [original(x)]) <= LOGITS


def test_idempotent() -> None:
    model = build("swin")
    first = accelerate_(model)
    before = snapshot(model)
    second = accelerate_(model, strict=True)
    assert_unchanged(model, before)
    assert not second.swapped and not second.skipped
    assert [path for path, _ in second.already] == [path for path, _, _ in first.swapped]
    assert second.already[0][1] == "SwinTransformerBlock"
    assert "swapped before" in str(second)


def test_report() -> None:
    report = accelerate_(build("gcvit"))
    assert isinstance(report, Report) and report.complete
    assert len(report.swapped) == 8 and report.skipped == []
    path, cls, fused = report.swapped[0]
    assert (path, cls) == ("stages.0.blocks.0", "GlobalContextVitBlock")
    assert "attention" in fused
    text = str(report)
    assert text.splitlines()[0] == "GlobalContextVit: 8 modules swapped, 0 skipped"
    assert all(row[0] in text for row in report.swapped)
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["swapped"][0] == [path, cls, fused] and loaded["dtype"] is None


def test_a_single_block_is_a_model() -> None:
    block = build("torchvision_swin").features[1][1]
    report = accelerate_(block.attn)
    assert report.swapped[0][:2] == ("", "ShiftedWindowAttention")
    assert "(model)" in str(report)


def test_nothing_to_do() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1))
    before = snapshot(model)
    report = accelerate_(model)
    assert not report.complete and not report.swapped and not report.skipped
    assert "nothing to accelerate" in str(report)
    with pytest.raises(ValueError, match="nothing to accelerate"):
        accelerate_(model, strict=True)
    assert_unchanged(model, before)
    restore_(model)


def _foreign_attention(model: nn.Module) -> None:
    model.layers[0].blocks[1].attn = nn.Identity()


def _subclass(model: nn.Module) -> None:
    block = model.layers[0].blocks[1]
    block.__class__ = type("MyBlock", (type(block),), {})


def _dropout(model: nn.Module) -> None:
    model.layers[0].blocks[1].attn.attn_drop.p = 0.1


def _projection(model: nn.Module) -> None:
    attn = model.layers[0].blocks[1].attn
    attn.qkv = nn.Sequential(attn.qkv)


def _device(model: nn.Module) -> None:
    model.layers[0].blocks[1].to("meta")


def _double(model: nn.Module) -> None:
    model.layers[0].blocks[1].double()


def _head_dim(model: nn.Module) -> None:
    from timm.models.swin_transformer import SwinTransformerBlock

    model.layers[0].blocks[1] = SwinTransformerBlock(16, (16, 16), 1, head_dim=160, window_size=4)


@pytest.mark.parametrize(
    "version, edit, reason",
    [
        ("swin", _foreign_attention, "attn is Identity, not WindowAttention"),
        ("swin", _subclass, "subclass of SwinTransformerBlock, whose forward may differ"),
        ("swin", _dropout, "attention dropout 0.1 has no fused kernel"),
        ("swin", _projection, "its projection is Sequential, not Linear"),
        ("swin", _device, "device meta has no kernel"),
        ("swin", _double, "dtype torch.float64"),
        ("swin", _head_dim, "head dim 160 is above 128"),
        ("swinv2", _foreign_attention, "attn is Identity, not WindowAttention"),
        ("swinv2", _subclass, "subclass of SwinTransformerV2Block, whose forward may differ"),
        ("swinv2", _dropout, "attention dropout 0.1 has no fused kernel"),
        ("swinv2", _projection, "its projection is Sequential, not Linear"),
    ],
)
def test_skipped_with_reason(version: str, edit: Callable[[nn.Module], None], reason: str) -> None:
    model = build(version)
    edit(model)
    before = snapshot(model)[:2]
    with pytest.raises(ValueError, match="strict=True") as error:
        accelerate_(model, strict=True)
    assert reason in str(error.value)
    assert snapshot(model)[:2] == before
    report = accelerate_(model)
    assert [row[0] for row in report.skipped] == ["layers.0.blocks.1"]
    assert reason in report.skipped[0][2] and reason in str(report)
    assert len(report.swapped) == 5 and not report.complete
    untouched = [type(m) for m in model.layers[0].blocks[1].modules()]
    restore_(model)
    assert [type(m) for m in model.layers[0].blocks[1].modules()] == untouched


def _dropout_of_torchvision(model: nn.Module) -> None:
    model.features[1][0].attn.attention_dropout = 0.2


def _dropout_of_timm(model: nn.Module) -> None:
    model.stages[0].blocks[0].attn.attn_drop.p = 0.2


def _prefix_tokens(model: nn.Module) -> None:
    model.stages[0].blocks[0].attn.rel_pos.prefix_tokens = 1


@pytest.mark.parametrize(
    "name, edit, reason",
    [
        ("torchvision_swin", _dropout_of_torchvision, "attention dropout 0.2"),
        ("torchvision_swin_v2", _dropout_of_torchvision, "attention dropout 0.2"),
        ("pvt_v2", _dropout_of_timm, "attention dropout 0.2"),
        ("gcvit", _dropout_of_timm, "attention dropout 0.2"),
        ("gcvit", _prefix_tokens, "not a plain table"),
    ],
)
def test_skipped_in_other_families(
    name: str, edit: Callable[[nn.Module], None], reason: str
) -> None:
    model = build(name)
    edit(model)
    assert [reason in row[2] for row in accelerate_(model).skipped] == [True]


@pytest.mark.parametrize("name, skipped", [("gcvit", 8), ("swin", 6), ("swinv2", 6), ("pvt_v2", 6)])
def test_older_timm_is_skipped(name: str, skipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.__version__", "1.0.8")
    report = accelerate_(build(name))
    assert len(report.skipped) == skipped and not report.swapped
    assert "timm 1.0.8 is older than 1.0." in report.skipped[0][2]


def test_dropout_switched_on_later_is_refused() -> None:
    model = build("swin")
    accelerate_(model)
    model.layers[0].blocks[1].attn.attn_drop.p = 0.1
    model(images(EVEN))
    with pytest.raises(NotImplementedError, match=r"attention dropout must be 0 .* got 0\.1"):
        model.train()(images(EVEN))


def test_hooks_stay() -> None:
    model = build("swin")
    block = model.layers[0].blocks[1]
    seen = []
    block.register_forward_hook(lambda m, i, o: seen.append(("block", o.shape)))
    block.attn.register_forward_hook(lambda m, i, o: seen.append(("attn", o.shape)))
    accelerate_(model)
    model(images(EVEN, batch=1))
    assert seen == [("attn", (1, 16, 16, 16)), ("block", (1, 16, 16, 16))]


def test_training_step_reaches_the_parameters() -> None:
    model = build("swinv2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerate_(model)
    before = copy.deepcopy(model.state_dict())
    model.train()(images(EVEN)).square().sum().backward()
    optimizer.step()
    same = [n for n, t in model.state_dict().items() if torch.equal(t, before[n])]
    assert not [n for n in same if "logit_scale" not in n]  # clamped heads get no gradient


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((torch.zeros(1),), TypeError, "accelerate_: model must be a torch.nn.Module, got Tensor"),
        ((nn.Linear(1, 1), "bf16"), TypeError, "accelerate_: dtype must be a torch.dtype"),
        ((nn.Linear(1, 1), torch.int8), ValueError, "accelerate_: dtype must be one of"),
        ((nn.Linear(1, 1), torch.float64), ValueError, "accelerate_: dtype must be one of"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        accelerate_(*arguments)


def test_libraries_that_a_model_does_not_use_stay_unimported() -> None:
    program = """
import sys, torch, fastbb.accelerate
fastbb.accelerate.accelerate_(torch.nn.Linear(2, 2))
print([name for name in ("timm", "torchvision") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
