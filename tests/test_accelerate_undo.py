# SPDX-License-Identifier: Apache-2.0
"""`restore_`, conversion of dtypes, and all-or-nothing on errors."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from fastbb import accelerate_, restore_
from fastbb.accelerate import _changes
from tiny_models import (
    EVEN,
    FAMILIES,
    assert_unchanged,
    build,
    classes,
    first_size,
    images,
    snapshot,
    tensors,
)


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread: the maps are tiny, and the operator's own tests cover its parallel paths."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_restore_is_exact(name: str) -> None:
    model = build(name)
    x = images(first_size(name))
    before = snapshot(model)
    with torch.no_grad():
        expected = model(x)
        accelerate_(model)
        restore_(model)
        assert_unchanged(model, before)
        assert torch.equal(model(x), expected)


def test_restore_bad_argument() -> None:
    with pytest.raises(TypeError, match=r"restore_: model must be a torch\.nn\.Module, got dict"):
        restore_({})


def _failing_change(target: object = object()) -> _changes.Change:
    return _changes.Change(target, "name", None, "an object() takes no attributes")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_all_or_nothing_when_the_last_change_fails(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("swin")
    model(images(EVEN)).sum().backward()
    before = snapshot(model)
    commit = _changes.commit
    monkeypatch.setattr(
        "fastbb.accelerate.commit", lambda changes: commit([*changes, _failing_change()])
    )
    with pytest.raises(AttributeError):
        accelerate_(model, dtype)
    assert_unchanged(model, before)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    monkeypatch.undo()
    accelerate_(model, dtype)
    fast = snapshot(model)
    monkeypatch.setattr(
        "fastbb.accelerate.commit", lambda changes: commit([*changes, _failing_change()])
    )
    with pytest.raises(AttributeError):
        restore_(model)
    assert_unchanged(model, fast)


def test_all_or_nothing_when_a_rule_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbb.accelerate import timm_swin

    calls = []

    def broken(block: nn.Module) -> list[str]:
        calls.append(block)
        if len(calls) == 3:
            raise RuntimeError("broken rule")
        return []

    rule = timm_swin.RULES[0]
    monkeypatch.setattr(
        timm_swin, "RULES", [type(rule)(rule.source, rule.fast, "", broken, parts=rule.parts)]
    )
    model = build("swin")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="broken rule"):
        accelerate_(model, torch.bfloat16)
    assert_unchanged(model, before)


def test_all_or_nothing_when_a_class_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself refuses a class of another layout, after other modules were swapped."""
    from fastbb.accelerate import timm_pvt_v2

    attention, mlp = timm_pvt_v2.RULES
    misfit = type("Misfit", (mlp.source,), {"__slots__": ("extra",)})
    broken = type(mlp)(mlp.source, misfit, "", lambda module: [])
    monkeypatch.setattr(timm_pvt_v2, "RULES", [attention, broken])
    model = build("pvt_v2")
    before = snapshot(model)
    with pytest.raises(TypeError, match="layout"):
        accelerate_(model)
    assert_unchanged(model, before)


def test_restore_refuses_a_derived_class() -> None:
    model = build("torchvision_swin")
    accelerate_(model)
    attn = model.features[1][0].attn
    nn.utils.parametrize.register_parametrization(
        attn, "relative_position_bias_table", nn.Identity()
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"restore_: module 'features.1.0.attn' must have"):
        restore_(model)
    assert_unchanged(model, before)
    nn.utils.parametrize.remove_parametrizations(attn, "relative_position_bias_table")
    restore_(model)
    assert classes(model) == classes(build("torchvision_swin"))


def test_dtype_converts_and_restore_converts_back() -> None:
    model = build("swinv2")
    model.register_buffer("steps", torch.tensor(3))
    model.head.tied = model.norm.weight
    model(images(EVEN)).sum().backward()
    floats = {n: t for n, t in tensors(model).items() if t.is_floating_point()}
    before = {n: t.detach().clone() for n, t in floats.items()}
    report = accelerate_(model, torch.bfloat16)
    assert report.dtype == "torch.bfloat16" and report.converted == len(floats)
    assert f"{len(floats)} parameters and buffers converted to torch.bfloat16" in str(report)
    assert model.head.tied is model.norm.weight and model.steps.dtype == torch.int64
    for n, t in tensors(model).items():
        if n in floats:
            assert t is floats[n] and torch.equal(t, before[n].bfloat16())
            assert t.grad is None or t.grad.dtype == torch.bfloat16
    again = accelerate_(model, torch.float16)
    assert again.converted == len(floats) and not again.swapped
    assert accelerate_(model, torch.float16).converted == 0
    clone = pickle.loads(pickle.dumps(model))
    restore_(clone)
    assert {t.dtype for t in clone.parameters()} == {torch.float32}
    restore_(model)
    assert classes(model) == classes(build("swinv2"))
    for n, t in floats.items():
        assert t.dtype == torch.float32 and torch.equal(t, before[n].bfloat16().half().float())
    assert not [m for m in model.modules() if any("fastbb" in key for key in m.__dict__)]


def test_dtype_makes_a_float64_model_eligible() -> None:
    model = build("swin").double()
    assert len(accelerate_(model).skipped) == 6
    assert accelerate_(model, torch.float32, strict=True).complete
    assert model(images(EVEN)).dtype == torch.float32
