# SPDX-License-Identifier: Apache-2.0
"""Stand-ins until the operators are merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastbb import reference


def pack_weight(weight: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
    return reference.pack_weight(weight, **kw)


def unpack_bits(bits: Tensor, k: int, **kw: Any) -> Tensor:
    return reference.unpack_bits(bits, k, **kw)


def binary_embedding(ids: Tensor, bits: Tensor, scale: Tensor, **kw: Any) -> Tensor:
    return reference.binary_embedding(ids, bits, scale, **kw)


def binary_linear(
    x: Tensor, weight_bits: Tensor, weight_scale: Tensor, bias: Any, **kw: Any
) -> Tensor:
    return reference.binary_linear(x, weight_bits, weight_scale, bias, **kw)


def binary_linear_train(x: Tensor, weight: Tensor, bias: Any, **kw: Any) -> Tensor:
    return reference.binary_linear_train(x, weight, bias, **kw)


def elastic_binarize(x: Tensor, alpha: Any, shift: Any, **kw: Any) -> Tensor:
    return reference.elastic_binarize(x, alpha, shift, **kw)


def binary_attention(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
    return reference.binary_attention(q, k, v, **kw)
