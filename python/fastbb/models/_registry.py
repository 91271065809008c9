# SPDX-License-Identifier: Apache-2.0
"""Names of backbones and how to build them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {}


def register(build: Callable[..., nn.Module], variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds `name -> build(**settings)` for every variant; a name may exist once."""
    for name, settings in variants.items():
        if name in _MODELS:
            raise ValueError(f"register: name must be new, got {name!r}")
        _MODELS[name] = (build, dict(settings))


def list_models(pattern: str = "*") -> list[str]:
    """Registered names that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    features_only: bool = False,
    **settings: Any,
) -> nn.Module:
    """Builds a backbone with random weights.

    Args:
        name: one of `list_models()`.
        num_classes: width of the classifier; 0 returns the pooled features `[B, C]`.
        img_size: H and W that windows are laid out for (default: the variant's). Any other size
            works at forward, with padding where windows do not divide a map.
        features_only: forward returns a list with the `[B, C, H, W]` map of each stage.
        settings: overrides of the variant (`drop_path_rate`, `in_chans`, `device`, `dtype`, ...).

    Raises: ValueError for an unknown name (with close ones) or sizes that cannot be built,
    TypeError for an unknown setting.
    """
    if name not in _MODELS:
        stem = name.split("_")[0]
        close = list_models(f"{stem}*") or list_models()
        raise ValueError(
            f"create_model: name must be a registered model such as {close}, got {name!r}"
        )
    build, variant = _MODELS[name]
    if img_size is not None:
        variant = {**variant, "img_size": img_size}
    return build(
        **{**variant, "num_classes": num_classes, "features_only": features_only, **settings}
    )


def image_size(value: int | tuple[int, int], multiple: int) -> tuple[int, int]:
    """(H, W), each at least `multiple`."""
    size = (value, value) if isinstance(value, int) else tuple(value)
    if len(size) != 2 or min(size) < multiple:
        raise ValueError(f"create_model: img_size must be at least {multiple} a side, got {value}")
    return size[0], size[1]
