# SPDX-License-Identifier: Apache-2.0
"""Bytes of a model's state, what is binary apart from what is not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastbb.nn.binary_linear import BinaryLinear, PackedBinaryLinear, PackedModule
from fastbb.nn.binary_pack import BinaryEmbedding, PackedBinaryEmbedding

_BITS = ("weight_bits", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class Sizes:
    """Bytes that a model's `state_dict` stores; shared tensors count once."""

    linear: int
    """Weights of binary linear layers; packed ones with their scales and shapes."""
    linear_float32: int
    """The same weights in float32."""
    embedding: int
    """Tables of binary embeddings, likewise."""
    embedding_float32: int
    """The same tables in float32."""
    rest: int
    """All that keeps full precision: biases, shifts, norms, positions, estimators, heads."""

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.rest

    def __str__(self) -> str:
        def line(name: str, now: int, before: int) -> str:
            ratio = f", float32 {before:,} ({before / now:.1f} times)" if now else ""
            return f"  {name}: {now:,} bytes{ratio}"

        return "\n".join(
            [
                f"{self.total:,} bytes",
                line("binary linear layers, weights", self.linear, self.linear_float32),
                line("binary embeddings", self.embedding, self.embedding_float32),
                f"  full precision: {self.rest:,} bytes",
            ]
        )


def model_sizes(model: nn.Module) -> Sizes:
    """Bytes of a model's parameters and persistent buffers, by kind."""
    counted: set[int] = set()

    def count(tensor: Tensor | None) -> int:
        if tensor is None or id(tensor) in counted:
            return 0
        counted.add(id(tensor))
        return tensor.numel() * tensor.element_size()

    now = {"linear": 0, "embedding": 0}
    before = {"linear": 0, "embedding": 0}
    for module in model.modules():
        if isinstance(module, (BinaryLinear, PackedBinaryLinear)):
            kind = "linear"
        elif isinstance(module, (BinaryEmbedding, PackedBinaryEmbedding)):
            kind = "embedding"
        else:
            continue
        if isinstance(module, PackedModule):
            rows, elements = module.sizes
            size = sum(count(getattr(module, name)) for name in _BITS)
        else:
            rows, elements = module.weight.shape
            size = count(module.weight)
        now[kind] += size
        before[kind] += 4 * rows * elements if size else 0
    rest = sum(count(tensor) for tensor in model.state_dict(keep_vars=True).values())
    return Sizes(now["linear"], before["linear"], now["embedding"], before["embedding"], rest)
