# SPDX-License-Identifier: Apache-2.0
"""Side inputs of Swin v2's attention, which timm and torchvision compute alike.

Both depend on parameters alone, but are recomputed in every forward (a few hundred rows): a
cache would have to notice every way of writing to a parameter, and writes through `.data` leave
no trace.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_MAX_LOGIT_SCALE = math.log(100.0)


def continuous_bias_table(mlp: nn.Module, coords: Tensor, num_heads: int) -> Tensor:
    """`[(2wh-1)*(2ww-1), h]` relative position bias from the log-spaced coordinates' MLP."""
    return 16 * torch.sigmoid(mlp(coords).view(-1, num_heads))


def logit_factor(logit_scale: Tensor) -> Tensor:
    """Per-head factor of the cosine logits from its clamped logarithm, same shape."""
    return logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
