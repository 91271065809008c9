# SPDX-License-Identifier: Apache-2.0
"""Accelerated models compute what the originals compute: logits, gradients, half precision."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbb import accelerate_, use_fused
from tiny_models import (
    EVEN,
    FAMILIES,
    MODELS,
    ODD,
    build,
    first_size,
    images,
    largest_difference,
    pair,
)

LOGITS = 1e-4
GRADIENTS = 1e-4
"""Of the largest element of a gradient, or a thousandth of the largest of all gradients."""

FAMILY_FILES = {
    "gcvit": "timm_gcvit",
    "swin_odd": "timm_swin",
    "swinv2_odd": "timm_swin_v2",
    "pvt_v2": "timm_pvt_v2",
    "torchvision_swin": "torchvision_swin",
    "torchvision_swin_v2": "torchvision_swin",
}


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread: the maps are tiny, and the operator's own tests cover its parallel paths."""
    torch.set_num_threads(1)


def logits_difference(original: nn.Module, fast: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = original(x)
        assert 0.5 < expected.abs().max() < 10  # 1e-4 means something
        return largest_difference([fast(x)], [expected])


def gradients(
    model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Of the input and of every parameter of `model`, through `run` (default: the model)."""
    x = x.clone().requires_grad_()
    torch.manual_seed(0)  # of stochastic depth
    logits = model(x) if run is None else run(x)
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad((logits * weights).sum(), [x, *parameters.values()])
    return dict(zip(["input", *parameters], grads, strict=True))


def worst_gradient(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference in units of the gradient, and whose it is."""
    floor = 1e-3 * max(g.abs().max().item() for g in expected.values())
    return max(
        (largest_difference([actual[n]], [g]) / max(g.abs().max().item(), floor), n)
        for n, g in expected.items()
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits(name: str, batch: int) -> None:
    original, fast = pair(name)
    for size in MODELS[name][1]:
        assert logits_difference(original, fast, images(size, batch)) <= LOGITS, size


def test_edited_scale() -> None:
    """The modules' own logit factor is used, whatever it is."""
    for name, attn in (("gcvit", "stages.0.blocks.0.attn"), ("swin", "layers.0.blocks.0.attn")):
        original, fast = pair(name)
        for model in (original, fast):
            model.get_submodule(attn).scale = 0.1
        assert logits_difference(original, fast, images(EVEN)) <= LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_of_projections(name: str) -> None:
    """Dropping everything needs no equal random numbers."""
    original, fast = pair(name)
    x = images(first_size(name))
    with torch.no_grad():
        undropped = original(x)
        for model in (original, fast):
            for module in model.modules():
                if hasattr(module, "proj_drop"):
                    module.proj_drop.p = 1.0
                elif hasattr(module, "attention_dropout"):
                    module.dropout = 1.0
        torch.manual_seed(0)
        expected = original.train()(x)
        torch.manual_seed(0)
        actual = fast.train()(x)
    assert largest_difference([undropped], [expected]) > 100 * LOGITS
    assert largest_difference([actual], [expected]) <= LOGITS


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str) -> None:
    """Of the fused operator in float32, judged by the original in float64."""
    original, fast = pair(name)
    original.train(), fast.train()
    x = images(MODELS[name][1][-1])
    expected = gradients(original, x)
    actual = gradients(fast, x)
    exact = gradients(original.double(), x.double())
    error, of = worst_gradient(exact, actual)
    assert error <= max(GRADIENTS, 2 * worst_gradient(exact, expected)[0]), of


@pytest.mark.parametrize("name", MODELS)
def test_float64(name: str) -> None:
    """The same formula: without float32's rounding (and its kernel), nothing differs."""
    original, fast = pair(name)
    original.double().train(), fast.double().train()
    x = images(MODELS[name][1][-1]).double()
    error, of = worst_gradient(gradients(original, x), gradients(fast, x))
    assert error <= 1e-9, of


WRONG_ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "gcvit": [{"bias_table": None}, {"scale": 0.3}],
    "swin_odd": [
        {"k_pad": None},
        {"v_pad": None},
        {"mask": None},
        {"mask": None, "shift": 0},
        {"pad_mode": "pad_then_roll"},
        {"bias_table": None},
    ],
    "swinv2_odd": [
        {"v_pad": None},
        {"mask": None},
        {"pad_mode": "pad_then_roll"},
        {"bias_table": None},
        {"scale": 10.0},
        {"qk_l2norm": False},
    ],
    "pvt_v2": [{"scale": 0.3}],
    "torchvision_swin": [{"k_pad": None}, {"v_pad": None}, {"mask": None}],
    "torchvision_swin_v2": [{"v_pad": None}, {"mask": None}, {"qk_l2norm": False}],
}


@pytest.mark.parametrize(
    "name, wrong", [(name, wrong) for name in WRONG_ARGUMENTS for wrong in WRONG_ARGUMENTS[name]]
)
def test_a_wrong_argument_shows(
    name: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parity tests above would notice each argument that the fast classes pass."""
    original, fast = pair(name)
    family = importlib.import_module(f"fastbb.accelerate.{FAMILY_FILES[name]}")
    right = family.window_attention
    monkeypatch.setattr(
        family, "window_attention", lambda *qkv, **options: right(*qkv, **(options | wrong))
    )
    size = ODD if ODD in MODELS[name][1] else first_size(name)
    assert logits_difference(original, fast, images(size)) > 100 * LOGITS


def test_queries_of_another_image_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbb.accelerate import timm_gcvit

    original, fast = pair("gcvit")
    right = timm_gcvit.window_attention

    def swapped(q: Tensor, *kv: Tensor, **options: Any) -> Tensor:
        return right(q.flip(0) if q.dim() == 4 else q, *kv, **options)

    monkeypatch.setattr(timm_gcvit, "window_attention", swapped)
    assert logits_difference(original, fast, images(EVEN)) > 100 * LOGITS


class OperatorCounts(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_operator_per_attention(name: str) -> None:
    fast = build(name)
    swapped = accelerate_(fast).swapped
    attentions = sum(cls != "MlpWithDepthwiseConv" for _, cls, _ in swapped)
    with torch.no_grad(), use_fused(True), OperatorCounts() as operators:
        fast(images(first_size(name)))
    assert operators.counts["fastbb::window_attention"] == attentions > 0
    for folded in ("aten::roll", "aten::_softmax", "aten::bmm", "aten::index.Tensor"):
        assert folded not in operators.counts


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast(name: str) -> None:
    original, fast = pair(name)
    x = images(first_size(name))
    with torch.no_grad():
        exact = original(x)
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = original(x), fast(x)
    assert actual.dtype == expected.dtype
    error = largest_difference([expected], [exact])
    assert largest_difference([actual], [exact]) <= 2 * error + 0.02 * exact.abs().max().item()


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.03), (torch.float16, 0.003)])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name: str, dtype: torch.dtype, bound: float) -> None:
    original = build(name)
    fast = copy.deepcopy(original)
    accelerate_(fast, dtype=dtype, strict=True)
    x = images(first_size(name))
    with torch.no_grad():
        exact = original(x)
        actual = fast(x.to(dtype))
    assert actual.dtype == dtype
    assert largest_difference([actual], [exact]) <= bound * exact.abs().max().item()
