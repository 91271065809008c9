# SPDX-License-Identifier: Apache-2.0
"""Random numbers by position, as `csrc/core/philox.h` makes them."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox_keep(shape: tuple[int, ...], p: float, seed: int, device: torch.device) -> Tensor:
    """Which elements dropout with probability `p` keeps, a bool tensor of `shape`.

    Element e, in row-major order, has word e % 4 of block e // 4 of Philox-4x32-10 (Salmon et al.
    2011) under the 64-bit key `seed`; it is kept where the upper 24 bits, as a fraction of 2**24,
    are at least `p`.
    """
    count = 1
    for size in shape:
        count *= size
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    c0, c1 = blocks & _LOW, (blocks >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high_a, low_a = _multiply(c0, 0xD2511F53)
        high_b, low_b = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    words = torch.stack((c0, c1, c2, c3), -1).flatten()[:count]
    # Against float32's p, which kernels compare with.
    threshold = torch.tensor(p, dtype=torch.float32, device=device)
    return ((words >> 8).float() * 2.0**-24 >= threshold).reshape(shape)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers held in int64."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor
    low_word = (low + ((high & 0xFFFF) << 16)) & _LOW
    carry = ((low >> 16) + (high & 0xFFFF)) >> 16
    return (high >> 16) + carry, low_word
