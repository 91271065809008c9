# SPDX-License-Identifier: Apache-2.0
"""What the tests of every operator share: samples, tolerances, comparisons, ISA levels.

- `SAMPLES[op]` is a callable `(device, dtype, requires_grad=False, seed=0)` that yields a `Sample`
  per named case of the raw operator `op` (`"fastbb::window_attention"`).
- `TOLERANCES[op][dtype]` has the `forward` and `grad` bounds of the operator.
- `assert_close` and `assert_grad_close` apply them, to elements and to whole tensors.

A new operator adds a module here with its cases and bounds, and one line to each table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastbb import config
from fastbb.testing import null, window_attention
from fastbb.testing.compare import Bounds, Tolerance, assert_close, assert_grad_close
from fastbb.testing.sample import Sample

__all__ = [
    "SAMPLES",
    "TOLERANCES",
    "Bounds",
    "Sample",
    "Tolerance",
    "assert_close",
    "assert_grad_close",
    "isa_params",
]

SAMPLES: dict[str, Callable[..., Iterator[Sample]]] = {
    "fastbb::null": null.samples,
    "fastbb::window_attention": window_attention.samples,
    "fastbb::window_attention_backward": window_attention.backward_samples,
}

TOLERANCES: dict[str, dict[torch.dtype, Tolerance]] = {
    "fastbb::null": null.TOLERANCES,
    "fastbb::window_attention": window_attention.TOLERANCES,
    "fastbb::window_attention_backward": window_attention.TOLERANCES,
}


def isa_params() -> list[str]:
    """Every instruction-set level that this build and machine can run, for `parametrize`."""
    return config.isa_levels()
