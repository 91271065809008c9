# SPDX-License-Identifier: Apache-2.0
"""Names of backbones and how to build them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {}
_TEXT: set[str] = set()
"""Names of models that read token ids instead of images."""


def register(
    build: Callable[..., nn.Module],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    text: bool = False,
) -> None:
    """Adds `name -> build(**settings)` for every variant; a name may exist once."""
    for name, settings in variants.items():
        if name in _MODELS:
            raise ValueError(f"register: name must be new, got {name!r}")
        _MODELS[name] = (build, dict(settings))
        if text:
            _TEXT.add(name)


def list_models(pattern: str = "*") -> list[str]:
    """Registered names that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    features_only: bool = False,
    **settings: Any,
) -> nn.Module:
    """Builds a backbone with random weights.

    Args:
        name: one of `list_models()`.
        num_classes: width of the classifier, by default 1000 of image models and 0 of text models;
            0 returns the pooled features `[B, C]`.
        img_size: H and W that windows are laid out for (default: the variant's). Any other size
            works at forward, with padding where windows do not divide a map. Image models only.
        features_only: forward returns a list with the `[B, C, H, W]` map of each stage. Image
            models only; text models take `output_hidden_states=True` at forward.
        settings: overrides of the variant (`drop_path_rate`, `in_chans`, `device`, `dtype`, ...).

    Raises: ValueError for an unknown name (with close ones), sizes that cannot be built, or image
    settings of a text model; TypeError for an unknown setting.
    """
    if name not in _MODELS:
        stem = name.split("_")[0]
        close = list_models(f"{stem}*") or list_models()
        raise ValueError(
            f"create_model: name must be a registered model such as {close}, got {name!r}"
        )
    build, variant = _MODELS[name]
    if name in _TEXT:
        for argument, value in (("img_size", img_size), ("features_only", features_only or None)):
            if value is not None:
                raise ValueError(
                    f"create_model: {argument} must be left out for the text model {name!r}, "
                    f"got {value}"
                )
        return build(**{**variant, "num_classes": num_classes or 0, **settings})
    if num_classes is None:
        num_classes = 1000
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
