# SPDX-License-Identifier: Apache-2.0
"""Window attention on CUDA tensors as far as no GPU is needed: choice of the kernel, launches."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastbb import _C
from fastbb.ops import window_attention
from fastbb.testing.window_attention import CASES, build, build_backward
from window_attention_ptx import Call, Params

KB = 1024


class Attention(torch.nn.Module):
    def __init__(self, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl

    def forward(self, qkv: Tensor) -> Tensor:
        return window_attention(qkv, window=7, shift=3, mask="swin", impl=self.impl)


def traced(dtype: torch.dtype) -> str:
    with FakeTensorMode(), torch.no_grad():
        qkv = torch.empty(1, 14, 14, 3, 2, 32, device="cuda", dtype=dtype)
        return str(torch.export.export(Attention("fused"), (qkv,), strict=True))


def last_argument(graph: str) -> str:
    (match,) = re.findall(r"fastbb\.window_attention\.default\(.*, (\w+)\)", graph)
    return match


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_products_follow_torch(cuda_machine: pytest.MonkeyPatch, precision: str) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        float32, float16 = traced(torch.float32), traced(torch.float16)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert last_argument(float32) == str(precision == "tf32")
    assert last_argument(float16) == "False"


def test_gradients_take_the_kernel_too(cuda_machine: pytest.MonkeyPatch) -> None:
    args = build("swin_v2").args
    sample = build_backward("swin_v2")
    with FakeTensorMode() as fake:
        qkv = [fake.from_tensor(x).to("cuda").requires_grad_() for x in args[:3]]
        assert window_attention(*qkv, window=8, impl="fused").requires_grad
        moved = [
            fake.from_tensor(x).to("cuda") if isinstance(x, Tensor) else x for x in sample.args
        ]
        gradients = torch.ops.fastbb.window_attention_backward.default(*moved)
        assert [g.shape for g in gradients[:3]] == [x.shape for x in args[:3]]
        assert all(g.is_cuda for g in gradients)


# Plans


def params_of(**sizes: int) -> Params:
    """Windows of 7 x 7 tokens and 32 channels, in float16."""
    p = Params()
    p.dtype, p.batch, p.heads, p.head_dim = 2, 1, 1, 32
    p.map_h = p.map_w = p.window_h = p.window_w = 7
    p.windows_y = p.windows_x = 1
    for key, value in sizes.items():
        setattr(p, key, value)
    p.nq = p.nk = p.window_h * p.window_w
    return p


def plan_of(**sizes: int) -> dict:
    return _C.window_attention_cuda_plan(bytes(params_of(**sizes)))


def backward_plan(p: Params, many_blocks: int = 1024) -> dict:
    return _C.window_attention_cuda_backward_plan(bytes(p), many_blocks)


def test_large_tables_stay_in_global_memory() -> None:
    small = plan_of(table=256)
    assert small["table_shared"]
    assert small["forward"]["shared_bytes"] == plan_of()["forward"]["shared_bytes"] + 13 * 13 * 4
    large = plan_of(table=256, window_h=256, window_w=256, map_h=256, map_w=256)
    assert not large["table_shared"]
    assert large["forward"]["shared_bytes"] == plan_of()["forward"]["shared_bytes"]


@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("head_dim", [1, 32, 33, 64, 65, 128])
def test_every_kernel_fits_into_any_device(dtype: int, head_dim: int) -> None:
    plan = plan_of(dtype=dtype, head_dim=head_dim)
    assert plan["dim"] >= head_dim
    assert plan["forward"]["shared_bytes"] <= 99 * KB
    for side in (3, 4, 5, 7, 16):
        p = params_of(dtype=dtype, head_dim=head_dim, window_h=side, window_w=side, table=256)
        plan = backward_plan(p)
        assert plan["one_kernel"] == (side**2 <= 64)
        for kernel in ("queries", "keys"):
            assert plan[kernel]["shared_bytes"] <= 99 * KB


@pytest.mark.parametrize(
    ("changes", "aligned"),
    [
        ({}, True),
        ({"head_dim": 30}, False),
        ({"head_dim": 4}, False),
        ({"head_dim": 4, "dtype": 0}, True),
    ],
)
def test_alignment_of_rows(changes: dict[str, int], aligned: bool) -> None:
    assert plan_of(**changes)["aligned"] == aligned


def test_gradients_that_are_wanted_have_parts() -> None:
    p = params_of(batch=64, heads=8)
    assert backward_plan(p)["workspace"] == 0
    assert backward_plan(p)["walk"] == 1
    p.grad.dtable = 256
    p.grad.dscale = 256
    # 64 windows of 8 heads make 512 blocks: fewer blocks, fewer parts.
    for many_blocks, walk in ((1024, 1), (128, 4), (1, 64)):
        plan = backward_plan(p, many_blocks)
        assert plan["walk"] == walk
        parts = 64 // walk
        assert plan["keys"]["grid"] == parts * 8
        assert [launch["grid"] for launch in plan["sums"]] == [-(-8 * 49 * 49 // 32), 1]
        assert plan["workspace"] >= (parts + 1) * 8 * 49 * 49 + parts * 8
    assert backward_plan(p)["collapse"]["grid"] == -(-13 * 13 * 8 // 128)


def test_parts_of_the_bias_gradient_stay_small() -> None:
    p = params_of(batch=4096, heads=16, window_h=24, window_w=24, map_h=24, map_w=24)
    p.grad.dtable = 256
    plan = backward_plan(p, 2**30)
    dense = 16 * 576 * 576
    assert dense < plan["workspace"] - plan["dense_bias"] < 2**24 + 3 * dense + 2 * 4096 * 16 * 576


def test_queries_are_split_where_blocks_are_few() -> None:
    p = params_of(full=True, nq=3136, nk=49, batch=8, head_dim=64)
    p.nq = 3136
    plan = backward_plan(p)
    assert plan["q_splits"] == 49  # of two tiles of 32 queries
    assert plan["keys"]["grid"] == 8 * 49
    p.batch = 512
    assert backward_plan(p)["q_splits"] == 1


def test_alignment_of_addresses_and_strides() -> None:
    call = Call(build("swin", dtype=torch.float16).kwargs)
    assert call.plan["aligned"]
    for field in ("data", "image", "row", "column", "head"):
        for tensor in (call.params.q, call.params.k, call.params.v):
            value = getattr(tensor, field)
            setattr(tensor, field, value + (8 if field == "data" else 4))
            assert not _C.window_attention_cuda_plan(bytes(call.params))["aligned"]
            setattr(tensor, field, value)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.batch])
def test_nothing_to_do(name: str) -> None:
    kwargs = build(name).kwargs
    params = Params(batch=0, heads=2, head_dim=8, nq=kwargs["q"].shape[1], nk=4, full=True)
    assert _C.window_attention_cuda_plan(bytes(params))["forward"]["grid"] == 0


def test_plans_refuse_other_parameters() -> None:
    with pytest.raises(ValueError, match="params must have 576 bytes, got 3"):
        _C.window_attention_cuda_plan(b"abc")
    with pytest.raises(ValueError, match="many_blocks must be positive, got 0"):
        _C.window_attention_cuda_plan(bytes(Params()), 0)
