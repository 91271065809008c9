# SPDX-License-Identifier: Apache-2.0
"""Public functions of the operators. Each docstring is the operator's specification."""

from fastbb.ops.elastic_binarize import elastic_binarize
from fastbb.ops.null import null
from fastbb.ops.window_attention import window_attention

__all__ = ["elastic_binarize", "null", "window_attention"]
