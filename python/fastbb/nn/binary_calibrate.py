# SPDX-License-Identifier: Apache-2.0
"""How the learned scales of binary modules are first set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastbb.ops._checks import fail


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
