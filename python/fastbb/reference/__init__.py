# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch definitions of the operators: oracle, baseline and fallback."""

from fastbb.reference.binary_attention import binary_attention
from fastbb.reference.binary_linear import (
    bgemm,
    binary_linear,
    binary_linear_train,
    value_kind,
)
from fastbb.reference.binary_pack import (
    LEAST_ALPHA,
    binary_embedding,
    bit_row_bytes,
    pack_sign,
    pack_unsigned,
    pack_weight,
    unpack_bits,
)
from fastbb.reference.elastic_binarize import (
    binarize_weight,
    elastic_binarize,
    weight_gradient,
)
from fastbb.reference.null import null
from fastbb.reference.window_attention import window_attention

__all__ = [
    "LEAST_ALPHA",
    "bgemm",
    "binarize_weight",
    "binary_attention",
    "binary_embedding",
    "binary_linear",
    "binary_linear_train",
    "bit_row_bytes",
    "elastic_binarize",
    "null",
    "pack_sign",
    "pack_unsigned",
    "pack_weight",
    "unpack_bits",
    "value_kind",
    "weight_gradient",
    "window_attention",
]
