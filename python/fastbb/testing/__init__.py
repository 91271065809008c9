# SPDX-License-Identifier: Apache-2.0
"""What the tests of every operator share: samples, tolerances, comparisons, ISA levels.

- `SAMPLES[op]` is a callable `(device, dtype, requires_grad=False, seed=0)` that yields a `Sample`
  per named case of the raw operator `op` (`"fastbb::window_attention"`).
- `TOLERANCES[op][dtype]` has the `forward` and `grad` bounds of the operator on the CPU,
  `CUDA_TOLERANCES[op][kind]` those of its CUDA kernels by kind of arithmetic (`CUDA_KINDS`).
- `assert_close`, `assert_grad_close` and `assert_grads_close` apply them, to elements and to whole
  tensors.

A new operator adds a module here with its cases and bounds, and one line to each table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastbb import config
from fastbb.testing import (
    binary_attention,
    binary_linear,
    binary_pack,
    elastic_binarize,
    null,
    window_attention,
)
from fastbb.testing.compare import (
    Bounds,
    OutOfBounds,
    Tolerance,
    assert_close,
    assert_grad_close,
    assert_grads_close,
)
from fastbb.testing.cuda import CUDA_TOLERANCES
from fastbb.testing.cuda import KINDS as CUDA_KINDS
from fastbb.testing.sample import Sample

__all__ = [
    "CUDA_KINDS",
    "CUDA_TOLERANCES",
    "SAMPLES",
    "TOLERANCES",
    "Bounds",
    "OutOfBounds",
    "Sample",
    "Tolerance",
    "assert_close",
    "assert_grad_close",
    "assert_grads_close",
    "isa_params",
]

SAMPLES: dict[str, Callable[..., Iterator[Sample]]] = {
    "fastbb::bgemm": binary_linear.gemm_samples,
    "fastbb::binary_attention": binary_attention.samples,
    "fastbb::binary_embedding": binary_pack.embedding_samples,
    "fastbb::binary_linear": binary_linear.samples,
    "fastbb::elastic_binarize": elastic_binarize.samples,
    "fastbb::elastic_binarize_backward": elastic_binarize.backward_samples,
    "fastbb::elastic_planes": elastic_binarize.planes_samples,
    "fastbb::null": null.samples,
    "fastbb::pack_bits": binary_pack.pack_samples,
    "fastbb::pack_weight": binary_pack.weight_samples,
    "fastbb::unpack_bits": binary_pack.unpack_samples,
    "fastbb::window_attention": window_attention.samples,
    "fastbb::window_attention_backward": window_attention.backward_samples,
}

TOLERANCES: dict[str, dict[torch.dtype, Tolerance]] = {
    "fastbb::bgemm": binary_linear.GEMM_TOLERANCES,
    "fastbb::binary_attention": binary_attention.TOLERANCES,
    "fastbb::binary_embedding": binary_pack.TOLERANCES,
    "fastbb::binary_linear": binary_linear.TOLERANCES,
    "fastbb::elastic_binarize": elastic_binarize.TOLERANCES,
    "fastbb::elastic_binarize_backward": elastic_binarize.TOLERANCES,
    "fastbb::elastic_planes": elastic_binarize.TOLERANCES,
    "fastbb::null": null.TOLERANCES,
    "fastbb::pack_bits": binary_pack.TOLERANCES,
    "fastbb::pack_weight": binary_pack.WEIGHT_TOLERANCES,
    "fastbb::unpack_bits": binary_pack.TOLERANCES,
    "fastbb::window_attention": window_attention.TOLERANCES,
    "fastbb::window_attention_backward": window_attention.TOLERANCES,
}


def isa_params() -> list[str]:
    """Every instruction-set level that this build and machine can run, for `parametrize`."""
    return config.isa_levels()
