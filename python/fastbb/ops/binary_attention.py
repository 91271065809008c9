# SPDX-License-Identifier: Apache-2.0
"""Attention between binarized queries, keys, values and probabilities."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastbb import reference
from fastbb.ops._checks import (
    FLOAT_DTYPES,
    check_choice,
    check_float,
    check_same,
    check_shape,
    check_tensor,
    fail,
    kernel_reasons,
    last_dim_contiguous,
    use_kernel,
)
from fastbb.reference.binary_pack import bit_row_bytes, floored

OP = "binary_attention"
PROBS = ("softmax", "bool")
STES = ("clip", "clip_open", "identity")
MAX_HEAD_DIM = 256
MAX_CUDA_HEAD_DIM = 128
MAX_CUDA_RANK = 64
# Token indices are 32-bit in the kernels.
MAX_TOKENS = 2**31 - 1
_SIDE_DTYPES = (*FLOAT_DTYPES, torch.float64)


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
    scale: float | None = None,
    probs: Literal["softmax", "bool"] = "softmax",
    ste: Literal["clip", "clip_open", "identity"] = "clip",
    dropout_p: float = 0.0,
    seed: int = 0,
    impl: Literal["auto", "fused", "reference"] = "auto",
) -> Tensor:
    """Attention in which both products are of bits: AND and population counts.

    Letters: B images, Nq queries, Nk keys, h heads, d head dim, R rank. With b(x) the sign of x (0
    at 0 and at NaN), a_q, a_k, a_v, a_p the `alphas`, raised to 1e-5 where they are smaller:

    - S = scale * (a_q b(q) a_k b(k)^T + est_q est_k^T) + mask
    - P = a_p * [dropout(softmax(S)) > a_p / 2] (BiT, BiPFT), or P = [dropout(S) > 0] without a_p
      (BiBERT, `probs="bool"`)
    - result = P (a_v b(v) + v_p), `[B, Nq, h, d]`

    `reference.binary_attention` is the definition.

    Args:
        q: `[B, Nq, h, d]`, a view with any strides but a contiguous last dimension; others are
            copied.
        k, v: `[B, Nk, h, d]`, likewise.
        alphas: `[4]`, scales of q, k, v and the probabilities; default 1.
        mask: additive, `[B, Nk]` or `[B, Nq, Nk]`. A constant: it gets no gradient.
        est_q, est_k: `[B, Nq, R]` and `[B, Nk, R]`, low-rank estimate of what the scores of signs
            lack (BiPFT); for all heads.
        v_p: `[B, Nk]`, estimate of what the signs of values lack; for all heads and channels.
        scale: factor of the scores; default d**-0.5.
        probs: `"softmax"` or `"bool"`.
        ste: where the gradient of a sign passes, with u = x / alpha: `"clip"` |u| <= 1,
            `"clip_open"` |u| < 1, `"identity"` everywhere.
        dropout_p: probability of dropping one of the probabilities (`"bool"`: scores), in [0, 1).
        seed: of dropout; element ((b*h + g)*Nq + i)*Nk + j of Philox-4x32-10 decides about query i
            and key j of image b and head g, on every device.
        impl: `"fused"` runs the kernel or raises, `"reference"` runs plain PyTorch, `"auto"`
            takes the kernel when `can_run` finds no reason against it.

    dtypes: q, k, v float32, bfloat16 or float16 (the reference also float64); alphas, mask,
    estimators and v_p any float dtype, used in float32. Counts are exact, scores and softmax are
    float32, the result is rounded once. A probability that equals a_p / 2 but for rounding may fall
    on either side. Autocast changes nothing.

    Differentiable in q, k, v, alphas, est_q, est_k and v_p, with straight-through gradients; of
    P where 0 <= P / a_p <= 1 (`"bool"`: |S| < 1). The gradients of alphas are divided by the root
    of the number of elements that each scales. For the backward pass bits alone are kept, three
    for each element of q, k and v, and one (with dropout two) for each probability; scores are made
    again. A row whose keys are all masked by -inf has no probability above the threshold.

    Raises: ValueError (shape, device, value), TypeError (type, dtype), NotImplementedError
    (valid, but not in this kernel, with `impl="fused"`; second derivatives).

    Sources: Liu et al. 2022 (BiT), Xing et al. 2024 (BiPFT), Qin et al. 2022 (BiBERT).
    """
    _check(q, k, v, alphas, mask, est_q, est_k, v_p)
    if scale is not None:
        check_float(OP, "scale", scale)
    check_choice(OP, "probs", probs, PROBS)
    check_choice(OP, "ste", ste, STES)
    check_float(OP, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        fail(OP, "dropout_p", "must be at least 0 and below 1", dropout_p)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        fail(OP, "seed", "must be an int", type(seed).__name__, TypeError)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if use_kernel(OP, impl, can_run(q, k, v, est_q)):
        inputs = (q, k, v, alphas, est_q, est_k, v_p)
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        return torch.ops.fastbb.binary_attention.default(
            *(last_dim_contiguous(x) for x in (q, k, v)),
            *(alphas, mask, est_q, est_k, v_p),
            float(factor),
            *(probs, ste, float(dropout_p), seed, save),
        )[0]
    return reference.binary_attention(
        q,
        k,
        v,
        alphas=alphas,
        mask=mask,
        est_q=est_q,
        est_k=est_k,
        v_p=v_p,
        scale=float(factor),
        probs=probs,
        ste=ste,
        dropout_p=float(dropout_p),
        seed=seed,
    )


def can_run(q: Tensor, k: Tensor, v: Tensor, est_q: Tensor | None = None) -> list[str]:
    """Reasons why the fused kernel cannot serve these (valid) tensors; empty when it can."""
    reasons = kernel_reasons(OP, q)
    most = MAX_CUDA_HEAD_DIM if k.is_cuda else MAX_HEAD_DIM
    if k.shape[-1] > most:
        reasons.append(f"head dim {k.shape[-1]} is above {most}")
    if k.is_cuda and est_q is not None and est_q.shape[-1] > MAX_CUDA_RANK:
        reasons.append(f"rank {est_q.shape[-1]} is above {MAX_CUDA_RANK}")
    return reasons


def _check(
    q: Any, k: Any, v: Any, alphas: Any, mask: Any, est_q: Any, est_k: Any, v_p: Any
) -> None:
    """Raises on tensors that the definition gives no meaning to."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(OP, name, x, _SIDE_DTYPES)
    check_same(OP, "q", q, "k", k)
    check_same(OP, "v", v, "k", k)
    if k.dim() != 4:
        fail(OP, "k", "must be [B, Nk, h, d]", list(k.shape))
    B, nk, h, d = k.shape
    if h < 1 or d < 1:
        fail(OP, "k", "must have at least one head and one channel", list(k.shape))
    if nk < 1:
        fail(OP, "k", "must have at least one token", list(k.shape))
    nq = q.shape[1] if q.dim() == 4 else -1
    check_shape(OP, "q", q, (B, nq, h, d), "[B, Nq, h, d]")
    check_shape(OP, "v", v, k.shape, "[B, Nk, h, d]")
    if max(nq, nk) > MAX_TOKENS:
        fail(OP, "q and k", f"must have at most {MAX_TOKENS} tokens", [nq, nk])
    sides = {"alphas": alphas, "mask": mask, "est_q": est_q, "est_k": est_k, "v_p": v_p}
    for name, x in sides.items():
        if x is not None:
            check_tensor(OP, name, x, _SIDE_DTYPES)
            if x.device != k.device:
                fail(OP, name, f"must be on k's device {k.device}", x.device)
    if alphas is not None:
        check_shape(OP, "alphas", alphas, (4,), "[4]")
    if mask is not None:
        if mask.dim() == 2:
            check_shape(OP, "mask", mask, (B, nk), "[B, Nk]")
        else:
            check_shape(OP, "mask", mask, (B, nq, nk), "[B, Nk] or [B, Nq, Nk]")
        if mask.requires_grad:
            fail(OP, "mask", "must not require grad", "requires_grad=True")
    if (est_q is None) != (est_k is None):
        fail(OP, "est_q and est_k", "must be given together", "one of them")
    if est_q is not None:
        rank = est_q.shape[-1] if est_q.dim() == 3 else -1
        check_shape(OP, "est_q", est_q, (B, nq, rank), "[B, Nq, R]")
        if rank < 1:
            fail(OP, "est_q", "must have a rank of at least 1", list(est_q.shape))
        check_shape(OP, "est_k", est_k, (B, nk, rank), "[B, Nk, R]")
    if v_p is not None:
        check_shape(OP, "v_p", v_p, (B, nk), "[B, Nk]")


@torch.library.register_fake("fastbb::binary_attention")
def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    devices = {str(x.device) for x in (q, k, v, *args) if isinstance(x, Tensor)}
    if len(devices) > 1:
        fail(OP, "tensors", "must be on one device", sorted(devices), RuntimeError)
    probs, _ste, dropout_p, _seed, save = args[6:]
    B, nk, h, d = k.shape
    nq = q.shape[1]
    out = q.new_empty(q.shape)
    if not save:
        nothing = (k.new_empty((0,), dtype=torch.uint8) for _ in range(4))
        return (out, k.new_empty((0,), dtype=torch.float32), *nothing)
    lse = k.new_empty((B, h, nq) if probs == "softmax" else (0,), dtype=torch.float32)
    planes = (
        k.new_empty((B, tokens, h, 3, bit_row_bytes(d)), dtype=torch.uint8)
        for tokens in (nq, nk, nk)
    )
    count = 2 if dropout_p > 0 else 1
    return (out, lse, *planes, k.new_empty((B, h, nq, count, bit_row_bytes(nk)), dtype=torch.uint8))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, probs, _ste, dropout_p, _seed, save = inputs
    _out, lse, *planes = output
    ctx.mark_non_differentiable(lse, *planes)
    ctx.save_for_backward(*planes, *tensors[3:])
    ctx.dtype = tensors[0].dtype
    ctx.settings = (scale, probs, dropout_p)
    ctx.save = save


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.save:
        fail(OP, "save", "must be True where gradients are wanted", False, RuntimeError)
    need = ctx.needs_input_grad
    # Where autocast is in force, it would round what is summed here.
    with torch.autocast(grad_out.device.type, enabled=False):
        grads = _Gradients.apply(ctx.settings, ctx.dtype, need, grad_out, *ctx.saved_tensors)
    return (*grads, *(None,) * (len(need) - len(grads)))


class _Gradients(torch.autograd.Function):
    """Gradients from saved bits; a function of its own, so that no second derivative is wrong."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[float, str, float],
        dtype: torch.dtype,
        need: tuple[bool, ...],
        grad_out: Tensor,
        *saved: Any,
    ) -> tuple[Tensor | None, ...]:
        return _gradients(settings, dtype, need, grad_out, *saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(
            f'{OP}: second derivatives have no kernel; use impl="reference" where they are needed'
        )


def _gradients(
    settings: tuple[float, str, float],
    dtype: torch.dtype,
    need: tuple[bool, ...],
    grad_out: Tensor,
    q_planes: Tensor,
    k_planes: Tensor,
    v_planes: Tensor,
    p_planes: Tensor,
    alphas: Tensor | None,
    mask: Tensor | None,
    est_q: Tensor | None,
    est_k: Tensor | None,
    v_p: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Of q, k, v, alphas, mask, est_q, est_k, v_p, in float32 until the end."""
    scale, probs, dropout_p = settings
    grad = grad_out.float().transpose(1, 2)  # [B, h, Nq, d], as all below
    (q, q_pass), (k, k_pass), (v, v_pass) = (
        _signs(x, grad_out.shape[-1]) for x in (q_planes, k_planes, v_planes)
    )
    wide = grad.new_ones(4) if alphas is None else floored(alphas.float())
    a_q, a_k, a_v, a_p = wide.unbind()
    size_p = a_p if probs == "softmax" else torch.ones_like(a_p)
    ones, *kept = _unpack(p_planes, k.shape[2], "unsigned").unbind(-2)

    weights = _scores((q @ k.mT) * (a_q * a_k), scale, mask, est_q, est_k)
    if probs == "softmax":
        weights = weights.softmax(-1)
    # What was dropped is 0 even where a weight is infinite.
    keep = kept[0] > 0 if kept else None
    dropped = weights if keep is None else torch.where(keep, weights / (1 - dropout_p), 0.0)
    grad_p = (grad @ v.mT) * a_v
    row_sums = grad.sum(-1, keepdim=True)
    if v_p is not None:
        grad_p = grad_p + row_sums * v_p.float()[:, None, None]
    if probs == "softmax":
        u = dropped / a_p
        inside = (u >= 0) & (u <= 1)
    else:
        inside = dropped.abs() < 1
    grad_w = grad_p * inside
    if keep is not None:
        grad_w = torch.where(keep, grad_w / (1 - dropout_p), 0.0)
    if probs == "softmax":
        grad_w = weights * (grad_w - (weights * grad_w).sum(-1, keepdim=True))
    grad_s = grad_w * scale

    dq, dk = (grad_s @ k) * a_k, (grad_s.mT @ q) * a_q
    dv = (ones.mT @ grad) * size_p
    dalphas = dest_q = dest_k = dv_p = None
    if alphas is not None and need[3]:
        phi = torch.zeros_like(ones)
        if probs == "softmax":
            phi = torch.where(u < 0, 0.0, torch.where(u > 1, 1.0, ones - u))
        pairs = ((q, dq), (k, dk), (v, dv), (phi, grad_p))
        dalphas = torch.stack([_mean_root(x * g) for x, g in pairs]).to(alphas.dtype)
    if est_q is not None and est_k is not None and (need[5] or need[6]):
        over_heads = grad_s.sum(1)
        dest_q = (over_heads @ est_k.float()).to(est_q.dtype)
        dest_k = (over_heads.mT @ est_q.float()).to(est_k.dtype)
    if v_p is not None and need[7]:
        dv_p = ((ones.mT @ row_sums).sum(1).squeeze(-1) * size_p).to(v_p.dtype)
    dq, dk, dv = (
        (x * passes).to(dtype).transpose(1, 2)
        for x, passes in ((dq, q_pass), (dk, k_pass), (dv, v_pass))
    )
    return dq, dk, dv, dalphas, None, dest_q, dest_k, dv_p


def _scores(
    products: Tensor, scale: float, mask: Tensor | None, est_q: Tensor | None, est_k: Tensor | None
) -> Tensor:
    """Scores `[B, h, Nq, Nk]` from the products of the signs."""
    if est_q is not None and est_k is not None:
        products = products + (est_q.float() @ est_k.float().mT).unsqueeze(1)
    scores = products * scale
    if mask is None:
        return scores
    return scores + (mask[:, None, None] if mask.dim() == 2 else mask[:, None]).float()


def _signs(planes: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Planes `[B, N, h, 3, bytes]` -> signs, and 1 where gradients pass: `[B, h, N, d]`."""
    signs = _unpack(planes[..., :2, :], channels, "ternary")
    passes = _unpack(planes[..., 2, :], channels, "unsigned")
    return signs.transpose(1, 2), passes.transpose(1, 2)


def _unpack(bits: Tensor, channels: int, kind: str) -> Tensor:
    return torch.ops.fastbb.unpack_bits.default(bits, channels, kind, torch.float32)


def _mean_root(x: Tensor) -> Tensor:
    """Sum over the root of the number of elements."""
    root: Any = torch.sym_max(x.numel(), 1) ** 0.5
    return x.sum() / root


torch.library.register_autograd("fastbb::binary_attention", _backward, setup_context=_setup_context)
