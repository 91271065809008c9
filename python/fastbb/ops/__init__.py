# SPDX-License-Identifier: Apache-2.0
"""Public functions of the operators. Each docstring is the operator's specification."""

from fastbb.ops.binary_linear import bgemm, binary_linear
from fastbb.ops.null import null
from fastbb.ops.window_attention import window_attention

__all__ = ["bgemm", "binary_linear", "null", "window_attention"]
