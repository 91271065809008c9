# SPDX-License-Identifier: Apache-2.0
"""Binary attention: non-finite values, ties, masks, views, bad input."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb.ops import binary_attention
from fastbb.ops.binary_attention import can_run
from fastbb.testing import TOLERANCES, assert_close
from fastbb.testing.binary_attention import build, raw_args
from fastbb.testing.sample import in_float64

OP = torch.ops.fastbb.binary_attention.default
BOUNDS = TOLERANCES["fastbb::binary_attention"][torch.float32].forward


def compare(kwargs: dict[str, Any]) -> Tensor:
    out = binary_attention(**kwargs, impl="fused")
    assert_close(out, binary_attention(**in_float64(kwargs), impl="reference"), BOUNDS)
    return out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["bipft", "dim_33", "bibert"])
def test_non_finite_elements_are_signs(isa: str, name: str, tensor: str, value: float) -> None:
    """NaN is 0."""
    kwargs = build(name).kwargs
    kwargs[tensor] = kwargs[tensor].clone()
    kwargs[tensor][0, 3, 1, 5:9] = value
    kwargs[tensor][-1, -1] = value
    assert torch.isfinite(compare(kwargs)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", ["est_q", "est_k", "v_p", "mask"])
def test_non_finite_sides(isa: str, tensor: str, value: float) -> None:
    """A row with a probability of NaN has no bit; a value of infinity times a 0 bit is NaN."""
    for name in ("bipft", "bipft_zeros"):
        kwargs = build(name).kwargs
        kwargs[tensor] = kwargs[tensor].clone()
        kwargs[tensor][0, 3] = value
        kwargs[tensor][-1, -1] = value
        out = compare(kwargs)
        assert torch.isnan(out).any() == (tensor == "v_p")


@pytest.mark.parametrize("probs", ["softmax", "bool"])
def test_all_keys_masked(isa: str, probs: str) -> None:
    kwargs = build("pair_mask").kwargs | {"probs": probs}
    kwargs["mask"][0, 4] = -math.inf
    out = compare(kwargs)
    assert (out[0, 4] == 0).all() and (out[0, 5] != 0).any()


def test_gradients_of_rows_without_keys() -> None:
    """NaN where the reference has it: softmax of -inf alone is NaN."""
    kwargs = build("pair_mask", requires_grad=True).kwargs
    kwargs["mask"][0, 4] = -math.inf
    leaves = [kwargs[key] for key in "qkv"]
    grad_out = torch.randn(kwargs["q"].shape)
    found, exact = (
        torch.autograd.grad(binary_attention(**kwargs, impl=impl), leaves, grad_out)
        for impl in ("fused", "reference")
    )
    for a, b in zip(found, exact, strict=True):
        assert torch.equal(torch.isnan(a), torch.isnan(b))
    assert torch.isnan(found[0]).any() and not torch.isnan(found[0]).all()


@pytest.mark.parametrize("nk", [1, 2, 4, 64, 128, 1024])
def test_exact_ties_have_no_bit(isa: str, nk: int) -> None:
    """Equal probabilities 1 / nk at the threshold a_p / 2 = 1 / nk, exactly; then just below."""
    q, k, v = torch.randn(1, 2, 1, 8), torch.zeros(1, nk, 1, 8), torch.randn(1, nk, 1, 8)
    alphas = torch.tensor([1.0, 1.0, 1.0, 2.0 / nk])
    assert (binary_attention(q, k, v, alphas=alphas, impl="fused") == 0).all()
    alphas[3] = 1.99 / nk
    out = binary_attention(q, k, v, alphas=alphas, impl="fused")
    assert_close(out, (v.sign().sum(1, keepdim=True) * alphas[3]).expand_as(out), BOUNDS)


def test_large_offsets_do_not_overflow(isa: str) -> None:
    kwargs = build("bit").kwargs
    before = binary_attention(**kwargs, impl="fused")
    kwargs["mask"] = torch.full((1, 128), 512.0)
    assert torch.equal(binary_attention(**kwargs, impl="fused"), before)
    kwargs["mask"] = torch.full((1, 128), -4096.0)
    kwargs["probs"] = "bool"
    assert (binary_attention(**kwargs, impl="fused") == 0).all()


def test_many_keys(isa: str) -> None:
    """Several blocks of keys and of counts; a mask cuts inside a word."""
    torch.manual_seed(1)
    n = 65536
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, n, 1, 8), torch.randn(1, n, 1, 8)
    mask = torch.zeros(1, n)
    mask[0, 40001:] = -math.inf
    # Scores of 8 signs: the threshold lies between two of their few probabilities.
    alphas = torch.tensor([1.0, 1.0, 1.0, 3.0 / 40001])
    compare({"q": q, "k": k, "v": v, "mask": mask, "alphas": alphas, "scale": 0.3})


def test_views_of_one_projection(isa: str) -> None:
    qkv = torch.randn(2, 19, 3, 4, 24)
    q, k, v = qkv.unbind(2)
    out = binary_attention(q, k, v, impl="fused")
    copies = (x.contiguous() for x in (q, k, v))
    assert torch.equal(out, binary_attention(*copies, impl="fused"))
    shared = qkv[:1, :, 0].expand(2, -1, -1, -1)
    both = binary_attention(shared, k, v, impl="fused")
    assert torch.equal(both, binary_attention(shared.contiguous(), k, v, impl="fused"))


def test_threads_change_nothing() -> None:
    kwargs = build("long_keys_dropout").kwargs
    two = OP(*raw_args(kwargs))
    torch.set_num_threads(1)
    for a, b in zip(two, OP(*raw_args(kwargs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 3])
def test_seeds(isa: str, seed: int) -> None:
    out = compare(build("bipft_dropout").kwargs | {"seed": seed})
    other = compare(build("bipft_dropout").kwargs | {"seed": seed ^ 1})
    assert not torch.equal(out, other)


# Bad input

X = torch.randn(2, 5, 3, 8)
GOOD: dict[str, Any] = {"q": X[:, :4], "k": X, "v": X}
# fmt: off
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q_type": ({"q": 1}, TypeError, "q must be a torch.Tensor, got int"),
    "k_sparse": ({"k": X.to_sparse()}, TypeError, "k must be a dense tensor"),
    "q_int": ({"q": X.int()}, TypeError, "q must have a dtype"),
    "q_dtype": ({"q": X.half()}, TypeError, "q must have k's dtype torch.float32"),
    "v_device": ({"v": X.to("meta")}, ValueError, "v must be on k's device"),
    "k_rank": ({"k": X[0], "v": X[0]}, ValueError, "k must be [B, Nk, h, d], got [5, 3, 8]"),
    "no_keys": ({"k": X[:, :0], "v": X[:, :0]}, ValueError, "k must have at least one token"),
    "no_heads": ({x: X[:, :, :0] for x in "qkv"}, ValueError, "k must have at least one head"),
    "no_dim": ({x: X[..., :0] for x in "qkv"}, ValueError, "k must have at least one head"),
    "q_rank": ({"q": X[0]}, ValueError, "q must have shape [B, Nq, h, d]"),
    "q_heads": ({"q": X[:, :, :2]}, ValueError, "q must have shape [B, Nq, h, d]"),
    "v_tokens": ({"v": X[:, :4]}, ValueError, "v must have shape [B, Nk, h, d] = [2, 5, 3, 8]"),
    "alphas": ({"alphas": torch.ones(3)}, ValueError, "alphas must have shape [4]"),
    "alphas_type": ({"alphas": 1.0}, TypeError, "alphas must be a torch.Tensor, got float"),
    "alphas_int": ({"alphas": torch.ones(4).int()}, TypeError, "alphas must have a dtype"),
    "mask_row": ({"mask": torch.zeros(2, 4)}, ValueError, "mask must have shape [B, Nk] = [2, 5]"),
    "mask_pair": ({"mask": torch.zeros(2, 5, 5)}, ValueError, "mask must have shape [B, Nk] or"),
    "mask_bool": ({"mask": torch.ones(2, 5) > 0}, TypeError, "mask must have a dtype"),
    "mask_grad": (
        {"mask": torch.zeros(2, 5, requires_grad=True)}, ValueError, "mask must not require grad",
    ),
    "est_alone": ({"est_q": torch.ones(2, 4, 1)}, ValueError, "est_q and est_k must be given"),
    "est_q": (
        {"est_q": torch.ones(2, 5, 1), "est_k": torch.ones(2, 5, 1)}, ValueError,
        "est_q must have shape [B, Nq, R] = [2, 4, 1]",
    ),
    "est_k": (
        {"est_q": torch.ones(2, 4, 2), "est_k": torch.ones(2, 5, 1)}, ValueError,
        "est_k must have shape [B, Nk, R] = [2, 5, 2]",
    ),
    "est_rank": (
        {"est_q": torch.ones(2, 4, 0), "est_k": torch.ones(2, 5, 0)}, ValueError,
        "est_q must have a rank of at least 1",
    ),
    "v_p": ({"v_p": torch.ones(2, 4)}, ValueError, "v_p must have shape [B, Nk] = [2, 5]"),
    "v_p_device": ({"v_p": torch.ones(2, 5, device="meta")}, ValueError, "v_p must be on k's"),
    "scale": ({"scale": "1"}, TypeError, "scale must be a float, got str"),
    "probs": ({"probs": "sigmoid"}, ValueError, "probs must be one of"),
    "ste": ({"ste": "bireal"}, ValueError, "ste must be one of"),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1"),
    "dropout_nan": ({"dropout_p": math.nan}, ValueError, "dropout_p must be at least 0"),
    "dropout_type": ({"dropout_p": None}, TypeError, "dropout_p must be a float, got NoneType"),
    "seed": ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
    "impl": ({"impl": "fast"}, ValueError, "impl must be"),
}
# fmt: on


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, error, text = BAD[name]
    with pytest.raises(error, match=re.escape(f"binary_attention: {text}")):
        binary_attention(**GOOD | change)


def test_forced_kernel_that_cannot_run_says_why() -> None:
    wide = torch.randn(1, 2, 1, 257)
    assert can_run(wide, wide, wide) == ["head dim 257 is above 256"]
    with pytest.raises(NotImplementedError, match="head dim 257 is above 256"):
        binary_attention(wide, wide, wide, impl="fused")
    assert binary_attention(wide, wide, wide).shape == wide.shape
    with pytest.raises(NotImplementedError, match=r"dtype torch\.float64"):
        binary_attention(*(x.double() for x in GOOD.values()), impl="fused")


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, X[0], "q must be [B, Nq, h, d]"),
        (0, X[:1], "q must have shape [2, 5, 3, 8]"),
        (0, X.half(), "q must have k's dtype"),
        (0, torch.randn(2, 5, 3, 16)[..., ::2], "q must have a contiguous last dimension"),
        (1, X[0], "k must be [B, Nk, h, d]"),
        (1, X[:, :0], "k must have 1 to 2^31-1 tokens"),
        (1, X[:, :, :0], "k must have at least one head"),
        (1, X[..., :0], "k must have a head dim of 1 to 256"),
        (1, torch.randn(2, 5, 3, 257), "k must have a head dim of 1 to 256"),
        (1, X.double(), "k must be float32, bfloat16 or float16"),
        (2, X[:, :4], "v must have shape [2, 5, 3, 8]"),
        (3, torch.ones(3), "alphas must have shape [4]"),
        (3, torch.ones(4).int(), "alphas must have a floating-point dtype"),
        (4, torch.zeros(2, 4), "mask must have shape [2, 5]"),
        (4, torch.zeros(5), "mask must have shape [2, 5, 5]"),
        (5, None, "est_q and est_k must be given together"),
        (5, torch.zeros(2, 5), "est_q must be [B, Nq, R]"),
        (5, torch.zeros(2, 5, 0), "est_q must be [B, Nq, R]"),
        (6, torch.zeros(2, 5, 2), "est_k must have shape [2, 5, 1]"),
        (7, torch.zeros(2, 4), "v_p must have shape [2, 5]"),
        (9, "sigmoid", "probs must be softmax or bool"),
        (10, "bireal", "ste must be clip, clip_open or identity"),
        (11, 1.0, "dropout_p must be at least 0 and below 1"),
        (11, 1.0 - 1e-12, "dropout_p must be at least 0 and below 1"),
        (11, math.nan, "dropout_p must be at least 0 and below 1"),
        (11, -0.1, "dropout_p must be at least 0 and below 1"),
    ],
)
def test_raw_operator_protects_memory(at: int, value: Any, text: str) -> None:
    args: list[Any] = [X, X, X, None, None, torch.ones(2, 5, 1), torch.ones(2, 5, 1), None]
    args += [1.0, "softmax", "clip", 0.0, 0, True]
    OP(*args)
    args[at] = value
    with pytest.raises(RuntimeError, match=re.escape(f"binary_attention: {text}")):
        OP(*args)
