# SPDX-License-Identifier: Apache-2.0
"""BERT encoders with binary weights and activations: BiT (Liu et al., NeurIPS 2022), BiPFT (Xing et
al., AAAI 2024), BiBERT (Qin et al., ICLR 2022). State dict keys are Hugging Face's `BertModel`'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbb.models._registry import register
from fastbb.nn.binary_bert import BinaryBertLayer, BinaryBertPooler
from fastbb.nn.binary_pack import BinaryEmbedding
from fastbb.nn.binary_presets import Preset, preset_of
from fastbb.nn.layers import init_weights


class BinaryBertOutput(NamedTuple):
    """What `BinaryBert` returns."""

    last_hidden_state: Tensor
    """`[B, N, C]`"""
    pooler_output: Tensor | None
    """`[B, C]`; None of a model without pooler"""
    logits: Tensor | None
    """`[B, num_classes]`; None of a model without classifier"""
    hidden_states: tuple[Tensor, ...] | None
    """Embeddings and the result of each layer, `[B, N, C]`, when asked for"""


class _Embeddings(nn.Module):
    """Binary word embeddings, position and token type embeddings in full precision, LayerNorm."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        max_positions: int,
        token_types: int,
        pad_token: int,
        rules: Preset,
        dropout: float,
        eps: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.word_embeddings: nn.Module = BinaryEmbedding(
            vocab_size, dim, pad_token, **rules.embedding, **factory
        )
        self.position_embeddings = nn.Embedding(max_positions, dim, **factory)
        self.token_type_embeddings = nn.Embedding(token_types, dim, **factory)
        self.LayerNorm = nn.LayerNorm(dim, eps=eps, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, types: Tensor | None, positions: Tensor | None) -> Tensor:
        x = self.word_embeddings(ids)
        kinds = self.token_type_embeddings.weight
        x = x + (kinds[0] if types is None else self.token_type_embeddings(types))
        if positions is None:
            x = x + self.position_embeddings.weight[: ids.shape[1]]
        else:
            x = x + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class _Encoder(nn.Module):
    def __init__(self, layers: list[BinaryBertLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class BinaryBert(nn.Module):
    """Token ids `[B, N]` -> `BinaryBertOutput`.

    Args:
        vocab_size, dim, depth, heads, intermediate, max_positions, token_types: sizes.
        pad_token: whose word embedding is not trained.
        preset: `"bipft"`, `"bit"`, `"bibert"`, or a `fastbb.nn.Preset`.
        estimator_rank: of the attention's estimators; None: the preset's.
        hidden_dropout, attention_dropout: rates in training.
        eps: of the layer norms.
        pooler: whether there is one; the classifier needs it.
        num_classes: width of a full-precision classifier on the pooler's result; 0: none.

    A new model's learned scales are 1 until `fastbb.nn.calibrate` sets them from data.
    `fastbb.pack_` makes the form for inference.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        intermediate: int = 3072,
        max_positions: int = 512,
        token_types: int = 2,
        pad_token: int = 0,
        preset: str | Preset = "bipft",
        estimator_rank: int | None = None,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        eps: float = 1e-12,
        pooler: bool = True,
        num_classes: int = 0,
        **factory: Any,
    ) -> None:
        super().__init__()
        rules = preset_of("BinaryBert", preset)
        if num_classes > 0 and not pooler:
            raise ValueError("BinaryBert: pooler must be True with a classifier, got False")
        self.num_features = dim
        self.max_positions = max_positions
        self.embeddings = _Embeddings(
            vocab_size,
            dim,
            max_positions,
            token_types,
            pad_token,
            rules,
            hidden_dropout,
            eps,
            **factory,
        )
        self.encoder = _Encoder(
            [
                BinaryBertLayer(
                    dim,
                    heads,
                    intermediate,
                    preset=rules,
                    estimator_rank=estimator_rank,
                    hidden_dropout=hidden_dropout,
                    attention_dropout=attention_dropout,
                    eps=eps,
                    **factory,
                )
                for _ in range(depth)
            ]
        )
        self.pooler = BinaryBertPooler(dim, preset=rules, eps=eps, **factory) if pooler else None
        self.classifier: nn.Module | None = None
        if num_classes > 0:
            self.dropout = nn.Dropout(hidden_dropout)
            self.classifier = nn.Linear(dim, num_classes, **factory)
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx].detach())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> BinaryBertOutput:
        """All `[B, N]`; attention_mask is 0 or False where a token is padding."""
        if input_ids.dim() != 2 or input_ids.shape[1] > self.max_positions:
            raise ValueError(
                f"BinaryBert: input_ids must be [B, N] with N at most {self.max_positions}, "
                f"got {list(input_ids.shape)}"
            )
        mask = None
        if attention_mask is not None:
            lowest = torch.finfo(torch.float32).min
            mask = torch.zeros(attention_mask.shape, device=input_ids.device)
            mask = mask.masked_fill(attention_mask == 0, lowest)
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        states = [x]
        for layer in self.encoder.layer:
            x = layer(x, mask)
            states.append(x)
        pooled = None if self.pooler is None else self.pooler(x)
        logits = None
        if self.classifier is not None:
            logits = self.classifier(self.dropout(pooled))
        return BinaryBertOutput(x, pooled, logits, tuple(states) if output_hidden_states else None)


_MINILM: dict[str, Any] = {"dim": 384, "depth": 6, "heads": 12, "intermediate": 1536}

VARIANTS: dict[str, dict[str, Any]] = {
    f"{preset}_{size}": {"preset": preset, **settings}
    for preset in ("bipft", "bit", "bibert")
    for size, settings in {"base": {}, "minilm_l6": _MINILM}.items()
}

register(BinaryBert, VARIANTS, text=True)
