# SPDX-License-Identifier: Apache-2.0
"""Samples and tolerances of `fastbb::binary_attention`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbb.testing.compare import Bounds, Tolerance
from fastbb.testing.sample import Sample

# Counts are exact. float32: a few roundings of scores (gradients) and of the result. Half precision
# rounds results and gradients once; as results are multiples of few numbers, their errors may all
# have one sign, so that a tenth of relative_l2 must be half a unit in the last place.
_FLOAT32 = (Bounds(2e-6, 2e-6, 1e-6), Bounds(3e-5, 3e-6, 1e-5))
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(*_FLOAT32, *_FLOAT32),
    torch.float16: Tolerance(Bounds(1e-3, 1e-4, 2.5e-3), Bounds(1e-3, 3e-4, 5e-4), *_FLOAT32),
    torch.bfloat16: Tolerance(Bounds(8e-3, 1e-3, 2e-2), Bounds(6e-3, 2e-3, 3e-3), *_FLOAT32),
}

_MASK_VALUES = {"inf": -math.inf, "min": torch.finfo(torch.float32).min}


@dataclass(frozen=True)
class Case:
    """What `build` turns into tensors.

    Attributes:
        layout: "separate"; "qkv": views of one `[B, N, 3, h, d]`; "heads": views of
            `[B, h, N, d]`; "strided": with a strided last dimension.
        alphas: whether there are learned scales, one of them below its lower bound.
        mask: "row" `[B, Nk]`, "pair" `[B, Nq, Nk]` or None.
        mask_value: of masked keys: "inf" or "min", the least float32.
        all_masked: in the first image (of "pair": for its first query), every key is masked.
        rank: of the estimators of scores; 0 for none.
        v_p: whether there is an estimator of values.
        zeros: tokens of q, k and v that are zero, and zeros among the elements of others.
    """

    batch: int = 2
    heads: int = 2
    dim: int = 64
    nq: int = 17
    nk: int = 17
    layout: str = "separate"
    alphas: bool = True
    mask: str | None = None
    mask_value: str = "inf"
    all_masked: bool = False
    rank: int = 0
    v_p: bool = False
    zeros: bool = False
    probs: str = "softmax"
    ste: str = "clip"
    dropout_p: float = 0.0
    side_dtype: torch.dtype = torch.float32


_BIPFT: dict[str, Any] = {"rank": 2, "v_p": True, "mask": "row"}

CASES: dict[str, Case] = {
    "bit": Case(nq=128, nk=128, batch=1, layout="qkv"),
    "bit_dropout": Case(nq=65, nk=65, layout="heads", dropout_p=0.25),
    "bipft": Case(nq=33, nk=33, layout="qkv", **_BIPFT),
    "bipft_dropout": Case(nq=21, nk=37, dropout_p=0.1, **_BIPFT),
    "bipft_zeros": Case(nq=30, nk=70, zeros=True, **_BIPFT),
    "bibert": Case(nq=40, nk=40, alphas=False, probs="bool", ste="clip_open", mask="row"),
    "bibert_dropout": Case(
        alphas=False, probs="bool", ste="clip_open", dropout_p=0.3, rank=1, v_p=True
    ),
    "bool_alphas": Case(probs="bool", rank=1, layout="qkv", dim=32),
    "vit": Case(nq=197, nk=197, batch=1, heads=3, layout="qkv", rank=1, dim=32),
    "identity": Case(ste="identity", zeros=True, dim=32),
    "pair_mask": Case(nq=9, nk=34, mask="pair", rank=1),
    "least_mask": Case(mask="row", mask_value="min", rank=1),
    "all_least": Case(mask="row", mask_value="min", all_masked=True, rank=1),
    "dim_1": Case(dim=1, rank=3),
    "dim_33": Case(dim=33, zeros=True, layout="qkv"),
    "dim_72": Case(dim=72, nk=31, v_p=True),
    "dim_256": Case(dim=256, nq=5, nk=40, heads=1, zeros=True),
    "dim_250": Case(dim=250, nq=3, nk=33, heads=1, rank=5),
    "strided": Case(layout="strided", rank=1),
    "one_key": Case(nk=1, mask="row", v_p=True),
    "one_query": Case(nq=1, nk=50, rank=1),
    "long_keys": Case(batch=1, heads=1, nq=70, nk=1500, rank=1, v_p=True, zeros=True, dim=20),
    "long_keys_dropout": Case(batch=1, heads=2, nq=3, nk=1025, dropout_p=0.5, dim=8, rank=1),
    "side_float64": Case(side_dtype=torch.float64, **_BIPFT),
    "side_bfloat16": Case(side_dtype=torch.bfloat16, **_BIPFT),
    "no_queries": Case(nq=0, **_BIPFT),
    "no_images": Case(batch=0, **_BIPFT),
}


def _tensors(case: Case, make: Any) -> list[Tensor]:
    """q, k, v of the case's layout; about a third of their elements exceed 1."""
    sizes = (case.nq, case.nk, case.nk)
    b, h, d = case.batch, case.heads, case.dim
    if case.layout == "qkv":
        assert case.nq == case.nk
        return list(make(b, case.nq, 3, h, d).unbind(2))
    if case.layout == "heads":
        return [make(b, h, n, d).transpose(1, 2) for n in sizes]
    if case.layout == "strided":
        return [make(b, n, h, 2 * d)[..., ::2] for n in sizes]
    return [make(b, n, h, d) for n in sizes]


def build(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
) -> Sample:
    """The sample of `CASES[name]`. Planes are saved (`save`), for gradients and to be compared."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(1000 * seed + 1)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def side(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.side_dtype)

    qkv = _tensors(case, make)
    if case.zeros:
        for x in qkv:
            x[:, 1::5] = 0
            x[:, 2::5, :, ::3] = 0
    kwargs: dict[str, Any] = dict(zip("qkv", qkv, strict=True))
    if case.alphas:
        # The last: somewhat above the even share of a key, so that a part of the bits is set.
        values = torch.tensor([0.7, 0.9, 1.3, 2.5 / case.nk])
        kwargs["alphas"] = values.to(device, case.side_dtype)
    if case.mask is not None:
        shape = (case.batch, case.nk) if case.mask == "row" else (case.batch, case.nq, case.nk)
        mask = torch.zeros(shape)
        if case.nk > 1:
            mask[..., 2::3] = _MASK_VALUES[case.mask_value]
        if case.all_masked:
            mask[:1] = _MASK_VALUES[case.mask_value]
        kwargs["mask"] = mask.to(device, case.side_dtype)
    if case.rank:
        kwargs["est_q"] = side(case.batch, case.nq, case.rank)
        kwargs["est_k"] = side(case.batch, case.nk, case.rank)
    if case.v_p:
        kwargs["v_p"] = side(case.batch, case.nk)
    if requires_grad:
        for key, x in kwargs.items():
            if key != "mask":
                kwargs[key] = x.detach().requires_grad_()
    kwargs |= {
        "scale": case.dim**-0.5,
        "probs": case.probs,
        "ste": case.ste,
        "dropout_p": case.dropout_p,
        "seed": 2**33 + 17,
    }
    return Sample(name, raw_args(kwargs), kwargs)


def raw_args(kwargs: dict[str, Any], save: bool = True) -> tuple[Any, ...]:
    """Arguments of the raw operator from those of the public function."""
    return (
        *(_last_dim_contiguous(kwargs[name]) for name in "qkv"),
        *(kwargs.get(name) for name in ("alphas", "mask", "est_q", "est_k", "v_p")),
        *(kwargs[name] for name in ("scale", "probs", "ste", "dropout_p", "seed")),
        save,
    )


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def samples(
    device: str | torch.device,
    dtype: torch.dtype,
    requires_grad: bool = False,
    seed: int = 0,
) -> Iterator[Sample]:
    """Every case."""
    for name in CASES:
        yield build(name, device, dtype, requires_grad, seed)
