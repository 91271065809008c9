# SPDX-License-Identifier: Apache-2.0
"""Training in minutes: an encoder is fine-tuned in float, then a binary copy learns from it.

The loss of distillation is BiT's and BiPFT's (Liu et al. 2022, Xing et al. 2024): hidden states of
every layer by mean squared error, logits by cross entropy with the teacher's probabilities. Each
layer's error is divided by the mean square of the teacher's states, so that layers count alike
whatever their size.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb._console import Progress
from fastbb.examples.classifier import TextClassifier, accuracy, predict
from fastbb.examples.texts import Batch, Documents, training_batches

SCALES = ("alpha", "alphas")
"""Last parts of the names of learned scales."""


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a linear decay to 0."""

    steps: int
    batch: int
    rate: float
    warmup: float = 0.05
    """Share of the steps."""

    def factor(self, step: int) -> float:
        """What the rate is multiplied with in a step, counted from 0."""
        rising = (step + 1) / max(1.0, self.warmup * self.steps)
        return min(1.0, rising) * (1 - step / self.steps)


@dataclass(frozen=True)
class Held:
    """Documents that the curves are measured on, and how often."""

    documents: Documents
    times: int = 10


Losses = dict[str, Tensor]
"""The summands of a loss, by name."""


def fine_tune(
    model: TextClassifier,
    documents: Documents,
    schedule: Schedule,
    held: Held,
    seed: int,
    half: bool,
    progress: Progress,
) -> list[dict[str, float]]:
    """Trains a float classifier in place; returns its curve (see `_train`).

    `half`: matrix products in bfloat16, by autocast.
    """

    def loss(batch: Batch) -> Losses:
        with autocast(half):
            logits = model(batch.ids, batch.mask)
        return {"cross entropy": F.cross_entropy(logits.float(), batch.labels)}

    # The head starts from nothing, the encoder from what it has learned.
    groups: list[dict[str, Any]] = [
        {"params": list(model.encoder.parameters())},
        {"params": list(model.head.parameters()), "lr": 10 * schedule.rate},
    ]
    return _train(model, loss, groups, documents, schedule, held, seed, progress)


def distil(
    student: TextClassifier,
    teacher: TextClassifier,
    documents: Documents,
    schedule: Schedule,
    held: Held,
    seed: int,
    half: bool,
    progress: Progress,
) -> list[dict[str, float]]:
    """Trains a binary classifier in place after its float teacher; returns its curve."""

    def loss(batch: Batch) -> Losses:
        with torch.no_grad(), autocast(half):
            target, target_states = teacher.with_states(batch.ids, batch.mask)
        with autocast(half):
            logits, states = student.with_states(batch.ids, batch.mask)
        return {
            "hidden states": state_error(states, target_states, batch.mask),
            "logits": F.kl_div(
                logits.float().log_softmax(-1), target.float().softmax(-1), reduction="batchmean"
            ),
        }

    teacher.eval()
    parameters = [p for p in student.parameters() if p.requires_grad]
    return _train(
        student, loss, [{"params": parameters}], documents, schedule, held, seed, progress
    )


def state_error(states: Iterable[Tensor], targets: Iterable[Tensor], mask: Tensor) -> Tensor:
    """Sum over layers of |states - targets|^2 / |targets|^2 at tokens; states are `[B, N, C]`."""
    tokens = mask.unsqueeze(-1)
    return sum(
        (((x.float() - y.float()) * tokens) ** 2).sum() / ((y.float() * tokens) ** 2).sum()
        for x, y in zip(states, targets, strict=True)
    )  # type: ignore[return-value]


@contextlib.contextmanager
def autocast(half: bool) -> Iterator[None]:
    """Matrix products in bfloat16, or nothing."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        yield


def _train(
    model: TextClassifier,
    loss: Callable[[Batch], Losses],
    groups: list[dict[str, Any]],
    documents: Documents,
    schedule: Schedule,
    held: Held,
    seed: int,
    progress: Progress,
) -> list[dict[str, float]]:
    """Minimises a loss. Returns points of the curve, about `held.times`: `step`, `seconds`, the
    mean of every summand since the last point, and the `accuracy` on the held documents.
    """
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, weight_decay=0.0, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    batches = training_batches(documents, schedule.batch, seed)
    points = {round(schedule.steps * (i + 1) / held.times) for i in range(held.times)}
    curve: list[dict[str, float]] = []
    sums: dict[str, float] = {}
    since = 0
    model.train()
    start = time.perf_counter()
    for step in range(1, schedule.steps + 1):
        parts = loss(next(batches))
        total = torch.stack([*parts.values()]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rates.step()
        since += 1
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.item()
        shown = ", ".join(f"{name} {value / since:.3f}" for name, value in sums.items())
        progress.update(f"step {step} of {schedule.steps}: {shown}")
        if step in points:
            found = accuracy(predict(model, held.documents), held.documents.labels)
            seconds = time.perf_counter() - start
            means = {name: value / since for name, value in sums.items()}
            curve.append({"step": step, "seconds": seconds, **means, "accuracy": found})
            sums, since = {}, 0
    model.eval()
    return curve


def freeze_(model: nn.Module) -> nn.Module:
    """In evaluation mode and without gradients."""
    return model.requires_grad_(False).eval()
