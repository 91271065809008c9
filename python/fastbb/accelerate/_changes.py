# SPDX-License-Identifier: Apache-2.0
"""Attribute changes that are made all together or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ABSENT = object()
"""As an old or new value: the attribute does not exist."""

_ORIGINAL_DTYPES = "_fastbb_original_dtypes"
"""Module attribute: tensor name -> dtype before the first conversion."""


class Change(NamedTuple):
    target: Any
    name: str
    old: Any
    new: Any


def commit(changes: Sequence[Change]) -> None:
    """Makes all changes in order. When one fails, undoes those before it and raises its error."""
    done: list[Change] = []
    try:
        for change in changes:
            _assign(change.target, change.name, change.new)
            done.append(change)
    except BaseException:
        for change in reversed(done):
            _assign(change.target, change.name, change.old)
        raise


def _assign(target: Any, name: str, value: Any) -> None:
    if value is ABSENT:
        delattr(target, name)
    else:
        setattr(target, name, value)


def to_dtype(model: nn.Module, dtype: torch.dtype) -> tuple[list[Change], int]:
    """Changes that convert the floating parameters and buffers and note their present dtypes.

    Also returns the number of converted tensors. The converted copies are made here, so that
    running out of memory leaves the model untouched.
    """
    notes = []
    targets = []
    for module in model.modules():
        tensors = {n: t for n, t in _floating(module).items() if t.dtype != dtype}
        if tensors:
            old = module.__dict__.get(_ORIGINAL_DTYPES, ABSENT)
            new = {n: t.dtype for n, t in tensors.items()} | ({} if old is ABSENT else old)
            notes.append(Change(module, _ORIGINAL_DTYPES, old, new))
            targets += [(t, dtype) for t in tensors.values()]
    casts, count = _cast(targets)
    return casts + notes, count


def to_original_dtypes(model: nn.Module) -> list[Change]:
    """Changes that give every converted tensor its noted dtype back and drop the notes."""
    notes = []
    targets = []
    for module in model.modules():
        dtypes = module.__dict__.get(_ORIGINAL_DTYPES)
        if dtypes is not None:
            notes.append(Change(module, _ORIGINAL_DTYPES, dtypes, ABSENT))
            tensors = _floating(module)
            targets += [(tensors[n], dtype) for n, dtype in dtypes.items() if n in tensors]
    return _cast(targets)[0] + notes


def _floating(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {n: t for n, t in own.items() if t is not None and t.is_floating_point()}


def _cast(targets: Iterable[tuple[Tensor, torch.dtype]]) -> tuple[list[Change], int]:
    """Changes of `tensor.data` (and its gradient's); shared tensors once."""
    unique = {id(tensor): (tensor, dtype) for tensor, dtype in targets}
    changes = []
    for tensor, dtype in unique.values():
        changes.append(Change(tensor, "data", tensor.data, tensor.data.to(dtype)))
        if tensor.is_leaf and tensor.grad is not None:
            grad = tensor.grad
            changes.append(Change(grad, "data", grad.data, grad.data.to(dtype)))
    return changes, len(unique)
