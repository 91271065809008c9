# SPDX-License-Identifier: Apache-2.0
"""Faster attention inside models of timm and torchvision, in place and with the same outputs.

A module is accelerated by giving it a subclass of its class, whose forward runs
`fastbb.ops.window_attention` on the feature map instead of building windows, masks and bias
matrices. Parameters, buffers, hooks, `state_dict` keys and `isinstance` stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from fastbb.accelerate._changes import commit, to_dtype, to_original_dtypes
from fastbb.accelerate._plan import plan_restore, plan_swaps
from fastbb.accelerate._report import Report

__all__ = ["SUPPORTED", "Report", "accelerate_", "restore_"]

SUPPORTED = (
    "timm.models.gcvit.GlobalContextVitBlock",
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
    "timm.models.pvt_v2.Attention",
    "timm.models.pvt_v2.MlpWithDepthwiseConv",
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
)
"""Names of the classes that `accelerate_` swaps."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accelerate_(
    model: nn.Module, dtype: torch.dtype | None = None, *, strict: bool = False
) -> Report:
    """Swaps the attention of supported classes inside `model` for fused versions, in place.

    Works on whole models, feature extractors and single blocks, in training and evaluation;
    before or after `torch.compile`. Calling it again changes nothing more. `restore_` undoes it.

    Only modules whose class is exactly one of `SUPPORTED` are swapped. Subclasses, attention
    dropout above 0, and devices, dtypes or head dims without a kernel are skipped; the report
    gives the reason.

    What changes besides speed: `torch.jit.script` cannot compile the model (`torch.compile`,
    `torch.export`, `torch.jit.trace` and `torch.fx` feature extractors can); forward hooks on
    the attention of timm's GC ViT and Swin blocks see the map `[B, H, W, C]` instead of its
    windows `[B*nW, N, C]`; and where dropout follows the projection, its random pattern falls
    on other tokens.

    Args:
        model: any module.
        dtype: also converts all floating parameters and buffers, exactly as `model.to(dtype)`
            does: feed inputs of this dtype afterwards. float32, bfloat16 or float16.
        strict: raises, before anything is changed, when some candidate is skipped or when there
            is none.

    Raises:
        TypeError: `model` is not a module, or `dtype` not a dtype.
        ValueError: another dtype; or `strict` and the report would not be complete.
        Whatever is raised, the model is as it was before the call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate_: model must be a torch.nn.Module, got {type(model).__qualname__}"
        )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"accelerate_: dtype must be a torch.dtype or None, got {type(dtype).__qualname__}"
        )
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"accelerate_: dtype must be one of {_DTYPES}, got {dtype}")
    changes, report = plan_swaps(model, dtype)
    if strict and not report.complete:
        raise ValueError(
            f"accelerate_: model must have attention of supported classes, all of it free of "
            f"reasons to skip it, when strict=True, got\n{report}"
        )
    if dtype is not None:
        casts, report.converted = to_dtype(model, dtype)
        report.dtype = str(dtype)
        changes += casts
    commit(changes)
    return report


def restore_(model: nn.Module) -> None:
    """Undoes every `accelerate_` inside `model`, in place.

    Classes become the original ones, so that outputs are bit-identical to those before
    acceleration. Parameters and buffers that `accelerate_` converted get their former dtype
    back; the rounding of their values stays. A model without accelerated modules is left alone.

    Raises:
        TypeError: `model` is not a module.
        ValueError: some module was given a subclass of its accelerated class in between (e.g.
            by `torch.nn.utils.parametrize`). The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"restore_: model must be a torch.nn.Module, got {type(model).__qualname__}"
        )
    commit(plan_restore(model) + to_original_dtypes(model))
