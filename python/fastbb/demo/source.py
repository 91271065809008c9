# SPDX-License-Identifier: Apache-2.0
"""The model to accelerate: from timm or torchvision, with a checkpoint or random weights."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbb._console import UsageError, require
from fastbb.models import GCViT
from fastbb.models.convert import in_timm_layout

TORCHVISION_PREFIX = "torchvision/"


@dataclass(frozen=True)
class SourceModel:
    """An untouched library model in evaluation mode, and how it wants its images."""

    name: str
    library: str
    """`timm` or `torchvision`."""
    module: nn.Module
    transform: Callable[[Any], Tensor]
    """Pillow image -> `[3, H, W]`: the library's own resize, crop and normalisation."""
    weights: str
    """A sentence about where the weights come from."""
    trained: bool


def load_source(name: str, checkpoint: Path | None = None, seed: int = 0) -> SourceModel:
    """Builds `name`: a timm model, `torchvision/<model>`, or a torchvision model unknown to timm.

    Weights come from the `checkpoint` file (torch or safetensors), whose keys must be exactly the
    model's, or those of a release that timm or fastbb knows how to convert. Without one they are
    random, see `scale_up_random_weights_`.

    Raises: UsageError for an unknown model, an unreadable checkpoint or one with other keys.
    """
    torch.manual_seed(seed)
    library, build = _find(name)
    module, transform = build()
    module.eval()
    if checkpoint is None:
        scale_up_random_weights_(module, seed)
        weights = (
            f"random (seed {seed}), scaled up from the usual initialisation so that attention "
            "is far from uniform and logits differ between photographs: predictions mean nothing"
        )
    else:
        _load_exactly(module, read_checkpoint(checkpoint), checkpoint)
        weights = f"from {checkpoint}"
    return SourceModel(name, library, module, transform, weights, trained=checkpoint is not None)


def _find(name: str) -> tuple[str, Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]]:
    """(library, function that builds model and transform)."""
    plain = name.removeprefix(TORCHVISION_PREFIX)
    timm = require("timm", "building the model")
    if plain == name and timm.is_model(name):
        return "timm", lambda: _build_timm(name)
    models = require("torchvision.models", "building the model")
    if plain in models.list_models(module=models):
        return "torchvision", lambda: _build_torchvision(plain)
    known = timm.list_models() + [TORCHVISION_PREFIX + n for n in models.list_models(module=models)]
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"; close names: {', '.join(close)}" if close else ""
    raise UsageError(f"--model must be a model of timm or torchvision, got {name!r}{hint}")


def _build_timm(name: str) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    timm = require("timm", "building the model")
    data = require("timm.data", "preparing the photographs")
    model = timm.create_model(name, pretrained=False)
    config = data.resolve_data_config({}, model=model)
    return model, data.create_transform(**config, is_training=False)


def _build_torchvision(name: str) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    models = require("torchvision.models", "building the model")
    # The preset of the default weights is plain data; the weights themselves are not fetched.
    transform = models.get_model_weights(name).DEFAULT.transforms()
    return models.get_model(name, weights=None), transform


@torch.no_grad()
def scale_up_random_weights_(module: nn.Module, seed: int = 0) -> None:
    """Replaces all parameters by larger random ones, so that no part of the model is idle.

    With the libraries' initialisation (std 0.02, layer scales of 1e-5, Swin v2's norms of 0)
    attention is almost uniform and blocks add almost nothing: even a wrong kernel would give
    nearly the right logits. Here matrices and convolutions keep the variance of their input,
    relative position biases have std 0.5, norms scale by about 1, other vectors have std 0.1.
    Swin v2's `logit_scale` stays as the library sets it.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in module.named_parameters():
        leaf = path.rpartition(".")[2]
        if leaf == "logit_scale":
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if leaf == "relative_position_bias_table":
            values = 0.5 * noise
        elif parameter.dim() >= 2:
            values = noise * parameter[0].numel() ** -0.5
        elif leaf in ("weight", "gamma"):
            values = 1.0 + 0.1 * noise
        else:
            values = 0.1 * noise
        parameter.copy_(values)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a `.safetensors` file or a torch file (loaded with weights_only).

    Training checkpoints are unwrapped (`state_dict_ema`, `state_dict`, `model_ema`, `model`), and a
    common `module.` prefix is dropped.

    Raises: UsageError when the file is missing, unreadable or holds no tensors by name.
    """
    if not path.is_file():
        raise UsageError(f"--checkpoint must be a file, got {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            content: Any = require("safetensors.torch", "reading the checkpoint").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:
        # Unpicklers raise almost anything on a file that is not theirs.
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            "--checkpoint must be a torch or safetensors file that needs no code to load, got "
            f"{str(path)!r} ({type(error).__name__}: {reason})"
        ) from error
    for key in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise UsageError(f"--checkpoint must hold tensors by name, got {str(path)!r} without any")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): v for name, v in tensors.items()}
    return tensors


def _in_todays_layout(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of original releases and older timm versions renamed by timm's own converter, if any.

    timm has none for GC ViT; fastbb knows the names of the original release.
    """
    if type(module).__name__ == "GlobalContextVit":
        return in_timm_layout(GCViT, tensors)
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    return tensors if convert is None else convert(tensors, module)


def _load_exactly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Loads all tensors, or explains which keys or shapes do not fit and changes nothing."""
    own = module.state_dict()
    if set(tensors) != set(own):
        tensors = _in_todays_layout(module, tensors)
    problems = {
        "missing": [k for k in own if k not in tensors],
        "unexpected": [k for k in tensors if k not in own],
        "of another shape": [
            f"{k} {list(tensors[k].shape)} for {list(own[k].shape)}"
            for k in own
            if k in tensors and tensors[k].shape != own[k].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            for what, keys in problems.items()
            if keys
        )
        raise UsageError(f"--checkpoint must have the model's keys, got {str(path)!r} with {text}")
    module.load_state_dict(tensors)
