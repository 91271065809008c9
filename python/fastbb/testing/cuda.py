# SPDX-License-Identifier: Apache-2.0
"""Kinds of arithmetic of CUDA kernels, and their tolerances.

Tensor cores multiply 16-bit numbers: kernels round the softmax weights, and in the backward the
gradients of the logits too, to the inputs' type before the next product, where CPU kernels round
results alone. tf32 rounds q, k and v as well.
"""

from __future__ import annotations

import torch

from fastbb.testing import (
    binary_attention,
    binary_linear,
    binary_pack,
    elastic_binarize,
    null,
    window_attention,
)
from fastbb.testing.compare import Bounds, Tolerance

KINDS: dict[str, torch.dtype] = {
    "f32": torch.float32,
    "tf32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Kind of arithmetic -> dtype of the tensors."""

# Sums run in another order than on the CPU, over fewer and longer parts.
_CPU = window_attention.TOLERANCES[torch.float32]
_FLOAT32 = (_CPU.forward.times(4), _CPU.grad.times(4))
# Twice what the largest logits of the samples (queries of unit scale) make of rounded q and k.
_TF32 = (Bounds(8e-3, 8e-3, 2e-3), Bounds(1.2e-2, 1.2e-2, 4e-3))

_WINDOW_ATTENTION = {
    "f32": Tolerance(*_FLOAT32, *_FLOAT32),
    "tf32": Tolerance(*_TF32, *_TF32),
    "f16": Tolerance(Bounds(1e-3, 1e-3, 1e-3), Bounds(1.5e-3, 1.5e-3, 8e-4), *_FLOAT32),
    "bf16": Tolerance(Bounds(8e-3, 8e-3, 8e-3), Bounds(1.2e-2, 1.2e-2, 6e-3), *_FLOAT32),
}


def _as_on_the_cpu(tolerances: dict[torch.dtype, Tolerance]) -> dict[str, Tolerance]:
    """Bits and integers are exact everywhere; what follows them is float32 and rounded once."""
    return {kind: tolerances[dtype] for kind, dtype in KINDS.items()}


CUDA_TOLERANCES: dict[str, dict[str, Tolerance]] = {
    "fastbb::bgemm": _as_on_the_cpu(binary_linear.GEMM_TOLERANCES),
    "fastbb::binary_attention": _as_on_the_cpu(binary_attention.TOLERANCES),
    "fastbb::binary_embedding": _as_on_the_cpu(binary_pack.TOLERANCES),
    "fastbb::binary_linear": _as_on_the_cpu(binary_linear.TOLERANCES),
    "fastbb::elastic_binarize": _as_on_the_cpu(elastic_binarize.TOLERANCES),
    "fastbb::elastic_binarize_backward": _as_on_the_cpu(elastic_binarize.TOLERANCES),
    "fastbb::elastic_planes": _as_on_the_cpu(elastic_binarize.TOLERANCES),
    "fastbb::null": _as_on_the_cpu(null.TOLERANCES),
    "fastbb::pack_bits": _as_on_the_cpu(binary_pack.TOLERANCES),
    "fastbb::pack_weight": _as_on_the_cpu(binary_pack.WEIGHT_TOLERANCES),
    "fastbb::unpack_bits": _as_on_the_cpu(binary_pack.TOLERANCES),
    "fastbb::window_attention": _WINDOW_ATTENTION,
    "fastbb::window_attention_backward": _WINDOW_ATTENTION,
}
