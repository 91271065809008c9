# SPDX-License-Identifier: Apache-2.0
"""Meaning of attention between binarized queries, keys, values and probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbb.reference.elastic_binarize import elastic_binarize
from fastbb.reference.philox import philox_keep


def binary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alphas: Tensor | None = None,
    mask: Tensor | None = None,
    est_q: Tensor | None = None,
    est_k: Tensor | None = None,
    v_p: Tensor | None = None,
    scale: float,
    probs: str = "softmax",
    ste: str = "clip",
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """q `[B, Nq, h, d]`, k and v `[B, Nk, h, d]` -> `[B, Nq, h, d]`, differentiable.

    With b() the signs of `elastic_binarize` (0 at 0) times their alpha:

    - scores S = scale * (b(q) b(k)^T + est_q est_k^T) + mask; est_q `[B, Nq, R]`, est_k
      `[B, Nk, R]` serve all heads; mask `[B, Nk]` or `[B, Nq, Nk]`.
    - `"softmax"`: P = elastic_binarize(dropout(softmax(S)), unsigned); `"bool"` (BiBERT):
      P = dropout(S) > 0, whose gradient passes where |dropout(S)| < 1.
    - result P b(v) + P v_p; v_p `[B, Nk]` serves all heads and channels.
    """
    given = q.dtype
    wide = torch.float64 if given == torch.float64 else torch.float32
    a_q, a_k, a_v, a_p = (None,) * 4 if alphas is None else alphas.to(wide).split(1)
    qb, kb, vb = (
        elastic_binarize(x.to(wide).transpose(1, 2), alpha, ste=ste)
        for x, alpha in ((q, a_q), (k, a_k), (v, a_v))
    )
    scores = qb @ kb.mT
    if est_q is not None and est_k is not None:
        scores = scores + (est_q.to(wide) @ est_k.to(wide).mT).unsqueeze(1)
    scores = scores * scale
    if mask is not None:
        extra = mask.to(wide)
        scores = scores + (extra[:, None, None] if mask.dim() == 2 else extra[:, None])
    weights = scores.softmax(-1) if probs == "softmax" else scores
    if dropout_p > 0:
        keep = philox_keep(tuple(scores.shape), dropout_p, seed, q.device)
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
    if probs == "softmax":
        binary = elastic_binarize(weights, a_p, kind="unsigned")
    else:
        signs = elastic_binarize(weights, kind="minus", ste="clip_open")
        # 1 and 0 have the gradient of +1 and -1, not half of it.
        binary = signs - signs.detach() + (signs.detach() + 1) / 2
    out = binary @ vb
    if v_p is not None:
        out = out + (binary @ v_p.to(wide)[:, None, :, None])
    return out.transpose(1, 2).to(given)
