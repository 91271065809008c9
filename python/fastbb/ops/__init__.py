# SPDX-License-Identifier: Apache-2.0
"""Public functions of the operators. Each docstring is the operator's specification."""

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
