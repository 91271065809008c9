# SPDX-License-Identifier: Apache-2.0
"""Fast backbones: hand-written kernels behind drop-in PyTorch modules.

`accelerate_(model)` makes a timm or torchvision backbone faster with the same outputs,
`binarize_(model)` makes a Hugging Face BERT or timm ViT binary, `pack_(model)` 1-bit,
`models.create_model(name)` builds one from fastbb's own modules, `ops` has the operators.
"""

from __future__ import annotations

import importlib.util

import torch

from fastbb import _C

_ops = importlib.util.find_spec("fastbb._ops")
if _ops is None or _ops.origin is None:
    raise ImportError("fastbb: the operator library fastbb._ops was not built; reinstall fastbb")
torch.ops.load_library(_ops.origin)

from fastbb import models, nn, ops, reference  # noqa: E402
from fastbb.accelerate import accelerate_, restore_  # noqa: E402
from fastbb.binarize import binarize_, pack_  # noqa: E402
from fastbb.config import cap_isa, fused_enabled, isa, isa_levels, use_fused  # noqa: E402

__version__ = str(_C.build_info()["version"])


def build_info() -> dict[str, object]:
    """Version, torch and compiler of the build, instruction-set levels, and under `"cuda"` the
    toolkit and architectures of the CUDA kernels, or False.
    """
    return dict(_C.build_info())


__all__ = [
    "accelerate_",
    "binarize_",
    "build_info",
    "cap_isa",
    "fused_enabled",
    "isa",
    "isa_levels",
    "models",
    "nn",
    "ops",
    "pack_",
    "reference",
    "restore_",
    "use_fused",
]
