# SPDX-License-Identifier: Apache-2.0
"""Meaning of packed bits.

Packed rows of K elements are `[..., bit_row_bytes(K)]` uint8: bit j % 8 of byte j // 8 is element
j, and bits from K on are zero. The kind `"ternary"` has two rows per row, `[..., 2, bytes]`: where
the element is positive, and where it is negative.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_ALPHA = 1e-5
"""Lower bound of a learned scale (BiT, BiPFT)."""

_UNIT = 128


def bit_row_bytes(k: int) -> int:
    """Bytes of a packed row of k elements: 16 for every 128 begun."""
    return (k + _UNIT - 1) // _UNIT * 16


def pack_bool(x: Tensor) -> Tensor:
    """bool `[..., K]` -> packed `[..., bit_row_bytes(K)]`."""
    k = x.shape[-1]
    padded = F.pad(x.to(torch.uint8), (0, 8 * bit_row_bytes(k) - k))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=x.device)
    return (padded.unflatten(-1, (bit_row_bytes(k), 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bool(bits: Tensor, k: int) -> Tensor:
    """Packed `[..., bit_row_bytes(K)]` -> bool `[..., K]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :k].bool()


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """x + shift in float32, or in float64 when x is."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide if shift is None else wide + shift.to(wide.dtype)


def floored(alpha: Tensor) -> Tensor:
    """alpha, at least `LEAST_ALPHA`."""
    return alpha.clamp(min=LEAST_ALPHA)


def pack_sign(x: Tensor, shift: Tensor | None = None, zero_policy: str = "ternary") -> Tensor:
    """Signs of x + shift `[..., K]`: `[..., bytes]`, or `[..., 2, bytes]` for `"ternary"`."""
    shifted = _shifted(x, shift)
    if zero_policy == "ternary":
        return pack_bool(torch.stack((shifted > 0, shifted < 0), -2))
    return pack_bool(shifted >= 0 if zero_policy == "plus" else shifted > 0)


def pack_unsigned(x: Tensor, alpha: Tensor, shift: Tensor | None = None) -> Tensor:
    """Where x + shift exceeds half of alpha: `[..., bytes]`."""
    shifted = _shifted(x, shift)
    return pack_bool(shifted > floored(alpha.to(shifted.dtype)).flatten() / 2)


def pack_weight(
    weight: Tensor, center: str = "tensor", scale: str = "tensor", zero_policy: str = "plus"
) -> tuple[Tensor, Tensor]:
    """Signs of the centred weight `[N, K]`, and mean(|weight|), float32 `[1]` or `[N]`."""
    wide = weight.double()
    sizes = wide.abs().mean(1) if scale == "row" else wide.abs().mean().reshape(1)
    if center == "none":
        middle = wide.new_zeros(())
    else:
        middle = wide.mean(1, keepdim=True) if center == "row" else wide.mean()
    centred = weight if weight.dtype == torch.float64 else weight.float()
    bits = pack_sign(centred - middle.to(centred.dtype), None, zero_policy)
    return bits, sizes.float()


def unpack_bits(
    bits: Tensor, k: int, kind: str = "signed", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values `[..., K]`: +1 and -1 (`"signed"`), 1 and 0 (`"unsigned"`), or +1, 0, -1 (`"ternary"`,
    from `[..., 2, bytes]`).
    """
    ones = unpack_bool(bits, k).to(dtype)
    if kind == "unsigned":
        return ones
    if kind == "ternary":
        positive, negative = ones.unbind(-2)
        return positive - negative
    return 2 * ones - 1


def binary_embedding(
    ids: Tensor, bits: Tensor, scale: Tensor, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows `ids [...]` of packed signs `[V, bytes]` times a scale `[V]` or `[1]`: `[..., K]`."""
    rows = scale.expand(bits.shape[0])[ids]
    return (unpack_bits(bits[ids], k) * rows.unsqueeze(-1)).to(dtype)
