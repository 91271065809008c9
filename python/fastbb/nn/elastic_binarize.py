# SPDX-License-Identifier: Apache-2.0
"""A binary activation with a learned scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbb.nn.binary_calibrate import set_alpha
from fastbb.ops._checks import fail
from fastbb.ops.elastic_binarize import KINDS, STES, Kind, Ste, elastic_binarize


class ElasticBinarize(nn.Module):
    """alpha times the binary value of x + shift, `[..., K]` -> `[..., K]` (BiT, BiPFT).

    `fastbb.ops.elastic_binarize` says which values and gradients the kinds and the `ste` have.

    Args:
        features: K, when a shift per feature is to be learned; None: no shift.
        kind: `"plus"`, `"minus"`, `"ternary"` (signs) or `"unsigned"`.
        ste: `"clip"`, `"clip_open"`, `"identity"` or `"bireal"`.
        factory: `device` and `dtype` of the parameters.

    Attributes:
        alpha: parameter `[1]`, at first 1: `calibrate_`, or `fastbb.nn.calibrate` of a whole
            model, sets it from data.
        shift: parameter `[features]`, at first 0, or None.
    """

    calibrating = False

    def __init__(
        self,
        features: int | None = None,
        *,
        kind: Kind = "ternary",
        ste: Ste = "clip",
        **factory: Any,
    ) -> None:
        super().__init__()
        if features is not None and features < 1:
            fail("ElasticBinarize", "features", "must be at least 1", features)
        if kind not in KINDS:
            fail("ElasticBinarize", "kind", f"must be one of {KINDS}", repr(kind))
        if ste not in STES:
            fail("ElasticBinarize", "ste", f"must be one of {STES}", repr(ste))
        self.kind: Kind = kind
        self.ste: Ste = ste
        self.alpha = nn.Parameter(torch.ones(1, **factory))
        self.shift: nn.Parameter | None = None
        if features is not None:
            self.shift = nn.Parameter(torch.zeros(features, **factory))

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> ElasticBinarize:
        """Sets alpha from a batch as BiT and BiPFT do before their first step: to twice the mean of
        abs(x + shift) for signs, to four times it for unsigned values. Returns the module.
        """
        set_alpha(self.alpha, x, self.shift, self.kind)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self.calibrate_(x)
            self.calibrating = False
        return elastic_binarize(x, self.alpha, self.shift, kind=self.kind, ste=self.ste)

    def extra_repr(self) -> str:
        features = None if self.shift is None else self.shift.shape[0]
        return f"{features}, kind={self.kind!r}, ste={self.ste!r}"
