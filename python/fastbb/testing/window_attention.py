# SPDX-License-Identifier: Apache-2.0
"""Samples and tolerances of `fastbb::window_attention` and its backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbb.testing.compare import Bounds, Tolerance
from fastbb.testing.sample import Sample, random_like

# float32: a few roundings of unit-size sums. float16, bfloat16: one rounding of the result (2**-12,
# 2**-9 of its size) and, for bfloat16 results, one of the softmax weights.
_FLOAT32 = (Bounds(1e-5, 2e-6, 2e-6), Bounds(3e-5, 2e-6, 4e-6))
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(*_FLOAT32, *_FLOAT32),
    torch.float16: Tolerance(Bounds(1e-3, 1e-4, 5e-4), Bounds(1e-3, 3e-4, 5e-4), *_FLOAT32),
    torch.bfloat16: Tolerance(Bounds(8e-3, 4e-3, 4e-3), Bounds(6e-3, 2e-3, 3e-3), *_FLOAT32),
}


@dataclass(frozen=True)
class Case:
    """What `build` turns into tensors. Window domain unless `nk` is given.

    Attributes:
        shared_q: one set of queries per image.
        nq, nk: tokens of the full domain.
        layout: how q, k, v lie in memory, a key of `_LAYOUTS`.
        bias: "table", "dense" or None.
        mask: "swin", the number nM of explicit masks, or None. Explicit masks have -inf entries.
        scale: a float, "per_head" (Swin v2, up to 100) or None.
        zero_rows: some rows of q and k are zero, as padded tokens of Swin v2 have.
        side_dtype: of bias, mask, scale and pads; "same" is q's.
    """

    batch: int = 2
    heads: int = 2
    dim: int = 32
    size: tuple[int, int] = (8, 12)
    window: tuple[int, int] = (4, 4)
    shift: tuple[int, int] = (0, 0)
    pad_mode: str = "none"
    shared_q: bool = False
    nq: int = 0
    nk: int = 0
    layout: str = "separate"
    bias: str | None = None
    mask: str | int | None = None
    mask_value: float = -100.0
    scale: float | str | None = None
    l2norm: bool = False
    pads: bool = False
    zero_rows: bool = False
    side_dtype: torch.dtype | str = torch.float32
    difficulty: float = 1.0

    @property
    def full(self) -> bool:
        return self.nk > 0


_SHIFTED: dict[str, Any] = {"shift": (3, 3), "mask": "swin", "bias": "table", "window": (7, 7)}
_V2: dict[str, Any] = {"l2norm": True, "scale": "per_head", "bias": "table", "difficulty": 30.0}

CASES: dict[str, Case] = {
    # Backbones at their own windows: 7 (Swin, GC ViT), 8 (Swin v2), 14 (GC ViT stage 3).
    "swin": Case(size=(14, 21), layout="qkv", **_SHIFTED),
    "swin_unshifted": Case(size=(14, 7), window=(7, 7), layout="qkv", bias="table"),
    "swin_v2": Case(
        size=(16, 8), window=(8, 8), shift=(4, 4), mask="swin", layout="qkv", batch=1, **_V2
    ),
    "gcvit_local": Case(
        size=(14, 14), window=(14, 14), layout="qkv", bias="table", batch=1, heads=3
    ),
    "gcvit_global": Case(
        size=(14, 21), window=(7, 7), shared_q=True, layout="kv", bias="table", batch=3
    ),
    "gcvit_global_one_window": Case(
        size=(7, 7), window=(7, 7), shared_q=True, layout="kv", bias="table", heads=4
    ),
    "gcvit_global_many_windows": Case(
        size=(12, 8), window=(3, 2), shared_q=True, layout="kv", bias="table", heads=1
    ),
    "gcvit_global_odd_windows": Case(
        size=(9, 6), window=(3, 2), shared_q=True, layout="kv", bias="dense", scale="per_head"
    ),
    "gcvit_global_padded": Case(
        size=(6, 11),
        window=(4, 4),
        pad_mode="pad_then_roll",
        shared_q=True,
        layout="kv",
        bias="table",
        pads=True,
        batch=3,
    ),
    "gcvit_global_v2": Case(size=(8, 4), shared_q=True, **_V2),
    "pvt": Case(nq=60, nk=49, dim=64, layout="kv"),
    "pvt_one_key": Case(nq=5, nk=1, dim=64, heads=1),
    "pvt_50_keys": Case(nq=50, nk=50, dim=64, batch=1, layout="kv"),
    "pvt_1050_keys": Case(nq=20, nk=1050, dim=64, batch=1, layout="kv"),
    "pvt_2500_keys": Case(nq=19, nk=2500, dim=32, batch=1, heads=3, layout="kv"),
    "pvt_long_queries": Case(nq=1100, nk=9, dim=32, batch=1, layout="kv"),
    "pvt_one_query": Case(nq=1, nk=33, heads=3),
    "full_bias_mask": Case(nq=13, nk=21, bias="dense", mask=2, scale=0.3),
    "full_one_mask": Case(nq=7, nk=10, mask=1, scale="per_head", batch=3, difficulty=3.0),
    "full_l2norm": Case(nq=6, nk=17, l2norm=True, scale="per_head", difficulty=30.0),
    "full_l2norm_queries": Case(nq=100, nk=17, l2norm=True, scale="per_head", difficulty=30.0),
    "full_l2norm_keys": Case(nq=6, nk=100, l2norm=True, scale="per_head", difficulty=30.0),
    "full_long_keys_bias": Case(
        nq=3, nk=2100, heads=1, batch=2, dim=10, bias="dense", mask=2, layout="transposed"
    ),
    "full_long_keys_l2norm": Case(
        nq=3, nk=2049, heads=1, batch=1, dim=24, l2norm=True, scale=100.0, difficulty=30.0
    ),
    # Windows that fill no vector, rectangular ones, and single tokens.
    "window_5x3": Case(size=(10, 9), window=(5, 3), shift=(2, 1), mask="swin", bias="table"),
    "window_12x1": Case(size=(12, 2), window=(12, 1), shift=(5, 0), mask="swin", bias="table"),
    "window_1x1": Case(size=(3, 2), window=(1, 1), bias="table"),
    "window_12": Case(size=(12, 12), window=(12, 12), bias="table", batch=1),
    # Beyond the sizes at which kernels split queries (512), chunk windows (8), block keys (2048).
    "window_24": Case(
        size=(24, 24), window=(24, 24), shift=(12, 12), mask="swin", bias="table", batch=1, dim=8
    ),
    "window_3x700": Case(
        size=(2, 690),
        window=(3, 700),
        shift=(1, 350),
        mask="swin",
        bias="table",
        batch=1,
        dim=8,
        heads=1,
        pad_mode="roll_then_pad",
        pads=True,
    ),
    "many_windows": Case(
        size=(11, 22),
        shift=(2, 1),
        mask="swin",
        bias="table",
        pad_mode="roll_then_pad",
        dim=8,
        pads=True,
        scale="per_head",
    ),
    "full_long_queries_bias": Case(
        nq=600, nk=5, dim=8, bias="dense", scale="per_head", mask=1, difficulty=3.0
    ),
    "window_beyond_map": Case(
        size=(2, 9),
        window=(5, 3),
        shift=(3, 1),
        mask="swin",
        bias="table",
        pad_mode="roll_then_pad",
        pads=True,
    ),
    "window_beyond_map_pad_first": Case(
        size=(2, 9), window=(5, 3), shift=(3, 1), mask="swin", pad_mode="pad_then_roll", pads=True
    ),
    # Head dims: vector multiples, remainders, the largest, the smallest.
    "dim_64": Case(dim=64, bias="table", shift=(2, 2), mask="swin"),
    "dim_24": Case(dim=24, heads=4, bias="table", layout="qkv"),
    "dim_30": Case(dim=30, heads=3, bias="table", layout="qkv"),
    "dim_10": Case(dim=10, shift=(1, 2), mask="swin", layout="qkv"),
    "dim_80": Case(dim=80, heads=1, bias="dense"),
    "dim_128": Case(dim=128, heads=1, bias="table", layout="qkv"),
    "dim_1": Case(dim=1, heads=4, bias="table", layout="qkv"),
    # Both pad orders, padding on each axis and both, shifts on each axis and both.
    "pad_roll_both": Case(size=(9, 12), pad_mode="pad_then_roll", pads=True, **_SHIFTED),
    "pad_roll_rows": Case(size=(9, 14), pad_mode="pad_then_roll", **_SHIFTED),
    "pad_roll_columns": Case(size=(14, 9), pad_mode="pad_then_roll", layout="qkv", **_SHIFTED),
    "pad_roll_divisible": Case(size=(8, 4), pad_mode="pad_then_roll", shift=(2, 2), pads=True),
    "roll_pad_both": Case(size=(9, 12), pad_mode="roll_then_pad", pads=True, **_SHIFTED),
    "roll_pad_rows": Case(size=(9, 14), pad_mode="roll_then_pad", **_SHIFTED),
    "roll_pad_columns": Case(size=(14, 9), pad_mode="roll_then_pad", layout="qkv", **_SHIFTED),
    "roll_pad_v2": Case(
        size=(6, 5), pad_mode="roll_then_pad", shift=(2, 2), mask="swin", pads=True, **_V2
    ),
    "pad_only": Case(size=(5, 6), pad_mode="pad_then_roll", bias="table", pads=True),
    "shift_rows": Case(shift=(3, 0), mask="swin", bias="table"),
    "shift_columns": Case(shift=(0, 3), mask="swin", bias="table"),
    "shift_without_mask": Case(shift=(1, 3), bias="table"),
    "shift_one_window": Case(size=(4, 4), shift=(2, 1), mask="swin", bias="table"),
    "shift_one_window_row": Case(size=(4, 12), shift=(2, 2), mask="swin"),
    "shift_one_window_column": Case(size=(12, 4), shift=(2, 2), mask="swin"),
    # Masks, bias, scale.
    "swin_minus_inf": Case(shift=(2, 2), mask="swin", mask_value=-math.inf, bias="table"),
    "swin_mask_plus_five": Case(shift=(2, 1), mask="swin", mask_value=5.0),
    "mask_one": Case(mask=1, bias="table"),
    "mask_per_window": Case(mask=6, bias="dense", layout="qkv"),
    "mask_repeats": Case(size=(8, 8), mask=2),
    "dense_bias": Case(bias="dense", shift=(2, 2), mask="swin", batch=3),
    "scale_float": Case(scale=0.5, bias="table"),
    "scale_per_head": Case(scale="per_head", dim=8, heads=4, difficulty=3.0),
    "scale_zero": Case(scale=0.0, bias="table"),
    "scale_negative": Case(scale=-0.4),
    "saturated": Case(scale=20.0, bias="table", difficulty=30.0),
    "l2norm_default_scale": Case(l2norm=True),
    "l2norm_zero_rows": Case(zero_rows=True, shift=(2, 2), mask="swin", **_V2),
    "side_same_dtype": Case(
        size=(6, 9),
        pad_mode="pad_then_roll",
        pads=True,
        bias="table",
        scale="per_head",
        dim=4,
        side_dtype="same",
        difficulty=3.0,
    ),
    "side_float64": Case(
        size=(6, 9),
        pad_mode="roll_then_pad",
        pads=True,
        bias="dense",
        mask=1,
        side_dtype=torch.float64,
    ),
    # Memory layouts and batches.
    "expanded": Case(layout="expanded", bias="table", batch=3),
    "transposed_map": Case(layout="transposed", bias="table", shift=(2, 1), mask="swin"),
    "channels_first": Case(layout="channels_first", bias="table"),
    "broken_last_dim": Case(layout="broken", bias="table", batch=1),
    "sliced": Case(layout="sliced", shift=(1, 1), mask="swin", bias="table", dim=24),
    "full_transposed": Case(nq=9, nk=12, layout="transposed"),
    "full_expanded": Case(nq=9, nk=12, layout="expanded"),
    "full_sliced": Case(nq=9, nk=12, layout="sliced", batch=3),
    "batch_0": Case(
        batch=0,
        bias="table",
        scale="per_head",
        pads=True,
        shift=(2, 2),
        mask="swin",
        size=(6, 6),
        pad_mode="pad_then_roll",
    ),
    "batch_0_shared_q": Case(batch=0, shared_q=True, bias="dense", mask=1),
    "batch_0_full": Case(batch=0, nq=5, nk=4, bias="dense", scale="per_head"),
    "no_queries": Case(nq=0, nk=4, scale="per_head", bias="dense"),
    "one_head": Case(heads=1, batch=1, layout="qkv", bias="table"),
}


def _separate(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    """Token axes swapped in memory (window domain: a transposed map; full: batch inside)."""
    a, b = (1, 2) if x.dim() == 5 else (0, 1)
    return x.transpose(a, b).contiguous().transpose(a, b)


def _channels_first(x: Tensor) -> Tensor:
    """Heads outermost, as a view of `[B, h, H, W, d]`."""
    return x.movedim(-2, 1).contiguous().movedim(1, -2)


def _expanded(x: Tensor) -> Tensor:
    """Stride 0 over the batch."""
    return x[:1].expand_as(x)


def _broken(x: Tensor) -> Tensor:
    """Channels not adjacent in memory."""
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def _sliced(x: Tensor) -> Tensor:
    """A view inside a larger tensor, with a gap after every axis and an odd offset."""
    big = x.new_full([n + 3 for n in x.shape], math.nan)
    view = big[tuple(slice(1, n + 1) for n in x.shape)]
    view.copy_(x)
    return view


_LAYOUTS = {
    "separate": _separate,
    "transposed": _transposed,
    "channels_first": _channels_first,
    "expanded": _expanded,
    "broken": _broken,
    "sliced": _sliced,
}


def _qkv(case: Case, random: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (case.batch, *((case.nk,) if case.full else case.size))
    tail = (case.heads, case.dim)
    tokens = case.nq if case.full else case.window[0] * case.window[1]
    q_shape = (case.batch, tokens) if case.full or case.shared_q else shape
    if case.layout == "qkv":
        q, k, v = random(*shape, 3, *tail).unbind(-3)
        return q, k, v
    if case.layout == "kv":
        return (random(*q_shape, *tail), *random(*shape, 2, *tail).unbind(-3))
    q, k, v = random(*q_shape, *tail), random(*shape, *tail), random(*shape, *tail)
    if case.zero_rows:
        q[:, 1, 2] = 0
        k[:, 2, 1:3] = 0
    arrange = _LAYOUTS[case.layout]
    return arrange(q), arrange(k), arrange(v)


def build(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
) -> Sample:
    """The sample of `CASES[name]`; with `requires_grad`, all but the mask are leaves."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def side(*shape: int) -> Tensor:
        to = dtype if isinstance(case.side_dtype, str) else case.side_dtype
        return torch.randn(shape, generator=generator).to(device, to)

    q, k, v = _qkv(case, random)
    h, d = case.heads, case.dim
    nq = case.nq if case.full else case.window[0] * case.window[1]
    nk = case.nk if case.full else nq
    kwargs: dict[str, Any] = {"q": q, "k": k, "v": v, "qk_l2norm": case.l2norm}
    if not case.full:
        kwargs |= {"window": case.window, "shift": case.shift, "pad_mode": case.pad_mode}
    if case.bias == "table":
        rows = (2 * case.window[0] - 1) * (2 * case.window[1] - 1)
        # A transposed table, as [h, rows] storage gives: side inputs may be strided too.
        kwargs["bias_table"] = side(h, rows).t() if case.layout == "qkv" else side(rows, h)
    elif case.bias == "dense":
        kwargs["bias"] = side(h, nq, nk)
    if case.mask == "swin":
        kwargs |= {"mask": "swin", "mask_value": case.mask_value}
    elif case.mask is not None:
        mask = side(int(case.mask), nq, nk)
        if nk > 1:
            mask[..., 1::3] = -math.inf
        kwargs["mask"] = mask
    if case.scale == "per_head":
        # Swin v2's tau reaches 100, on cosines; plain logits are larger by about d.
        exponents = torch.linspace(2.0, 0.3, h) if case.l2norm else torch.linspace(0.0, -1.0, h)
        kwargs["scale"] = torch.pow(10.0, exponents).to(side(0))
    elif case.scale is not None:
        kwargs["scale"] = case.scale
    if case.pads:
        kwargs["k_pad"], kwargs["v_pad"] = side(3, h, d)[1:].unbind(0)
    if requires_grad:
        for key, x in kwargs.items():
            if isinstance(x, Tensor) and key != "mask":
                kwargs[key] = x.detach().requires_grad_()
    return Sample(name, raw_args(kwargs), kwargs, case.difficulty)


PACKED = (
    "swin",
    "swin_v2",
    "gcvit_global",
    "gcvit_global_padded",
    "pad_roll_both",
    "roll_pad_columns",
    "pvt",
    "pvt_long_queries",
    "full_long_keys_bias",
    "dim_30",
    "sliced",
    "batch_0",
)
"""Cases that are also sampled in packed form."""


def packed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with q, k and v packed, or k and v where q has another shape."""
    q, k, v = (kwargs[name].detach() for name in ("q", "k", "v"))
    rest = {key: x for key, x in kwargs.items() if key not in ("q", "k", "v")}
    if q.shape == k.shape:
        tensors = {"q": torch.stack((q, k, v), -3)}
    else:
        tensors = {"q": q.clone(), "k": torch.stack((k, v), -3)}
    grad = kwargs["q"].requires_grad
    return {name: x.requires_grad_(grad) for name, x in tensors.items()} | rest


def build_packed(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
) -> Sample:
    """The sample of `CASES[name]` in packed form."""
    kwargs = packed(build(name, device, dtype, requires_grad, seed).kwargs)
    return Sample(f"{name}_packed", raw_args(kwargs), kwargs, CASES[name].difficulty)


def raw_args(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of the raw operator from those of the public function."""
    qkv = (kwargs.get(name) for name in ("q", "k", "v"))
    mask, scale = kwargs.get("mask"), kwargs.get("scale")
    return (
        *(None if x is None else _last_dim_contiguous(x) for x in qkv),
        kwargs.get("bias_table"),
        kwargs.get("bias"),
        mask if isinstance(mask, Tensor) else None,
        scale if isinstance(scale, Tensor) else None,
        *(None if x is None else x.flatten() for x in (kwargs.get("k_pad"), kwargs.get("v_pad"))),
        list(kwargs.get("window", ())),
        list(kwargs.get("shift", (0, 0))),
        kwargs.get("pad_mode", "none"),
        kwargs.get("mask_value", -100.0) if isinstance(mask, str) else None,
        float(scale) if isinstance(scale, float) else kwargs["q"].shape[-1] ** -0.5,
        kwargs["qk_l2norm"],
        False,  # tf32
    )


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64, for exact results; pads keep the rounding to q's dtype that
    defines them. Leaves that require gradients stay such leaves.
    """
    pads = ("k_pad", "v_pad")

    def double(key: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        exact = x.detach().to(kwargs["q"].dtype) if key in pads else x.detach()
        return exact.double().requires_grad_(x.requires_grad)

    return {key: double(key, x) for key, x in kwargs.items()}


def samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """Every case of the forward operator, then the packed ones."""
    for name in CASES:
        yield build(name, device, dtype, requires_grad, seed)
    for name in PACKED:
        yield build_packed(name, device, dtype, requires_grad, seed)


def build_backward(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Sample:
    """The backward sample of `CASES[name]`; `lse` comes from the forward operator."""
    return _backward_of(build(name, device, dtype, seed=seed), seed)


def _backward_of(sample: Sample, seed: int) -> Sample:
    forward = sample.args
    out, lse = torch.ops.fastbb.window_attention.default(*forward)
    grad_out = random_like(out, seed + 1)
    need_side = [forward[i] is not None for i in (3, 4, 6, 7, 8)]
    args = (grad_out, *forward[:3], lse, *forward[3:], need_side)
    return Sample(sample.name, args, difficulty=sample.difficulty)


def backward_samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """Every case of the backward operator, which is not differentiable itself."""
    if requires_grad:
        return
    for name in CASES:
        yield build_backward(name, device, dtype, seed)
    for name in PACKED:
        yield _backward_of(build_packed(name, device, dtype, seed=seed), seed)
