# SPDX-License-Identifier: Apache-2.0
"""Quantizers of the papers, each stated for itself from its formulas, in float64 NumPy.

A quantizer takes x' (shifted), alpha and the gradient g of its result, and returns the result, the
gradient of x' and that of alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Quantizer = Callable[[Array, float, Array], tuple[Array, Array, float]]


def elastic_signed(x: Array, alpha: float, g: Array) -> tuple[Array, Array, float]:
    """BiT and BiPFT: alpha * sign(x'), where 0 has sign 0. The gradient passes unless x' / alpha
    lies outside of [-1, 1].
    """
    ratio = x / alpha
    outside = (ratio < -1.0) | (ratio > 1.0)
    dalpha = float(np.sum(np.sign(x) * g)) / math.sqrt(x.size)
    return alpha * np.sign(x), np.where(outside, 0.0, g), dalpha


def elastic_unsigned(x: Array, alpha: float, g: Array) -> tuple[Array, Array, float]:
    """BiT: alpha * clamp(round(x' / alpha), 0, 1), round to nearest even."""
    ratio = x / alpha
    below, beyond = ratio < 0.0, ratio > 1.0
    nearest = np.round(ratio)
    phi = nearest - ratio
    phi[below] = 0.0
    phi[beyond] = 1.0
    dalpha = float(np.sum(phi * g)) / math.sqrt(x.size)
    return alpha * np.clip(nearest, 0.0, 1.0), np.where(below | beyond, 0.0, g), dalpha


def bibert_linear(x: Array, alpha: float, g: Array) -> tuple[Array, Array, float]:
    """BiBERT, inputs of Linear layers: sign(x), whose gradient is that of clamp(x, -1, 1)."""
    passed = g.copy()
    passed[x > 1.0] = 0.0
    passed[x < -1.0] = 0.0
    return np.sign(x), passed, float(np.sum(np.sign(x) * g)) / math.sqrt(x.size)


def bibert_attention(x: Array, alpha: float, g: Array) -> tuple[Array, Array, float]:
    """BiBERT, queries, keys and values: sign(x), the gradient stops at abs(x) >= 1."""
    passed = g.copy()
    passed[np.abs(x) >= 1.0] = 0.0
    return np.sign(x), passed, float(np.sum(np.sign(x) * g)) / math.sqrt(x.size)


def bireal(x: Array, alpha: float, g: Array) -> tuple[Array, Array, float]:
    """Bi-Real and ReActNet: the sign stands for a polynomial that is -1 below -1, 2u + u^2 up to 0,
    2u - u^2 up to 1, and 1 beyond; its derivative is 2 + 2u, then 2 - 2u, and 0 outside.
    """
    u = x / alpha
    slope = np.zeros_like(u)
    left, right = (u >= -1.0) & (u < 0.0), (u >= 0.0) & (u < 1.0)
    slope[left] = 2.0 + 2.0 * u[left]
    slope[right] = 2.0 - 2.0 * u[right]
    return alpha * np.sign(x), slope * g, float(np.sum(np.sign(x) * g)) / math.sqrt(x.size)


# Quantizer, kind, ste, whether it has a learned alpha and shift.
PAPERS: dict[str, tuple[Quantizer, str, str, bool]] = {
    "BiT, BiPFT signed": (elastic_signed, "ternary", "clip", True),
    "BiT unsigned": (elastic_unsigned, "unsigned", "clip", True),
    "BiBERT linear": (bibert_linear, "ternary", "clip", False),
    "BiBERT attention": (bibert_attention, "ternary", "clip_open", False),
    "Bi-Real, ReActNet": (bireal, "ternary", "bireal", True),
}
