# SPDX-License-Identifier: Apache-2.0
"""A text classifier on an encoder of Hugging Face's BERT family, and its evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbb.examples.texts import Documents, batches_by_length


class TextClassifier(nn.Module):
    """Linear layer on the mean of the encoder's last hidden states over the tokens.

    The mean, because the encoder was pre-trained with it as its sentence embedding.
    """

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask `[B, N]` -> logits `[B, classes]`."""
        return self._head(self.encoder(input_ids=ids, attention_mask=mask)[0], mask)

    def with_states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits, and the embeddings and every layer's result, `[B, N, C]`."""
        result = self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return self._head(result.last_hidden_state, mask), result.hidden_states

    def _head(self, states: Tensor, mask: Tensor) -> Tensor:
        weights = mask / mask.sum(1, keepdim=True)
        return self.head((states * weights.unsqueeze(-1)).sum(1))


def without_dropout_(model: nn.Module) -> nn.Module:
    """Sets every dropout rate to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@torch.inference_mode()
def predict(
    model: nn.Module,
    documents: Documents,
    size: int = 64,
    progress: Callable[[str], None] | None = None,
) -> Tensor:
    """Logits `[documents, classes]`, in evaluation mode."""
    trained = model.training
    model.eval()
    found: dict[int, Tensor] = {}
    for chosen, batch in batches_by_length(documents, size):
        logits = model(batch.ids, batch.mask).float()
        found.update(zip(chosen, logits, strict=True))
        if progress is not None:
            progress(f"{len(found)} of {len(documents)} documents")
    model.train(trained)
    return torch.stack([found[i] for i in range(len(documents))])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).float().mean().item()
