# SPDX-License-Identifier: Apache-2.0
"""Public functions of the operators. Each docstring is the operator's specification."""

from fastbb.ops.binary_attention import binary_attention
from fastbb.ops.binary_linear import bgemm, binary_linear
from fastbb.ops.binary_linear_train import binary_linear_train
from fastbb.ops.binary_pack import (
    binary_embedding,
    pack_sign,
    pack_unsigned,
    pack_weight,
    unpack_bits,
)
from fastbb.ops.elastic_binarize import elastic_binarize
from fastbb.ops.null import null
from fastbb.ops.window_attention import window_attention

__all__ = [
    "bgemm",
    "binary_attention",
    "binary_embedding",
    "binary_linear",
    "binary_linear_train",
    "elastic_binarize",
    "null",
    "pack_sign",
    "pack_unsigned",
    "pack_weight",
    "unpack_bits",
    "window_attention",
]
