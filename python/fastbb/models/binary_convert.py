# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of BiPFT, BiT and BiBERT into binary BERT models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

_PREFIXES = ("bert.", "roberta.", "electra.")
_RENAMED = (
    (re.compile(r"\.input_clip_val$"), ".alpha"),
    (re.compile(r"\.move\.bias$"), ".shift"),
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)
# Stored by these trainers, and without effect on results: computed tables, bounds that binary
# quantizers do not read, shifts whose sum is overwritten (BiT), unused gates and scales (BiBERT).
_DEAD = re.compile(
    r"(\.position_ids|\.token_type_ids|\.weight_clip_val|\.act_clip_val|\.embed_clip_val"
    r"|\.self\.move_[qkv]\.bias|output\.gate|dense\.scale|(query|key|value)\.scale)$"
)
_CLIP = re.compile(r"^(.*\.self)\.clip_(query|key|value|attn)$")
_CLIPS = ("query", "key", "value", "attn")


class LoadReport(NamedTuple):
    """What `load_bipft_state_dict` did with each key."""

    loaded: list[str]
    """Keys of the model that got values"""
    missing: list[str]
    """Keys of the model that got none"""
    unexpected: list[str]
    """Keys of the checkpoint, renamed, that the model has no place for"""
    ignored: list[str]
    """Keys of the checkpoint that have no effect on results"""


def load_bipft_state_dict(
    model: nn.Module, state_dict: Mapping[str, object], *, strict: bool = True
) -> LoadReport:
    """Loads a checkpoint under the names of BiPFT's, BiT's or BiBERT's code, in place.

    `*.input_clip_val` become `*.alpha`, `*.move.bias` become `*.shift`, the four `clip_query`,
    `clip_key`, `clip_value`, `clip_attn` of an attention become its `alphas`; estimators `q_p`,
    `k_p`, `q_m`, `k_m`, `v_p` have the same names.

    Args:
        model: `BinaryBert` of the checkpoint's preset and size, or a Hugging Face model after
            `fastbb.binarize_`. A prefix such as `bert.` may be on either side.
        state_dict: name -> tensor, or a checkpoint that holds one under `state_dict` or `model`;
            prefixes `module.` are stripped.
        strict: raise when a key is missing or unexpected, e.g. the heads of pre-training
            (`cls.*`). Otherwise they are reported alone; sizes must fit in either case.

    Raises: ValueError naming missing, unexpected and wrongly shaped tensors. The model is then
    unchanged.
    """
    op = "load_bipft_state_dict"
    given = _unwrap(op, state_dict)
    own = model.state_dict()
    places = {_bare(key): key for key in own}
    found, ignored = _renamed(given)
    if not any(key.endswith(".alphas") for key in places):
        ignored += [key for key in found if key.endswith(".self.alphas")]
        found = {key: value for key, value in found.items() if not key.endswith(".self.alphas")}
    fits = {places[_bare(key)]: v for key, v in found.items() if _bare(key) in places}
    report = LoadReport(
        loaded=list(fits),
        missing=[key for key in own if key not in fits and not _DEAD.search(f".{key}")],
        unexpected=[key for key in found if _bare(key) not in places],
        ignored=ignored,
    )
    problems = [
        f"{key} has shape {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in fits.items()
        if value.shape != own[key].shape
    ]
    if strict:
        problems += [f"missing {key}" for key in report.missing]
        problems += [f"unexpected {key}" for key in report.unexpected]
    if problems:
        shown = "; ".join(problems[:8]) + (" ..." if len(problems) > 8 else "")
        raise ValueError(
            f"{op}: state_dict must fit {type(model).__name__}, "
            f"got {len(problems)} differences: {shown}"
        )
    model.load_state_dict(fits, strict=False)
    return report


def _bare(key: str) -> str:
    """A key without the prefix of the encoder inside a model with heads."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _renamed(given: State) -> tuple[State, list[str]]:
    """Tensors under our names, and keys that have no effect."""
    found: State = {}
    clips: dict[str, State] = {}
    ignored = []
    for key, value in given.items():
        clip = _CLIP.match(key)
        if clip is not None:
            clips.setdefault(clip[1], {})[clip[2]] = value
        elif _DEAD.search(f".{key}"):
            ignored.append(key)
        else:
            for pattern, name in _RENAMED:
                key = pattern.sub(name, key)
            found[key] = value.reshape(1) if key.endswith(".alpha") else value
    for path, values in clips.items():
        if all(name in values and values[name].numel() == 1 for name in _CLIPS):
            found[f"{path}.alphas"] = torch.cat([values[name].reshape(1) for name in _CLIPS])
        else:
            # BiBERT stores bounds [low, high] here, which signs do not depend on.
            ignored += [f"{path}.clip_{name}" for name in values]
    return found, ignored


def _unwrap(op: str, checkpoint: Mapping[str, object]) -> State:
    for name in ("state_dict", "model"):
        inner = checkpoint.get(name)
        if isinstance(inner, Mapping):
            checkpoint = inner
            break
    state = {}
    for key, value in checkpoint.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{op}: state_dict must hold tensors, got {type(value).__name__} under {key!r}"
            )
        state[str(key).removeprefix("module.")] = value.detach()
    return state
