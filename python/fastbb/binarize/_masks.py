# SPDX-License-Identifier: Apache-2.0
"""Attention masks of other libraries as binary attention takes them."""

from __future__ import annotations

import torch
from torch import Tensor


def additive_mask(op: str, mask: Tensor | None, batch: int) -> Tensor | None:
    """`[B or 1, 1, Nq or 1, Nk]` -> `[B, Nk]` or `[B, Nq, Nk]`, to be added to scores.

    A bool mask is True where a key is seen.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"{op}: attention_mask must be a tensor, got {type(mask).__name__}; choose "
            f'attn_implementation="sdpa" or "eager"'
        )
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise NotImplementedError(
            f"{op}: attention_mask must be the same for all heads, [B, 1, N, N], "
            f"got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)
    mask = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0]
    return mask.expand(batch, *mask.shape[1:])
