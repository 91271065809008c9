# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch definitions of the operators: oracle, baseline and fallback."""

from fastbb.reference.null import null
from fastbb.reference.window_attention import window_attention

__all__ = ["null", "window_attention"]
