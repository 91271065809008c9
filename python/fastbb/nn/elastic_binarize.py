# SPDX-License-Identifier: Apache-2.0
"""Learned scales of binarization: a quantizer as a module, and how scales are first set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastbb.ops import elastic_binarize
from fastbb.ops._checks import fail

KINDS = ("plus", "minus", "ternary", "unsigned")
STES = ("clip", "clip_open", "identity", "bireal")


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """A string that is one of `choices`."""
    if value not in choices:
        fail(op, name, f"must be one of {choices}", repr(value))


class ElasticBinarize(nn.Module):
    """alpha times the binary value of x + shift, with straight-through gradients (Liu et al. 2022).

    Args:
        channels: size of x's last dimension, for a learned shift per channel; None: no shift.
        kind: `"ternary"`, `"plus"` or `"minus"` (signs that differ at zero), or `"unsigned"`.
        ste: gradient of a sign, as in `fastbb.ops.elastic_binarize`.

    Parameters are `alpha` `[1]`, set from data by `fastbb.nn.calibrate`, and `shift`.
    """

    calibrating = False

    def __init__(
        self,
        channels: int | None = None,
        *,
        kind: str = "ternary",
        ste: str = "clip",
        **factory: Any,
    ) -> None:
        super().__init__()
        check_choice("ElasticBinarize", "kind", kind, KINDS)
        check_choice("ElasticBinarize", "ste", ste, STES)
        self.kind = kind
        self.ste = ste
        self.alpha = nn.Parameter(torch.ones(1, **factory))
        self.shift = None if channels is None else nn.Parameter(torch.zeros(channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            set_alpha(self.alpha, x, self.shift, self.kind)
            self.calibrating = False
        return elastic_binarize(x, self.alpha, self.shift, kind=self.kind, ste=self.ste)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, ste={self.ste!r}"


@torch.no_grad()
def set_alpha(alpha: Tensor, x: Tensor, shift: Tensor | None, kind: str) -> None:
    """alpha = 2 mean|x + shift| of signs, 4 mean|x + shift| of unsigned values."""
    wide = x.float() if shift is None else x.float() + shift.float()
    value = (4.0 if kind == "unsigned" else 2.0) * wide.abs().mean()
    if not torch.isfinite(value):
        fail("calibrate", "inputs", "must be finite and not empty", f"mean {value.item()}")
    alpha.fill_(value)


@contextlib.contextmanager
def calibrate(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, each elastic quantizer inside `model` sets its alpha from its first input.

    A scale is set before it is used, so that the layers that follow see what they will see later:
    one batch in one forward pass does it. Yields the names of the modules that wait for an input;
    on leaving, those that saw none keep their alpha and are left in the list.

        with fastbb.nn.calibrate(model), torch.no_grad():
            model(**batch)

    alpha is 2 mean|x + shift| of signs and 4 mean|x + shift| of unsigned values (Liu et al. 2022).

    Raises: ValueError for a model without elastic quantizers, and for inputs that are not finite.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "calibrating", None) is False and _is_elastic(module)
    }
    if not modules:
        fail("calibrate", "model", "must have elastic quantizers", type(model).__qualname__)
    waiting = list(modules)
    for module in modules.values():
        module.calibrating = True
    try:
        yield waiting
    finally:
        waiting[:] = [name for name, module in modules.items() if module.calibrating]
        for module in modules.values():
            module.calibrating = False


def _is_elastic(module: nn.Module) -> bool:
    return any(
        isinstance(getattr(module, name, None), nn.Parameter) for name in ("alpha", "alphas")
    )
