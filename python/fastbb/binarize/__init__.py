# SPDX-License-Identifier: Apache-2.0
"""Binary weights and activations inside models of Hugging Face and timm, in place.

`binarize_` makes the linear layers, attention and word embeddings of a float model binary, for
training; `pack_` then makes the form for inference, with a bit per weight. Classes of the model's
own modules become subclasses of themselves, so that it is called as before.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastbb.accelerate._changes import commit
from fastbb.binarize._pack import PackReport, plan_pack
from fastbb.binarize._plan import SUPPORTED, plan_binarize
from fastbb.binarize._report import BinarizeReport
from fastbb.binarize._sizes import Sizes, model_sizes
from fastbb.nn.binary_presets import Preset, preset_of

__all__ = [
    "SUPPORTED",
    "BinarizeReport",
    "PackReport",
    "Sizes",
    "binarize_",
    "model_sizes",
    "pack_",
]


def binarize_(
    model: nn.Module,
    preset: str | Preset = "bipft",
    *,
    skip: Sequence[str] = (),
    estimator_rank: int | None = None,
) -> BinarizeReport:
    """Makes the supported parts of `model` binary as a paper does, in place, for training.

    Of Hugging Face's BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ERNIE and Data2VecText
    encoders, alone or below any head: word embeddings, the projections and products of
    self-attention, the feed-forward network and the pooler. Of timm's `VisionTransformer` (DeiT
    too): the projections and products of attention and the MLP of every `Block`. Position
    embeddings, layer norms, patch embeddings and heads keep full precision.

    The model is called as before; attention probabilities are never stored, so that
    `output_attentions` gives None. Parameters stay the same tensors under the same `state_dict`
    keys; `alpha`, `shift`, `alphas` and the estimators are new ones: make the optimizer afterwards.
    The activation of the feed-forward network becomes the preset's, which the report tells.

    A binarized model has to be trained, best distilled from the original. First set its learned
    scales from a batch of data: `with fastbb.nn.calibrate(model): model(**batch)`.

    Args:
        model: any module that contains supported ones.
        preset: `"bit"`, `"bipft"`, `"bibert"`, or a `fastbb.nn.Preset`.
        skip: shell-style patterns of module paths that are left alone, with all below them, e.g.
            `"encoder.layer.0"`, `"*.pooler"`, `"*.query"`.
        estimator_rank: rank of the attention's estimators (Xing et al. 2024); 0: none; None: the
            preset's.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown preset, a pattern that matches nothing, or nothing to binarize; the
            message has the reasons.
        Whatever is raised, the model is as it was before the call.
    """
    op = "binarize_"
    _check_module(op, model)
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    changes, report = plan_binarize(model, preset_of(op, preset), patterns, estimator_rank)
    if not report.converted:
        raise ValueError(
            f"{op}: model must contain modules that can be made binary "
            f"({', '.join(SUPPORTED)}), got\n{report}"
        )
    commit(changes)
    return report


def pack_(model: nn.Module) -> PackReport:
    """Gives every binary module inside `model` its form for inference, in place.

    `BinaryLinear` and `BinaryEmbedding` lose their latent weights and keep a bit for each;
    feed-forward networks go from bits to bits. Results are those of the model before, but for
    rounding of what is binarized: of probabilities, and of GELU where it is 0 in float32 (below
    -5.5), if no shift is added to it. Save the `state_dict` with safetensors or `torch.save`, and
    load it into a model that was built, binarized and packed in the same way.

    All parameters that are left stop requiring gradients, since packed modules have no backward.
    A weight that another module shares (an output layer tied to the word embeddings) would have
    to be kept anyway: its module is skipped.

    Raises:
        TypeError: `model` is not a module, or itself a single binary one (use `to_packed()`).
        ValueError: there is no binary module in it.
        Whatever is raised, the model is as it was before the call.
    """
    _check_module("pack_", model)
    changes, report = plan_pack(model)
    commit(changes)
    return report


def _check_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__qualname__}")
