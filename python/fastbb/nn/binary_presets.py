# SPDX-License-Identifier: Apache-2.0
"""What each paper binarizes, and how: settings of the binary modules, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from fastbb.ops._checks import fail

Settings = Mapping[str, Any]


_ELASTIC: Settings = dict(
    kind="ternary",
    ste="clip",
    center="tensor",
    scale="tensor",
    zero_policy="plus",
    weight_ste="identity",
    elastic=True,
    shift=True,
)
_PLAIN: Settings = dict(
    kind="ternary",
    ste="clip",
    center="row",
    scale="row",
    zero_policy="plus",
    weight_ste="clip",
    elastic=False,
    shift=False,
)


@dataclass(frozen=True)
class Preset:
    """How a paper binarizes a transformer."""

    linear: Settings
    """Of `BinaryLinear`, everywhere but in the down-projection of the feed-forward network."""
    ffn_down: Settings
    """Of `BinaryLinear` there, whose input is an activation's output."""
    activation: Literal["relu", "gelu"]
    """Between the linear layers of the feed-forward network: `"relu"` or `"gelu"`."""
    probs: Literal["softmax", "bool"]
    """Of `binary_attention`."""
    attention_ste: Literal["clip", "clip_open", "identity"]
    elastic_attention: bool
    """Whether queries, keys, values and probabilities have learned scales."""
    estimator_rank: int
    """Default rank of the estimators of what binary attention loses (0: none)."""
    residual_pooler: bool
    """Whether the pooler is tanh(LayerNorm(linear(x)) + x) instead of tanh(linear(x))."""
    embedding: Settings = field(default_factory=dict)
    """Of `BinaryEmbedding`."""


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        # Liu et al. 2022: ReLU, whose outputs become 0 and 1.
        "bit": Preset(
            linear=_ELASTIC,
            ffn_down={**_ELASTIC, "kind": "unsigned"},
            activation="relu",
            probs="softmax",
            attention_ste="clip",
            elastic_attention=True,
            estimator_rank=0,
            residual_pooler=False,
        ),
        # Xing et al. 2024: GELU, whose outputs become signs; estimators; a pooler with a residual.
        "bipft": Preset(
            linear=_ELASTIC,
            ffn_down=_ELASTIC,
            activation="gelu",
            probs="softmax",
            attention_ste="clip",
            elastic_attention=True,
            estimator_rank=1,
            residual_pooler=True,
        ),
        # Qin et al. 2022: no learned scales, weights by row, attention without softmax.
        "bibert": Preset(
            linear=_PLAIN,
            ffn_down=_PLAIN,
            activation="gelu",
            probs="bool",
            attention_ste="clip_open",
            elastic_attention=False,
            estimator_rank=0,
            residual_pooler=False,
            embedding={"center": "row", "weight_ste": "clip"},
        ),
    }
)
"""The binary transformers that can be built and converted to."""


def preset_of(op: str, preset: str | Preset) -> Preset:
    """A preset by name, or itself."""
    if isinstance(preset, Preset):
        return preset
    if preset not in PRESETS:
        fail(op, "preset", f"must be one of {sorted(PRESETS)} or a Preset", repr(preset))
    return PRESETS[preset]
