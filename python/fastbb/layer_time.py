# SPDX-License-Identifier: Apache-2.0
"""Where a model's time goes: seconds per stage and kind of layer, by forward hooks.

Each module's time is what it spends outside of other timed modules, and belongs to the kind of
the module. `projections` are the linear layers around attention, `attention` the rest of it
(torchvision's own attention calls its projections as functions, so there `attention` has both).
The time of a block itself is kind `block`: residual additions and, in timm's Swin and GC ViT,
roll, padding, window partition and reverse. Hooks see nothing inside compiled models.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KINDS = (
    "convolution",
    "downsample",
    "norm",
    "attention",
    "projections",
    "mlp",
    "block",
    "other",
)

Key = tuple[str, str]
"""(stage, kind); stages are `stem`, `stage 1` ... and `head`."""

_BY_CLASS = (
    ("downsample", re.compile(r"Downsample|PatchMerging|OverlapPatchEmbed")),
    ("convolution", re.compile(r"^Stem$|FeatureBlock|PatchEmbed|^Conv2d$|MbConv")),
    ("attention", re.compile(r"Attention")),
    ("mlp", re.compile(r"^(Mlp|MLP)")),
    ("block", re.compile(r"Block$|BlockV2$")),
    ("norm", re.compile(r"Norm")),
)
_INDIVISIBLE = ("convolution", "downsample", "norm", "attention", "projections", "mlp")
_PROJECTIONS = ("qkv", "q", "kv", "proj")


def kind_of(path: str, module: nn.Module, parent: str) -> str:
    """Kind of a module inside a parent of kind `parent`."""
    name = path.rpartition(".")[2]
    if parent == "attention" and name in _PROJECTIONS:
        return "projections"
    if parent in _INDIVISIBLE:
        return parent
    if name == "patch_embed":
        return "convolution"
    # An accelerated module's class is a subclass of the library's: either name may tell.
    for cls in type(module).__mro__:
        for kind, pattern in _BY_CLASS:
            if pattern.search(cls.__name__):
                return kind
    return parent


def stage_of(path: str) -> str:
    """Stage that a path of timm's or torchvision's models belongs to."""
    match = re.match(r"(?:stages|layers)\.(\d+)", path)
    if match:
        return f"stage {int(match[1]) + 1}"
    match = re.match(r"features\.(\d+)", path)
    if match:
        # torchvision: 0 embedding, 1 stage 1, 2 merging of stage 2, 3 stage 2, ...
        index = int(match[1])
        return "stem" if index == 0 else f"stage {index // 2 + 1}"
    return "stem" if path.startswith(("stem", "patch_embed", "pos_drop")) else "head"


class _Clock:
    """Attributes time to the innermost open module."""

    def __init__(self) -> None:
        self.seconds: dict[Key, float] = {}
        self._open: list[Key] = []
        self._since = 0.0

    def enter(self, key: Key) -> None:
        self._charge()
        self._open.append(key)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            key = self._open[-1]
            self.seconds[key] = self.seconds.get(key, 0.0) + now - self._since
        self._since = now


@contextmanager
def _hooked(model: nn.Module, clock: _Clock) -> Iterator[None]:
    handles: list[Any] = []
    keys: dict[str, Key] = {}
    for path, module in model.named_modules():
        parent = keys.get(path.rpartition(".")[0], ("head", "other"))
        key = keys[path] = (stage_of(path), kind_of(path, module, parent[1]))
        # Only borders need a hook: fewer hooks disturb less.
        if not path or key != parent:
            handles.append(module.register_forward_pre_hook(_entering(clock, key)))
            handles.append(module.register_forward_hook(_leaving(clock), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(clock: _Clock, key: Key) -> Callable[..., None]:
    return lambda module, args: clock.enter(key)


def _leaving(clock: _Clock) -> Callable[..., None]:
    return lambda module, args, output: clock.leave()


@torch.inference_mode()
def layer_times(
    models: dict[str, tuple[nn.Module, Tensor]],
    *,
    runs: int = 10,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[Key, float]]:
    """Median seconds by (stage, kind) of each model; the models run in turns.

    Args:
        models: name -> (model in evaluation mode, its input).
        runs: timed forwards of each model, after one that is not.
    """
    taken: dict[str, list[dict[Key, float]]] = {name: [] for name in models}
    for run in range(runs + 1):
        for name, (model, x) in models.items():
            clock = _Clock()
            with _hooked(model, clock):
                model(x)
            if run > 0:
                taken[name].append(clock.seconds)
        if progress is not None:
            progress(f"run {run} of {runs}")
    return {
        name: {key: statistics.median(t[key] for t in times) for key in times[0]}
        for name, times in taken.items()
    }


def sum_over(times: dict[Key, float], part: int) -> dict[str, float]:
    """Seconds by stage (`part` 0) or by kind (1), in order of first appearance."""
    totals: dict[str, float] = {}
    for key, seconds in times.items():
        totals[key[part]] = totals.get(key[part], 0.0) + seconds
    return totals
