# SPDX-License-Identifier: Apache-2.0
"""Non-finite and extreme values, threads and memory of window attention."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb.ops import window_attention
from fastbb.testing import TOLERANCES, assert_close
from fastbb.testing.window_attention import build, build_backward
from window_oracle import threads

BACKWARD = torch.ops.fastbb.window_attention_backward.default
FLOAT32 = TOLERANCES["fastbb::window_attention"][torch.float32].forward


@pytest.mark.parametrize("name", ["swin", "dim_24", "window_12x1", "window_5x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_stays_in_its_window(isa: str, name: str, dtype: torch.dtype) -> None:
    """NaN in one key: exactly the queries of its window and head become NaN."""
    kwargs = dict(build(name, dtype=dtype).kwargs)
    kwargs["k"] = kwargs["k"].clone()
    before = window_attention(**kwargs, impl="fused")
    kwargs["k"][1, 2, 1, 1, 3] = math.nan
    after = window_attention(**kwargs, impl="fused")
    exact = window_attention(**kwargs, impl="reference")
    nan = torch.isnan(after)
    assert torch.equal(nan, torch.isnan(exact))
    assert nan[1, :, :, 1].any() and not nan[0].any() and not nan[:, :, :, 0].any()
    assert nan.sum() == kwargs["window"][0] * kwargs["window"][1] * after.shape[-1]
    assert torch.equal(after[~nan], before[~nan])


@pytest.mark.parametrize("token", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_input(isa: str, value: float, tensor: str, token: int) -> None:
    """NaN and infinity appear where the reference has them, and nowhere else."""
    for name in ("swin_unshifted", "dim_24", "dim_1", "pvt", "pvt_2500_keys", "pvt_one_key"):
        kwargs = dict(build(name).kwargs)
        kwargs[tensor] = kwargs[tensor].clone()
        kwargs[tensor][0, token, ..., 0, 0] = value
        exact = {key: x.double() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        result = window_attention(**kwargs, impl="fused")
        with threads(1):
            expected = window_attention(**exact, impl="reference")
        assert not torch.isfinite(expected).all()
        assert_close(result, expected, FLOAT32, name)


@pytest.mark.parametrize("tensor", ["q", "k", "v", "grad_out"])
def test_nan_reaches_the_gradients_of_its_window_only(isa: str, tensor: str) -> None:
    kwargs = dict(build("window_5x3", requires_grad=True).kwargs)
    kwargs.pop("bias_table")
    grad_out = torch.randn(kwargs["k"].shape)
    poisoned = grad_out if tensor == "grad_out" else kwargs[tensor].detach().clone()
    poisoned[0, 4, 4, 1, 7] = math.nan
    if tensor != "grad_out":
        kwargs[tensor] = poisoned.requires_grad_()
    leaves = [kwargs[key] for key in "qkv"]
    both = [
        torch.autograd.grad(window_attention(**kwargs, impl=impl), leaves, grad_out)
        for impl in ("fused", "reference")
    ]
    for key, fused, exact in zip("qkv", *both, strict=True):
        assert torch.equal(torch.isnan(fused), torch.isnan(exact)), key
    assert sum(int(torch.isnan(grad).sum()) for grad in both[0]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_with_every_key_masked(isa: str, dtype: torch.dtype) -> None:
    """softmax of a row of -inf is NaN, as in PyTorch; other rows are untouched."""
    kwargs = dict(build("mask_one", dtype=dtype).kwargs)
    kwargs["mask"] = torch.zeros_like(kwargs["mask"])
    before = window_attention(**kwargs, impl="fused")
    kwargs["mask"][0, 5] = -math.inf
    after = window_attention(**kwargs, impl="fused")
    nan = torch.isnan(after)
    assert torch.equal(nan, torch.isnan(window_attention(**kwargs, impl="reference")))
    assert nan.any() and not nan.all()
    assert torch.equal(after[~nan], before[~nan])


def test_first_key_blocks_all_masked(isa: str) -> None:
    """A running softmax may meet whole blocks of -inf before the first real key."""
    kwargs = dict(build("pvt_2500_keys").kwargs)
    mask = torch.zeros(1, 19, 2500)
    mask[:, :10, :1500] = -math.inf
    mask[:, 10:, 900:] = -math.inf
    kwargs["mask"] = mask
    exact = {key: x.double() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
    result = window_attention(**kwargs, impl="fused")
    assert_close(result, window_attention(**exact, impl="reference"), FLOAT32)


@pytest.mark.parametrize("offset", [-1e4, 3e3, 1e5])
def test_large_logits_do_not_overflow(isa: str, offset: float) -> None:
    """A constant in all logits of a row changes nothing but rounding."""
    kwargs = dict(build("dense_bias").kwargs)
    before = window_attention(**kwargs, impl="fused")
    kwargs["bias"] = kwargs["bias"] + offset
    after = window_attention(**kwargs, impl="fused")
    assert (after - before).abs().max() < 4 * abs(offset) * torch.finfo(torch.float32).eps * 4


def test_mask_value_cannot_be_nan_by_accident(isa: str) -> None:
    """-inf times 'not masked' must not become NaN: pairs of one region get no mask at all."""
    kwargs = build("swin_minus_inf").kwargs
    for impl in ("fused", "reference"):
        assert torch.isfinite(window_attention(**kwargs, impl=impl)).all(), impl


def test_concurrent_calls() -> None:
    """Python threads that call at once, with different shapes, get what they get alone."""
    names = ["swin", "pvt_1050_keys", "gcvit_local", "roll_pad_both"]
    samples = [build_backward(name).args for name in names]
    alone = [BACKWARD(*args) for args in samples]
    outs = [window_attention(**build(name).kwargs, impl="fused") for name in names]
    failures: list[str] = []
    start = threading.Barrier(len(names))

    def work(i: int) -> None:
        kwargs = build(names[i]).kwargs
        start.wait()
        for _ in range(10):
            grads = BACKWARD(*samples[i])
            same = all(torch.equal(a, b) for a, b in zip(grads, alone[i], strict=True))
            if not same or not torch.equal(window_attention(**kwargs, impl="fused"), outs[i]):
                failures.append(names[i])

    callers = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


LARGE_MAP = (4, 56, 56, 8, 16)
LARGE_WINDOW = 14
# All logits of all windows at once, and what the operator returns.
LOGITS_BYTES = 4 * 16 * 8 * LARGE_WINDOW**4 * 4
RESULT_BYTES = math.prod(LARGE_MAP) * 4 + 4 * 56 * 56 * 8 * 4


def allocated_by_torch(function: Callable[[], Any]) -> int:
    """Bytes that PyTorch allocates during a call, freed or not."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


def peak_growth(function: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of the process grows at most during a call."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let a process reset its peak memory")
    before = field("VmRSS")
    function()
    return field("VmHWM") - before


@pytest.mark.parametrize("measure", [allocated_by_torch, peak_growth])
def test_forward_has_no_intermediate_of_all_logits(measure: Callable[..., int]) -> None:
    qkv = torch.randn(*LARGE_MAP[:3], 3, *LARGE_MAP[3:])
    table = torch.randn((2 * LARGE_WINDOW - 1) ** 2, 8)

    def call(impl: str) -> Callable[[], Tensor]:
        q, k, v = qkv.unbind(3)
        return lambda: window_attention(
            q, k, v, window=LARGE_WINDOW, bias_table=table, shift=7, mask="swin", impl=impl
        )

    fused = call("fused")
    fused()
    # Below a tenth of the logits remains for copies of the table and scratch of the threads.
    assert measure(fused) < RESULT_BYTES + LOGITS_BYTES // 10
    # The measure itself sees what the reference materialises.
    assert measure(call("reference")) > LOGITS_BYTES
