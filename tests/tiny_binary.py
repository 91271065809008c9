# SPDX-License-Identifier: Apache-2.0
"""Small binary modules and models, with weights at which nothing hides."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

import fastbb
from fastbb.models import BinaryBert

PRESETS = ("bit", "bipft", "bibert")
VOCAB, LENGTH = 50, 9
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "intermediate": 48,
    "max_positions": 16,
}

_M = TypeVar("_M", bound=nn.Module)


def vivid(model: _M, std: float = 0.3) -> _M:
    """Attention of freshly initialised models is so even that no probability becomes 1, and zero
    biases make exact ties: this gives every tensor a size that matters.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("alpha", "alphas")) or (
                "norm" in name.lower() and name.endswith("weight")
            ):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=std)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Ids, a mask with padding, token types."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 6:] = 0
    return {
        "input_ids": torch.randint(0, VOCAB, (2, LENGTH)),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (2, LENGTH)),
    }


def calibrated(model: _M, *args: Any, **inputs: Any) -> _M:
    """The model with its scales set from inputs, as far as it has some."""
    if any(name.endswith(("alpha", "alphas")) for name, _ in model.named_parameters()):
        with fastbb.nn.calibrate(model) as waiting, torch.no_grad():
            model(*args, **inputs)
        assert waiting == []
    return model


def bert(preset: str, **settings: Any) -> BinaryBert:
    """A tiny encoder, calibrated, without dropout."""
    model = vivid(BinaryBert(**{**SIZES, "preset": preset, **settings})).eval()
    return calibrated(model, **batch())


def unused(model: nn.Module) -> list[str]:
    """Parameters whose gradient is missing, not finite, or zero throughout.

    Biases of the keys' estimators add the same to all scores of a row, which softmax does not see.
    """
    return [
        name
        for name, p in model.named_parameters()
        if not name.endswith(("k_p.bias", "k_m.bias"))
        and (p.grad is None or not p.grad.isfinite().all() or not p.grad.any())
    ]
