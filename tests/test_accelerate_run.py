# SPDX-License-Identifier: Apache-2.0
"""Accelerated models go where models go: compilers, exporters, tracers, threads, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb import accelerate_, restore_, use_fused
from tiny_models import EVEN, FAMILIES, ODD, build, first_size, images, largest_difference, pair

LOGITS = 1e-4

BLOCKS: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
    "gcvit": ("stages.0.blocks.1", (3, 12, 20, 16), (4, 8, 28, 16)),
    "swin_odd": ("layers.0.blocks.1", (3, 17, 25, 16), (4, 9, 30, 16)),
    "swinv2_odd": ("layers.0.blocks.1", (3, 17, 25, 16), (4, 9, 30, 16)),
    "pvt_v2": ("stages.0.blocks.0", (3, 12, 20, 16), (4, 8, 28, 16)),
    "torchvision_swin": ("features.1.1", (3, 17, 25, 16), (4, 9, 30, 16)),
    "torchvision_swin_v2": ("features.1.1", (3, 17, 25, 16), (4, 9, 30, 16)),
}
"""family -> (a block, shifted where the family shifts; two maps [B, H, W, C] for it).

No two sizes of a first map are equal: compilers take equal ones for the same size."""


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread: the maps are tiny, and the operator's own tests cover its parallel paths."""
    torch.set_num_threads(1)


def block_inputs(name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if name == "gcvit":
        window = 2
        return x, torch.randn(shape[0], window, window, shape[-1])
    if name == "pvt_v2":
        return x.flatten(1, 2), shape[1:3]
    return (x,)


@pytest.mark.parametrize("name", FAMILIES)
def test_compile(name: str) -> None:
    """Forward and backward in one graph each, without breaks."""
    _, fast = pair(name)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=False)
    parameters = list(fast.parameters())
    x = images(first_size(name))
    expected, actual = fast(x), compiled(x)
    assert largest_difference([actual], [expected]) <= LOGITS
    grads = [torch.autograd.grad(y.square().sum(), parameters) for y in (expected, actual)]
    assert largest_difference(*grads) <= 1e-4 * max(g.abs().max().item() for g in grads[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_compile_dynamic(name: str) -> None:
    """One graph serves every batch and map size."""
    original, fast = (m.get_submodule(BLOCKS[name][0]) for m in pair(name))
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
    first, second = (block_inputs(name, shape) for shape in BLOCKS[name][1:])
    with torch.no_grad():
        if name.startswith("swin"):
            # The original holds a mask tensor for one size of map.
            original.dynamic_mask = True
        assert largest_difference([compiled(*first)], [original(*first)]) <= LOGITS
        with torch.compiler.set_stance("fail_on_recompile"):
            assert largest_difference([compiled(*second)], [original(*second)]) <= LOGITS


def test_compile_inductor() -> None:
    original, fast = (m.get_submodule(BLOCKS["swin_odd"][0]) for m in pair("swin_odd"))
    torch._dynamo.reset()
    (x,) = block_inputs("swin_odd", BLOCKS["swin_odd"][1])
    with torch.no_grad():
        actual = torch.compile(fast, fullgraph=True)(x)
        assert largest_difference([actual], [original(x)]) <= LOGITS


def test_accelerated_after_compile() -> None:
    """A compiled model notices that its modules were swapped, and swapped back."""
    model = build("pvt_v2")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(EVEN)
    with torch.no_grad(), use_fused(True):
        expected = compiled(x)
        assert accelerate_(compiled).swapped
        for change in (lambda: None, lambda: restore_(compiled)):
            change()
            with torch.profiler.profile() as profile:
                assert largest_difference([compiled(x)], [expected]) <= LOGITS
            fused = any(e.key == "fastbb::window_attention" for e in profile.key_averages())
            assert fused == (type(model.stages[0].blocks[0].attn).__name__ == "FastAttention")


@pytest.mark.parametrize("name", FAMILIES)
def test_export(name: str) -> None:
    original, fast = (m.get_submodule(BLOCKS[name][0]) for m in pair(name))
    first, second = (block_inputs(name, shape) for shape in BLOCKS[name][1:])
    second = tuple(torch.cat([y, y]) if isinstance(y, Tensor) else y for y in first)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    shapes = tuple(batch if isinstance(y, Tensor) else (None, None) for y in first)
    exported = torch.export.export(fast, first, dynamic_shapes=shapes).module()
    with torch.no_grad():
        assert largest_difference([exported(*second)], [original(*second)]) <= LOGITS


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["pvt_v2", "swin_odd", "torchvision_swin"])
def test_jit_trace(name: str) -> None:
    original, fast = pair(name)
    x = images(first_size(name))
    with torch.no_grad(), use_fused(True):
        traced = torch.jit.trace(fast, x, check_trace=False)
        assert largest_difference([traced(x)], [original(x)]) <= LOGITS


@pytest.mark.filterwarnings("ignore:NOTE")
@pytest.mark.parametrize("name", FAMILIES)
def test_feature_extractor(name: str) -> None:
    """`torch.fx` traces the modules, as feature extraction by node names needs."""
    if name.startswith("torchvision"):
        from torchvision.models.feature_extraction import create_feature_extractor
    else:
        from timm.models import create_feature_extractor

    original, fast = pair(name)
    node = {"to": "features.3", "gc": "stages.1", "pv": "stages.1"}.get(name[:2], "layers.1")
    x = images(first_size(name))
    with torch.no_grad():
        expected = create_feature_extractor(original, {node: "map"})(x)["map"]
        actual = create_feature_extractor(fast, {node: "map"})(x)["map"]
    assert largest_difference([actual], [expected]) <= LOGITS


@pytest.mark.parametrize("name", ["gcvit_xxtiny", "swin_tiny_patch4_window7_224"])
def test_timm_features(name: str) -> None:
    timm = pytest.importorskip("timm")
    options = {} if name.startswith("gc") else {"embed_dim": 32, "depths": (1, 2, 2, 1)}
    torch.manual_seed(0)
    original = timm.create_model(name, features_only=True, img_size=64, **options).eval()
    fast = copy.deepcopy(original)
    assert accelerate_(fast).complete
    with torch.no_grad():
        x = images(EVEN, batch=1)
        assert largest_difference(fast(x), original(x)) <= LOGITS


@pytest.mark.parametrize("name", FAMILIES[:4])
def test_gradient_checkpointing(name: str) -> None:
    _, fast = pair(name)
    x = images(first_size(name))
    fast.train()
    grads = []
    for enabled in (False, True):
        fast.set_grad_checkpointing(enabled)
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(fast(x).square().sum(), list(fast.parameters())))
    assert largest_difference(*grads) == 0


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_set_input_size(name: str) -> None:
    original, fast = pair(name)
    for model in (original, fast):
        model.set_input_size(img_size=(128, 64), window_size=(8, 4))
        for p in model.parameters():
            p.requires_grad_(True)
    x = images((128, 64))
    with torch.no_grad():
        assert largest_difference([fast(x)], [original(x)]) <= LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_copies(name: str) -> None:
    """Deep copies and pickles are accelerated, independent and restorable."""
    original, fast = pair(name)
    x = images(first_size(name))
    saved = io.BytesIO()
    torch.save(fast, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(saved, weights_only=False),
    ]
    with torch.no_grad():
        expected, exact = fast(x), original(x)
        for clone in copies:
            assert torch.equal(clone(x), expected)
            assert not accelerate_(clone).swapped
            restore_(clone)
            assert torch.equal(clone(x), exact)
        assert torch.equal(fast(x), expected)


def test_threads() -> None:
    """Nothing is kept between or during forwards: two threads may share a model."""
    _, fast = pair("swinv2_odd")
    inputs = [images(ODD, seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected = [fast(x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(5) if not torch.equal(fast(inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
