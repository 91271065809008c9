# SPDX-License-Identifier: Apache-2.0
"""Weights of other libraries to and from fastbb's models.

fastbb's keys are timm's. Every other layout is a list of renaming rules in each direction, plus
the few tensors that change shape. Buffers that are computed from sizes are dropped on loading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb.models.gcvit import GCViT
from fastbb.models.pvt_v2 import PVTv2
from fastbb.models.swin import Swin

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
State = dict[str, Tensor]

_TABLE = "relative_position_bias_table"
_COMPUTED = re.compile(r"(relative_position_index|relative_coords_table|attn_mask)$")


def _shift(pattern: str, by: int) -> Callable[[re.Match[str]], str]:
    """A replacement with the first group, a number, put into `pattern` increased by `by`."""
    return lambda m: pattern.format(int(m[1]) + by, *m.groups()[1:])


def _identity(state: State) -> State:
    return state


@dataclass(frozen=True)
class Layout:
    """How a library names the tensors of one architecture. First matching rule wins."""

    to_native: Rules = ()
    from_native: Rules = ()
    reshape_in: Callable[[State], State] = _identity  # applied to native names, after renaming
    reshape_out: Callable[[State], State] = _identity  # applied to native names, before renaming


# ---- GC ViT: NVlabs ----

_NVLABS_CONV_IN = {
    "conv.0": "conv_dw",
    "conv.2.fc.0": "se.fc1",
    "conv.2.fc.2": "se.fc2",
    "conv.3": "conv_pw",
}
_NVLABS_CONV_OUT = {v: k for k, v in _NVLABS_CONV_IN.items()}
_CONV_IN = r"(conv\.0|conv\.2\.fc\.[02]|conv\.3)\."
_CONV_OUT = r"(conv_dw|se\.fc[12]|conv_pw)\."


def _flatten_squeeze_excite(state: State) -> State:
    return {k: v.flatten(1) if ".se.fc" in k else v for k, v in state.items()}


def _unflatten_squeeze_excite(state: State) -> State:
    return {k: v[:, :, None, None] if ".se.fc" in k else v for k, v in state.items()}


_NVLABS = Layout(
    to_native=(
        (r"^patch_embed\.proj\.", "stem.conv1."),
        (
            rf"^patch_embed\.conv_down\.{_CONV_IN}",
            lambda m: f"stem.down.conv_block.{_NVLABS_CONV_IN[m[1]]}.",
        ),
        (r"^patch_embed\.conv_down\.", "stem.down."),
        (
            rf"^levels\.(\d+)\.downsample\.{_CONV_IN}",
            lambda m: f"stages.{int(m[1]) + 1}.downsample.conv_block.{_NVLABS_CONV_IN[m[2]]}.",
        ),
        (r"^levels\.(\d+)\.downsample\.", _shift("stages.{}.downsample.", 1)),
        (
            rf"^levels\.(\d+)\.q_global_gen\.to_q_global\.(\d+)\.{_CONV_IN}",
            lambda m: (
                f"stages.{m[1]}.global_block.blocks.conv{int(m[2]) + 1}.{_NVLABS_CONV_IN[m[3]]}."
            ),
        ),
        (
            rf"^levels\.(\d+)\.blocks\.(\d+)\.attn\.{_TABLE}",
            rf"stages.\1.blocks.\2.attn.rel_pos.{_TABLE}",
        ),
        (r"^levels\.(\d+)\.blocks\.(\d+)\.gamma([12])$", r"stages.\1.blocks.\2.ls\3.gamma"),
        (r"^levels\.(\d+)\.blocks\.", r"stages.\1.blocks."),
        (r"^norm\.", "stages.3.norm."),
        (r"^head\.", "head.fc."),
    ),
    from_native=(
        (r"^stem\.conv1\.", "patch_embed.proj."),
        (
            rf"^stem\.down\.conv_block\.{_CONV_OUT}",
            lambda m: f"patch_embed.conv_down.{_NVLABS_CONV_OUT[m[1]]}.",
        ),
        (r"^stem\.down\.", "patch_embed.conv_down."),
        (
            rf"^stages\.(\d+)\.downsample\.conv_block\.{_CONV_OUT}",
            lambda m: f"levels.{int(m[1]) - 1}.downsample.{_NVLABS_CONV_OUT[m[2]]}.",
        ),
        (r"^stages\.(\d+)\.downsample\.", _shift("levels.{}.downsample.", -1)),
        (
            rf"^stages\.(\d+)\.global_block\.blocks\.conv(\d+)\.{_CONV_OUT}",
            lambda m: (
                f"levels.{m[1]}.q_global_gen.to_q_global.{int(m[2]) - 1}.{_NVLABS_CONV_OUT[m[3]]}."
            ),
        ),
        (
            rf"^stages\.(\d+)\.blocks\.(\d+)\.attn\.rel_pos\.{_TABLE}",
            rf"levels.\1.blocks.\2.attn.{_TABLE}",
        ),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.ls([12])\.gamma$", r"levels.\1.blocks.\2.gamma\3"),
        (r"^stages\.(\d+)\.blocks\.", r"levels.\1.blocks."),
        (r"^stages\.3\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ),
    reshape_in=_unflatten_squeeze_excite,
    reshape_out=_flatten_squeeze_excite,
)

# ---- Swin: torchvision and Microsoft ----


def _split_qkv_bias(state: State) -> State:
    """Swin v2 in torchvision: one qkv bias whose key part is unused -> q_bias, v_bias."""
    out: State = {}
    for key, value in state.items():
        stem = key.removesuffix("qkv.bias")
        if stem != key and f"{stem}logit_scale" in state:
            out[f"{stem}q_bias"], _, out[f"{stem}v_bias"] = value.chunk(3)
        else:
            out[key] = value
    return out


def _join_qkv_bias(state: State) -> State:
    out: State = {}
    for key, value in state.items():
        if key.endswith("attn.q_bias"):
            v_bias = state[key.removesuffix("q_bias") + "v_bias"]
            joined = torch.cat([value, torch.zeros_like(value), v_bias])
            out[key.removesuffix("q_bias") + "qkv.bias"] = joined
        elif not key.endswith("attn.v_bias"):
            out[key] = value
    return out


_TORCHVISION = Layout(
    to_native=(
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (
            r"^features\.([1357])\.(\d+)\.mlp\.([03])\.",
            lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.mlp.fc{1 if m[3] == '0' else 2}.",
        ),
        (r"^features\.([1357])\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
        (r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2}.downsample."),
        (r"^head\.", "head.fc."),
    ),
    from_native=(
        (r"^patch_embed\.proj\.", "features.0.0."),
        (r"^patch_embed\.norm\.", "features.0.2."),
        (
            r"^layers\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.",
            lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}.mlp.{0 if m[3] == '1' else 3}.",
        ),
        (r"^layers\.(\d)\.blocks\.(\d+)\.", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}."),
        (r"^layers\.(\d)\.downsample\.", lambda m: f"features.{2 * int(m[1])}."),
        (r"^head\.fc\.", "head."),
    ),
    reshape_in=_split_qkv_bias,
    reshape_out=_join_qkv_bias,
)

_MICROSOFT = Layout(
    to_native=(
        (r"^layers\.(\d)\.downsample\.", _shift("layers.{}.downsample.", 1)),
        (r"^head\.", "head.fc."),
    ),
    from_native=(
        (r"^layers\.(\d)\.downsample\.", _shift("layers.{}.downsample.", -1)),
        (r"^head\.fc\.", "head."),
    ),
)

# ---- PVT v2: original ----

_PVT_ORIGINAL = Layout(
    to_native=(
        (r"^patch_embed1\.", "patch_embed."),
        (r"^patch_embed(\d)\.", _shift("stages.{}.downsample.", -1)),
        (
            r"^block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.",
            lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.mlp.dwconv.",
        ),
        (r"^block(\d)\.", _shift("stages.{}.blocks.", -1)),
        (r"^norm(\d)\.", _shift("stages.{}.norm.", -1)),
    ),
    from_native=(
        (r"^patch_embed\.", "patch_embed1."),
        (r"^stages\.(\d)\.downsample\.", _shift("patch_embed{}.", 1)),
        (
            r"^stages\.(\d)\.blocks\.(\d+)\.mlp\.dwconv\.",
            lambda m: f"block{int(m[1]) + 1}.{m[2]}.mlp.dwconv.dwconv.",
        ),
        (r"^stages\.(\d)\.blocks\.", _shift("block{}.", 1)),
        (r"^stages\.(\d)\.norm\.", _shift("norm{}.", 1)),
    ),
)

_LAYOUTS: dict[type[nn.Module], dict[str, Layout]] = {
    GCViT: {"timm": Layout(), "nvlabs": _NVLABS},
    Swin: {"timm": Layout(), "torchvision": _TORCHVISION, "microsoft": _MICROSOFT},
    PVTv2: {"timm": Layout(), "original": _PVT_ORIGINAL},
}
# A key that only this layout has, for source="auto".
_MARKS = {
    "nvlabs": "levels.0.blocks.0.norm1.weight",
    "torchvision": "features.0.0.weight",
    "microsoft": "head.weight",
    "original": "patch_embed1.proj.weight",
}


def load_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, object],
    source: str = "auto",
    *,
    resize_tables: bool = False,
) -> None:
    """Loads weights in another library's layout into a fastbb model, in place.

    Args:
        model: from `create_model`.
        state_dict: name -> tensor, or a checkpoint that holds one under `state_dict_ema`,
            `state_dict` or `model`; prefixes `module.` are stripped.
        source: `"timm"`; GC ViT also `"nvlabs"`, Swin `"torchvision"` or `"microsoft"`, PVT v2
            `"original"`; `"auto"` recognises them by their keys.
        resize_tables: resize relative position bias tables (bicubic) where windows differ.

    Raises: ValueError naming missing, unexpected and wrongly shaped tensors; TypeError for a model
    that is none of fastbb's. The model is then unchanged.
    """
    op = "load_state_dict"
    layouts = _layouts(op, type(model))
    state = _unwrap(op, state_dict)
    if source == "auto":
        source = _recognised(layouts, state)
    state = _to_native(_layout(op, layouts, source, "source"), state)
    own = model.state_dict()
    if resize_tables:
        state = {k: _resized(k, v, own.get(k), model) for k, v in state.items()}
    problems = [f"missing {k}" for k in own if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k} has shape {list(state[k].shape)} instead of {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (" ..." if len(problems) > 8 else "")
        raise ValueError(
            f"{op}: state_dict must fit {type(model).__name__} in the layout {source!r}, "
            f"got {len(problems)} differences: {shown}"
        )
    model.load_state_dict(state, strict=True)


def export_state_dict(model: nn.Module, target: str) -> State:
    """The model's weights under another library's names (see `load_state_dict`), not copied.

    Buffers that the other library computes from sizes are left out: load with `strict=False`.
    """
    layouts = _layouts("export_state_dict", type(model))
    layout = _layout("export_state_dict", layouts, target, "target")
    state = layout.reshape_out(dict(model.state_dict()))
    return {_rename(k, layout.from_native): v for k, v in state.items()}


def in_timm_layout(kind: type[nn.Module], state_dict: Mapping[str, object]) -> State:
    """Weights of a fastbb backbone class, in any supported layout, under timm's names."""
    layouts = _layouts("in_timm_layout", kind)
    state = _unwrap("in_timm_layout", state_dict)
    return _to_native(layouts[_recognised(layouts, state)], state)


def _layouts(op: str, kind: type[nn.Module]) -> dict[str, Layout]:
    for known, layouts in _LAYOUTS.items():
        if issubclass(kind, known):
            return layouts
    raise TypeError(f"{op}: model must be a fastbb backbone, got {kind.__qualname__}")


def _recognised(layouts: dict[str, Layout], state: State) -> str:
    return next((name for name in layouts if _MARKS.get(name) in state), "timm")


def _to_native(layout: Layout, state: State) -> State:
    kept = {k: v for k, v in state.items() if not _COMPUTED.search(k)}
    return layout.reshape_in({_rename(k, layout.to_native): v for k, v in kept.items()})


def _layout(op: str, layouts: dict[str, Layout], name: str, argument: str) -> Layout:
    if name not in layouts:
        raise ValueError(f"{op}: {argument} must be one of {sorted(layouts)}, got {name!r}")
    return layouts[name]


def _unwrap(op: str, checkpoint: Mapping[str, object]) -> State:
    """The tensors of a checkpoint; the averaged ones where a trainer saved both."""
    for key in ("state_dict_ema", "state_dict", "model"):
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping):
            checkpoint = inner
            break
    state: State = {}
    for key, value in checkpoint.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{op}: state_dict must map names to tensors, got {key}: {type(value).__name__}"
            )
        state[key.removeprefix("module.")] = value
    return state


def _rename(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key


def _resized(key: str, table: Tensor, own: Tensor | None, model: nn.Module) -> Tensor:
    """A bias table `[rows, h]` of another window, interpolated to the rows of this model's."""
    if own is None or not key.endswith(_TABLE) or table.shape == own.shape:
        return table
    side = round(table.shape[0] ** 0.5)
    if side * side != table.shape[0] or table.shape[1] != own.shape[1]:
        return table
    attn = model.get_submodule(key.removesuffix("." + _TABLE).removesuffix(".rel_pos"))
    wh, ww = attn.window_size  # type: ignore[misc]
    grid = table.float().T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, (2 * wh - 1, 2 * ww - 1), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T.to(table.dtype).contiguous()
