# SPDX-License-Identifier: Apache-2.0
"""Public functions of the operators. Each docstring is the operator's specification."""

from fastbb.ops.binary_attention import binary_attention
from fastbb.ops.null import null
from fastbb.ops.window_attention import window_attention

__all__ = ["binary_attention", "null", "window_attention"]
