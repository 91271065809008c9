# SPDX-License-Identifier: Apache-2.0
"""Public functions of the operators. Each docstring is the operator's specification."""

from fastbb.ops.binary_linear import bgemm, binary_linear
from fastbb.ops.null import null
from fastbb.ops.window_attention import window_attention

__all__ = ["null", "window_attention"]

from fastbb.ops._temporary import (  # noqa: F401
    binary_attention,
    binary_embedding,
    binary_linear,
    binary_linear_train,
    elastic_binarize,
    pack_weight,
    unpack_bits,
)
__all__ = ["bgemm", "binary_linear", "null", "window_attention"]
from fastbb.ops.binary_pack import (
    binary_embedding,
    pack_sign,
    pack_unsigned,
    pack_weight,
    unpack_bits,
)
from fastbb.ops.null import null
from fastbb.ops.window_attention import window_attention

__all__ = [
    "binary_embedding",
    "null",
    "pack_sign",
    "pack_unsigned",
    "pack_weight",
    "unpack_bits",
    "window_attention",
]
from fastbb.ops.elastic_binarize import elastic_binarize
from fastbb.ops.null import null
from fastbb.ops.window_attention import window_attention

__all__ = ["elastic_binarize", "null", "window_attention"]
from fastbb.ops.binary_attention import binary_attention
from fastbb.ops.null import null
from fastbb.ops.window_attention import window_attention

__all__ = ["binary_attention", "null", "window_attention"]
