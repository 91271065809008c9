# SPDX-License-Identifier: Apache-2.0
"""Attention shapes of real backbones, read from the models and not retyped.

A timm model is built on the meta device (no memory, no arithmetic) and run once, while hooks note
what each attention layer is given. Layers of equal shape become one row with a count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbb._console import require


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer without its linear layers. Letters as in `ops.window_attention`."""

    model: str
    """Key of `MODELS`."""
    image: tuple[int, int]
    stage: int
    """1 is the finest map."""
    kind: str
    """`local`, `shifted` or `global` windows; `cosine` and `cosine shifted` (Swin v2); `reduced`
    (PVT: keys of a reduced map)."""
    heads: int
    head_dim: int
    map_size: tuple[int, int]
    """(H, W) of the queries' map."""
    window: tuple[int, int] | None = None
    """None in the full domain (`reduced`)."""
    shift: tuple[int, int] = (0, 0)
    keys: int = 0
    """Number of keys per image in the full domain."""
    count: int = 1
    """Layers of this shape in the model."""

    @property
    def name(self) -> str:
        """Identifies the shape among all of one run."""
        return f"{self.model} s{self.stage} {self.kind}"

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def padded_size(self) -> tuple[int, int]:
        """Map completed to whole windows."""
        if self.window is None:
            return self.map_size
        (h, w), (wh, ww) = self.map_size, self.window
        return h + -h % wh, w + -w % ww

    @property
    def windows(self) -> int:
        """Attention problems per image."""
        if self.window is None:
            return 1
        return self.padded_size[0] * self.padded_size[1] // (self.window[0] * self.window[1])

    @property
    def queries_keys(self) -> tuple[int, int]:
        """(Nq, Nk) of one problem."""
        if self.window is None:
            return self.map_size[0] * self.map_size[1], self.keys
        tokens = self.window[0] * self.window[1]
        return tokens, tokens

    def score_elements(self, batch: int) -> int:
        """Elements of all score matrices together: what an unfused layer keeps in memory."""
        nq, nk = self.queries_keys
        return batch * self.windows * self.heads * nq * nk

    def flops(self, batch: int, backward: bool = False) -> int:
        """Floating-point operations of the matrix products: two forward; with backward five more,
        as the score matrix is computed again."""
        return (7 if backward else 2) * 2 * self.score_elements(batch) * self.head_dim

    def bytes_moved(self, batch: int, element_size: int, backward: bool = False) -> int:
        """Smallest possible memory traffic: every input read once, every output written once.

        Backward reads q, k, v, the output and its gradient and writes dq, dk, dv.
        """
        tokens = self.map_size[0] * self.map_size[1]
        if self.window is None:
            queries, keys = tokens, self.keys
        elif self.kind == "global":
            queries, keys = self.window[0] * self.window[1], tokens
        else:
            queries = keys = tokens
        forward = queries + 2 * keys + tokens
        both = forward + queries + 2 * keys + 2 * tokens + queries + 2 * keys
        return batch * self.channels * element_size * (both if backward else forward)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"name": self.name}


MODELS: dict[str, tuple[str, tuple[int, int]]] = {
    "gcvit_xxtiny": ("gcvit_xxtiny", (224, 224)),
    "gcvit_tiny": ("gcvit_tiny", (224, 224)),
    "swin_tiny": ("swin_tiny_patch4_window7_224", (224, 224)),
    "swinv2_tiny_w8": ("swinv2_tiny_window8_256", (256, 256)),
    "pvt_v2_b2": ("pvt_v2_b2", (224, 224)),
    "swin_tiny_det": ("swin_tiny_patch4_window7_224", (800, 1344)),
    "gcvit_tiny_512": ("gcvit_tiny", (512, 512)),
}
"""Key -> (timm name, image size). The last two are sizes of detection and segmentation."""

DEFAULT_KEYS = ("gcvit_tiny", "swin_tiny", "pvt_v2_b2")


def attention_shapes(keys: Sequence[str] = DEFAULT_KEYS) -> list[AttentionShape]:
    """Distinct attention layers of the models behind `keys` (of `MODELS`), in order of depth.

    Raises: ValueError for an unknown key; UsageError when timm is missing.
    """
    unknown = [key for key in keys if key not in MODELS]
    if unknown:
        raise ValueError(
            f"attention_shapes: keys must be among {list(MODELS)}, got {', '.join(unknown)}"
        )
    return [shape for key in keys for shape in _model_shapes(key)]


def _model_shapes(key: str) -> list[AttentionShape]:
    timm = require("timm", "reading the layer shapes")
    name, image = MODELS[key]
    # PVT v2 takes any image and has no such argument.
    options = {} if name.startswith("pvt_v2") else {"img_size": image}
    found: list[AttentionShape] = []
    with torch.device("meta"):
        model = timm.create_model(name, **options).eval()
        for path, module in model.named_modules():
            describe = _DESCRIBE.get(type(module).__name__)
            if describe is not None:
                stage = int(path.split(".")[1]) + 1
                facts = {"model": key, "image": image, "stage": stage}
                _note_inputs(module, describe, facts, found)
        model(torch.empty(1, 3, *image))
    counts = {shape: found.count(shape) for shape in found}
    return [dataclasses.replace(shape, count=count) for shape, count in counts.items()]


def _note_inputs(
    module: nn.Module,
    describe: Callable[[Any, tuple[Any, ...]], dict[str, Any]],
    facts: dict[str, Any],
    found: list[AttentionShape],
) -> None:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(AttentionShape(**facts, **describe(module, args)))

    module.register_forward_pre_hook(note)


def _describe_gcvit(block: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    return {
        "kind": "global" if block.attn.use_global else "local",
        "heads": block.attn.num_heads,
        "head_dim": block.attn.head_dim,
        "map_size": tuple(args[0].shape[1:3]),
        "window": tuple(block.window_size),
    }


def _describe_swin(block: Any, args: tuple[Any, ...], cosine: bool = False) -> dict[str, Any]:
    heads = block.attn.num_heads
    plain = "shifted" if any(block.shift_size) else "local"
    fancy = "cosine shifted" if any(block.shift_size) else "cosine"
    return {
        "kind": fancy if cosine else plain,
        "heads": heads,
        "head_dim": block.attn.qkv.out_features // (3 * heads),
        "map_size": tuple(args[0].shape[1:3]),
        "window": tuple(block.window_size),
        "shift": tuple(block.shift_size),
    }


def _describe_swin_v2(block: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    return _describe_swin(block, args, cosine=True)


def _describe_pvt(attn: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    height, width = args[1]
    ratio = 1 if attn.sr is None else attn.sr.stride[0]
    return {
        "kind": "reduced",
        "heads": attn.num_heads,
        "head_dim": attn.head_dim,
        "map_size": (height, width),
        "keys": 49 if attn.pool is not None else (height // ratio) * (width // ratio),
    }


_DESCRIBE: dict[str, Callable[[Any, tuple[Any, ...]], dict[str, Any]]] = {
    "GlobalContextVitBlock": _describe_gcvit,
    "SwinTransformerBlock": _describe_swin,
    "SwinTransformerV2Block": _describe_swin_v2,
    "Attention": _describe_pvt,
}
"""timm class -> facts about its attention, from the module and the arguments of its forward."""
