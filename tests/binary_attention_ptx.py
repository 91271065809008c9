# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernel of binary attention, as PTX, with the launches of the C++ plan."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ptxsim
from fastbb import _C
from fastbb.reference.binary_attention import binary_attention
from fastbb.reference.binary_pack import bit_row_bytes, pack_bool
from fastbb.reference.philox import philox_keep

FOLDER = Path(__file__).resolve().parent.parent / "csrc/ops/binary_attention"
SOURCES = {kind: FOLDER / f"binary_attention_cuda_{kind}.cu" for kind in ("f32", "f16", "bf16")}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
STES = ["clip", "clip_open", "identity"]
# A result is rounded once; sums of v_p are float32.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class HeadMap(ctypes.Structure):
    """`HeadMap` of binary_attention.h."""

    _fields_ = [("data", _POINTER)] + [(name, _LONG) for name in ("image", "token", "head")]


class Params(ctypes.Structure):
    """`BinaryAttentionParams`; the plan refuses another size."""

    _fields_ = [
        ("dtype", _INT),
        *((name, _LONG) for name in ("batch", "heads", "nq", "nk", "head_dim")),
        *((name, HeadMap) for name in ("q", "k", "v")),
        *((name, _POINTER) for name in ("out", "alphas", "mask")),
        *((name, _LONG) for name in ("mask_image", "mask_query")),
        *((name, _POINTER) for name in ("est_q", "est_k")),
        ("rank", _LONG),
        ("v_p", _POINTER),
        ("scale", _FLOAT),
        ("bool_probs", ctypes.c_bool),
        ("ste", _INT),
        ("dropout", _FLOAT),
        ("seed", ctypes.c_uint64),
        *((name, _POINTER) for name in ("q_planes", "k_planes", "v_planes", "p_planes", "lse")),
    ]


def launch_of(kernel: str) -> dict[str, int]:
    """The plan's launch of a kernel, by its name in cuda_budgets.json: 512 tokens with a mask and
    estimators of rank 2.
    """
    match = re.fullmatch(r"binary_attention_forward<\w+, (\d), (\w+)>", kernel)
    assert match is not None, kernel
    p = Params(batch=1, heads=1, nq=512, nk=512, head_dim=32 * int(match[1]), rank=2, v_p=1)
    p.lse = match[2] == "true"
    plan = _C.binary_attention_cuda_plan(bytes(p))
    assert (plan["words"], plan["training"]) == (int(match[1]), match[2] == "true")
    return plan["launch"]


class Case:
    """Arguments, and what the reference makes of them.

    Attributes:
        sure: probabilities on whose bit rounding does not decide; other bits, and results of their
            rows, are not compared.
    """

    def __init__(
        self,
        nq: int,
        nk: int,
        dim: int,
        heads: int = 1,
        batch: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        alphas: bool = True,
        mask: str = "",
        rank: int = 0,
        v_p: bool = False,
        probs: str = "softmax",
        ste: str = "clip",
        dropout_p: float = 0.0,
        special: bool = False,
        strided: bool = False,
        save: bool = True,
    ) -> None:
        self.dtype, self.save = dtype, save
        made = torch.Generator().manual_seed(nq * 1000 + nk * 10 + dim)

        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made)

        def tokens(count: int) -> Tensor:
            if strided:
                return rand(batch, count, heads, 3, dim + 3).to(dtype)[:, :, :, 1, 1 : dim + 1]
            return rand(batch, count, heads, dim).to(dtype)

        self.q, self.k, self.v = tokens(nq), tokens(nk), tokens(nk)
        for x in (self.q, self.k, self.v):
            x[:, ::3, :, ::5] = 0
            if special:
                x[0, -1, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:dim]
        self.keywords: dict[str, Any] = {
            "scale": 3 * dim**-0.5,
            "probs": probs,
            "ste": ste,
            "dropout_p": dropout_p,
            "seed": (1 << 40) + 7,
        }
        if alphas:
            self.keywords["alphas"] = torch.tensor([0.9, 1.1, 0.7, min(2.5 / nk, 0.8)])
        if mask == "keys":
            extra = torch.zeros(batch, nk)
            extra[:, 2::7] = torch.finfo(torch.float32).min
            extra[0, 1::5] = -torch.inf
            self.keywords["mask"] = extra
        elif mask == "full":
            extra = rand(batch, nq, nk)
            extra[..., 3::4] = -torch.inf
            extra[0, 0] = -torch.inf
            self.keywords["mask"] = extra
        if rank:
            self.keywords |= {"est_q": rand(batch, nq, rank), "est_k": rand(batch, nk, rank)}
        if v_p:
            self.keywords["v_p"] = rand(batch, nk)
        self._refer()

    def _refer(self) -> None:
        doubles = {
            name: x.double() if isinstance(x, Tensor) else x for name, x in self.keywords.items()
        }
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        self.out = binary_attention(q, k, v, **doubles)
        self.lse, weights, threshold = self._probabilities(q, k, doubles)
        dropout = self.keywords["dropout_p"]
        self.kept = philox_keep(tuple(weights.shape), dropout, self.keywords["seed"], q.device)
        dropped = torch.where(self.kept, weights / (1 - dropout), 0.0) if dropout else weights
        self.bits = dropped > threshold
        margin = 1e-4 * (threshold or 0.1)
        self.sure = ((dropped - threshold).abs() > margin) | (dropped == threshold)
        self.sure |= dropped.isnan()

    def _probabilities(
        self, q: Tensor, k: Tensor, sides: dict[str, Any]
    ) -> tuple[Tensor, Tensor, float]:
        alphas = sides.get("alphas", torch.ones(4, dtype=torch.float64))

        def signs(x: Tensor) -> Tensor:
            return ((x > 0).double() - (x < 0).double()).transpose(1, 2)

        scores = alphas[0] * alphas[1] * (signs(q) @ signs(k).mT)
        if "est_q" in sides:
            scores = scores + (sides["est_q"] @ sides["est_k"].mT)[:, None]
        scores = scores * sides["scale"]
        if "mask" in sides:
            mask = sides["mask"]
            scores = scores + (mask[:, None, None] if mask.dim() == 2 else mask[:, None])
        if sides["probs"] == "bool":
            return scores, scores, 0.0
        return scores.logsumexp(-1), scores.softmax(-1), float(alphas[3]) / 2

    def planes(self, name: str) -> Tensor:
        """What is saved of q, k or v: `[B, N, h, 3, bytes]`."""
        x = getattr(self, name).float()
        index = ["q", "k", "v"].index(name)
        alpha = self.keywords["alphas"][index] if "alphas" in self.keywords else 1.0
        inside = {
            "clip": x.abs() <= alpha,
            "clip_open": x.abs() < alpha,
            "identity": torch.ones_like(x, dtype=torch.bool),
        }[self.keywords["ste"]]
        return pack_bool(torch.stack((x > 0, x < 0, inside), -2))

    def p_planes(self) -> Tensor:
        """`[B, h, Nq, 1 or 2, bytes]`."""
        planes = [self.bits, self.kept] if self.keywords["dropout_p"] else [self.bits]
        return pack_bool(torch.stack(planes, -2))


def _bits(x: Tensor) -> np.ndarray:
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy()


class Call:
    """Parameters of a call, and the global memory that they lead to."""

    def __init__(self, case: Case) -> None:
        self.case, self.arena = case, ptxsim.Arena()
        batch, nq, heads, dim = case.q.shape
        nk, sides = case.k.shape[1], case.keywords
        p = self.params = Params(dtype=DTYPES[case.dtype], batch=batch, heads=heads)
        p.nq, p.nk, p.head_dim = nq, nk, dim
        for name in ("q", "k", "v"):
            setattr(p, name, self._map(getattr(case, name)))
        p.out = self.arena.add(_bits(torch.empty(batch, nq, heads, dim, dtype=case.dtype)), "out")
        for name in ("alphas", "mask", "est_q", "est_k", "v_p"):
            if name in sides:
                setattr(p, name, self.arena.add(np.ascontiguousarray(sides[name].numpy()), "in"))
        if "mask" in sides:
            full = sides["mask"].dim() == 3
            p.mask_image, p.mask_query = (nq * nk, nk) if full else (nk, 0)
        p.rank = sides["est_q"].shape[-1] if "est_q" in sides else 0
        p.scale, p.bool_probs = sides["scale"], sides["probs"] == "bool"
        p.ste = STES.index(sides["ste"])
        p.dropout, p.seed = sides["dropout_p"], sides["seed"]
        if case.save:
            for name, count in (("q_planes", nq), ("k_planes", nk), ("v_planes", nk)):
                self._allocate(name, (batch, count, heads, 3, bit_row_bytes(dim)), np.uint8)
            self._allocate("p_planes", tuple(case.p_planes().shape), np.uint8)
            if not p.bool_probs:
                self._allocate("lse", (batch, heads, nq), np.float32)
        self.plan = _C.binary_attention_cuda_plan(bytes(p))

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        setattr(self.params, name, self.arena.add(np.empty(shape, dtype), "out"))

    def _map(self, x: Tensor) -> HeadMap:
        size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        reached = x.as_strided((size if x.numel() else 0,), (1,))
        return HeadMap(self.arena.add(_bits(reached), "in"), *x.stride()[:3])

    def run(self, module: ptxsim.Module, **options: Any) -> ptxsim.Result | None:
        """Launches as the package does; raises what ptxsim finds."""
        plan, launch = self.plan, self.plan["launch"]
        if not launch["grid"]:
            return None
        (kernel,) = (
            each for each in module.kernels if f"Li{plan['words']}ELb{plan['training']:d}E" in each
        )
        return module.launch(
            kernel,
            grid=launch["grid"],
            block=launch["block"],
            args=[self.params, plan["bytes"]],
            dynamic_shared=launch["shared_bytes"],
            arena=self.arena,
            **options,
        )

    def _read(self, address: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        assert self.arena.written(address).all(), "not all written"
        raw = torch.from_numpy(np.array(self.arena.get(address)))
        return raw.view(dtype).reshape(shape)

    def check(self) -> None:
        case, p = self.case, self.params
        out = self._read(p.out, case.dtype, case.out.shape)
        bound = BOUNDS[case.dtype]
        close = {"rtol": bound, "atol": bound / 4, "equal_nan": True}
        rows = case.sure.all(-1).transpose(1, 2)
        torch.testing.assert_close(out.double()[rows], case.out[rows], **close)
        if not case.save:
            return
        for name in ("q", "k", "v"):
            expected = case.planes(name)
            found = self._read(getattr(p, f"{name}_planes"), torch.uint8, expected.shape)
            assert torch.equal(found, expected), name
        expected = case.p_planes()
        found = self._read(p.p_planes, torch.uint8, expected.shape)
        unsure = pack_bool(~case.sure).unsqueeze(-2)
        assert not ((found ^ expected) & ~unsure).any(), "probabilities"
        if p.lse:
            lse = self._read(p.lse, torch.float32, case.lse.shape)
            torch.testing.assert_close(lse.double(), case.lse, rtol=1e-5, atol=1e-5)
