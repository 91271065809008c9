# SPDX-License-Identifier: Apache-2.0
"""Samples and tolerances of `fastbb::null`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastbb.testing.compare import Bounds, Tolerance
from fastbb.testing.sample import Sample

_EXACT = Bounds(0.0, 0.0, 0.0)
TOLERANCES = {
    dtype: Tolerance(_EXACT, _EXACT, _EXACT, _EXACT)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


def samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """Odd sizes, a sliced view, empty tensors."""
    generator = torch.Generator().manual_seed(seed)

    def make(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device, dtype)

    cases = {
        "one": make(1, 1),
        "odd": make(3, 37),
        "vectors": make(4, 64),
        "sliced": make(6, 50)[1::2, 3:30],
        "no rows": make(0, 5),
        "no columns": make(5, 0),
    }
    for name, x in cases.items():
        yield Sample(name, (x.requires_grad_() if requires_grad else x,))
