# SPDX-License-Identifier: Apache-2.0
"""Embeddings of binary weights: for training, and packed for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbb.nn.binary_linear import Center, PackedModule, WeightSte, shape_tensor
from fastbb.ops import binary_embedding, pack_weight
from fastbb.ops._checks import check_choice, fail


class BinaryEmbedding(nn.Embedding):
    """Rows mean(|row|) * sign(row - mean) of a latent table `weight` `[V, K]`.

    Only the rows that are looked up are binarized. The gradient passes to them unchanged
    (`weight_ste="identity"`: BiT, BiPFT), or where the centred row is within 1, less its mean
    (`"clip"`, with `center="row"`: BiBERT).

    Args:
        num_embeddings, dim, padding_idx: as of `nn.Embedding`.
        center: mean that is taken from a row: of the whole `"tensor"`, or of the `"row"`.
    """

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        padding_idx: int | None = None,
        *,
        center: Center = "tensor",
        weight_ste: WeightSte = "identity",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, dim, padding_idx, device=device, dtype=dtype)
        check_choice("BinaryEmbedding", "center", center, ("tensor", "row"))
        check_choice("BinaryEmbedding", "weight_ste", weight_ste, ("identity", "clip"))
        self.center: Center = center
        self.weight_ste: WeightSte = weight_ste

    @classmethod
    def from_float(cls, embedding: nn.Embedding, **settings: Any) -> BinaryEmbedding:
        """A binary table that takes over the parameter of `embedding`: the same, not a copy."""
        op = "BinaryEmbedding.from_float"
        if not isinstance(embedding, nn.Embedding):
            fail(op, "embedding", "must be an Embedding", type(embedding), TypeError)
        if embedding.max_norm is not None:
            fail(op, "embedding", "must have no max_norm", embedding.max_norm)
        module = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            device="meta",
            dtype=embedding.weight.dtype,
            **settings,
        )
        module.weight = embedding.weight
        module.sparse = embedding.sparse
        module.scale_grad_by_freq = embedding.scale_grad_by_freq
        return module.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        wide = rows.float()
        if self.center == "row":
            centred = wide - rows.mean(-1, keepdim=True, dtype=torch.float64).float()
        else:
            centred = wide - self.weight.detach().mean(dtype=torch.float64).float()
        size = rows.detach().abs().mean(-1, keepdim=True, dtype=torch.float64).float()
        signs = torch.where(centred >= 0, size, -size).to(rows.dtype)
        passed = rows if self.weight_ste == "identity" else centred.clamp(-1, 1).to(rows.dtype)
        # The difference is exactly 0: values are binary, gradients those of what passed.
        return signs.detach() + (passed - passed.detach())

    @torch.no_grad()
    def to_packed(self) -> PackedBinaryEmbedding:
        """The table for inference, with a bit per weight. Its results are the same."""
        packed = PackedBinaryEmbedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device="meta",
            dtype=self.weight.dtype,
        )
        packed.weight_bits, packed.weight_scale = pack_weight(
            self.weight, center=self.center, scale="row"
        )
        packed.weight_shape = shape_tensor(
            self.num_embeddings, self.embedding_dim, self.weight.device
        )
        return packed.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, center={self.center!r}, weight_ste={self.weight_ste!r}"


class PackedBinaryEmbedding(PackedModule):
    """`BinaryEmbedding` for inference: ids `[...]` -> `[..., K]` from a bit per weight.

    Buffers: `weight_bits` uint8 `[V, bytes]`, `weight_scale` float32 `[V]`, `weight_shape`.

    Args: as `BinaryEmbedding`, whose `to_packed` makes one; `dtype` is that of results, which
    `.to(dtype)` changes.
    """

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        padding_idx: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = dim
        self.padding_idx = padding_idx
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self._add_bits(num_embeddings, dim, num_embeddings, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def forward(self, input: Tensor) -> Tensor:
        return binary_embedding(
            input, self.weight_bits, self.weight_scale, k=self.embedding_dim, dtype=self.dtype
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}"
